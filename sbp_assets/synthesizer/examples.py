"""Synthesizer-tuning examples `<bos> d1 <related> d2 <eos>` from neighbour pairs (paper section 2.2)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from sbp_assets.corpus.split import UNIQUE
from sbp_assets.storage.columns import Column
from sbp_assets.storage.paths import read_table
from sbp_assets.storage.progress import Progress
from sbp_assets.storage.token_arrays import TokenArrays

TRAIN = "train"
HELDOUT = "heldout"
HELDOUT_SHARE = 0.02

PAIR = "pairing/neighbor_pairs.d1 pairing/neighbor_pairs.d2"
DOCUMENT_COLUMNS = [
    Column("id", pl.String, "`d1->d2`; of documents.parquet, as all but the last.", PAIR),
    Column("d1", pl.String, "Seed document.", "pairing/neighbor_pairs"),
    Column("d2", pl.String, "Related document.", "pairing/neighbor_pairs"),
    Column(
        "prompt_tokens",
        pl.Int64,
        "Leading tokens, up to and with `<related>`, that take no loss.",
        f"{PAIR} corpus/tokens.tokens",
    ),
    Column("cut", pl.Boolean, "Whether d2 was cut, so that there is no `<eos>`.", f"{PAIR} corpus/tokens.tokens"),
    Column("split", pl.String, "train or heldout.", "pairing/neighbor_pairs.d1"),
]
EXAMPLE_COLUMNS = [
    *DOCUMENT_COLUMNS,
    Column(
        "tokens", "array[uint]", "Of tokens.npy: `<bos>` d1 `<related>` d2 `<eos>`.", f"{PAIR} corpus/tokens.tokens"
    ),
]


class ExamplesError(ValueError):
    """No tuning examples can be made of the pairs; the message names the setting or the asset to look at."""


def format_prompt(document: Sequence[int] | np.ndarray, related_id: int, max_document_tokens: int) -> list[int]:
    """Return `<bos> d1 <related>`, on which the synthesizer is conditioned when it is tuned and when it is sampled.

    `document` is d1 as corpus/tokens holds it, `<bos>` ids `<eos>`; its ids are cut to `max_document_tokens`.
    """
    bos, *ids = document[:-1]
    return [int(token) for token in (bos, *ids[:max_document_tokens], related_id)]


def format_example(
    d1: Sequence[int] | np.ndarray, d2: Sequence[int] | np.ndarray, related_id: int, max_document_tokens: int
) -> tuple[list[int], int]:
    """Return the tokens of `<bos> d1 <related> d2 <eos>`, and the length of the prompt, which takes no loss.

    Both documents come as corpus/tokens holds them and are cut to `max_document_tokens` ids. A cut d2 gets no
    `<eos>`: the synthesizer would learn to stop in mid-sentence.
    """
    prompt = format_prompt(d1, related_id, max_document_tokens)
    # With one position more than the cut, an uncut d2 keeps its <eos> and a cut one cannot.
    continuation = d2[1:] if len(d2) - 2 <= max_document_tokens else d2[1 : 1 + max_document_tokens]
    return prompt + [int(token) for token in continuation], len(prompt)


def write_examples(
    directory: Path,
    pairs: Mapping[str, pl.LazyFrame],
    tokens: Mapping[str, Path],
    related_id: int,
    max_document_tokens: int,
    vocab_size: int,
    progress: Progress | None = None,
    shuffle_seed: int | None = None,
) -> pl.DataFrame:
    """Write every pair as an example, in token-array format, and return the rows of documents.parquet.

    With `shuffle_seed` the d2 are dealt at random over all pairs (see `random_partners`): the same documents occur as
    often as before, without their relation.

    `pairs` (d1, d2, d2_shard) and `tokens` are keyed by shard; a pair lies in the shard of its d1. The rows have
    DOCUMENT_COLUMNS and are in order of shard, d1, d2. The index of documents and pairs is held in memory, the tokens
    are not.

    Raises ExamplesError where there are no pairs or a pair names a document outside D.
    """
    index = pl.concat([_locations(shard, tokens[shard]) for shard in sorted(tokens)])
    rows = pl.concat([_located(shard, pairs[shard].collect(), index) for shard in sorted(pairs)])
    if rows.is_empty():
        raise ExamplesError(
            "no neighbour pairs, so there is nothing to tune the synthesizer on: lower pairing.min_similarity, raise "
            "pairing.neighbors, or use a corpus with more related documents (pairing/neighbor_pairs says what each "
            "filter dropped)"
        )

    if shuffle_seed is not None:
        second = [name for name in rows.columns if name == "d2" or name.startswith("d2_")]
        dealt = rows.select(second)[random_partners(rows["d1"], rows["d2"], shuffle_seed)]
        rows = rows.with_columns(dealt).sort("d1_shard", "d1", "d2")

    def held(document: str) -> pl.Expr:
        return (pl.col(f"{document}_stop") - pl.col(f"{document}_start") - 2).clip(upper_bound=max_document_tokens)

    rows = rows.with_columns(
        id=pl.col("d1") + "->" + pl.col("d2"),
        prompt_tokens=held("d1") + 2,
        cut=pl.col("d2_stop") - pl.col("d2_start") - 2 > max_document_tokens,
    ).with_columns(tokens=pl.col("prompt_tokens") + held("d2") + (~pl.col("cut")).cast(pl.Int64))
    heldout = pl.Series(heldout_seeds(rows["d1"].unique().to_list()), dtype=pl.String).implode()
    rows = rows.with_columns(split=pl.when(pl.col("d1").is_in(heldout)).then(pl.lit(HELDOUT)).otherwise(pl.lit(TRAIN)))

    directory.mkdir(parents=True, exist_ok=True)
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(rows["tokens"].to_numpy(), out=offsets[1:])
    out = np.lib.format.open_memmap(
        directory / "tokens.npy",
        mode="w+",
        dtype=np.uint16 if vocab_size <= 2**16 else np.uint32,
        shape=(int(offsets[-1]),),
    )
    sources = {shard: np.load(path / "tokens.npy", mmap_mode="r", allow_pickle=False) for shard, path in tokens.items()}
    columns = ("d1_shard", "d1_start", "d1_stop", "d2_shard", "d2_start", "d2_stop")
    for position, (s1, a1, b1, s2, a2, b2) in enumerate(rows.select(columns).iter_rows()):
        example, _ = format_example(sources[s1][a1:b1], sources[s2][a2:b2], related_id, max_document_tokens)
        out[offsets[position] : offsets[position + 1]] = example
        if progress:
            progress.advance()
    out.flush()
    np.save(directory / "offsets.npy", offsets)
    documents = rows.select([column.name for column in DOCUMENT_COLUMNS])
    documents.write_parquet(directory / "documents.parquet")
    return documents


def random_partners(d1: pl.Series, d2: pl.Series, seed: int, attempts: int = 1000) -> np.ndarray:
    """Return a permutation that deals the `d2` over the `d1` at random, no document to itself and no pair twice.

    Raises ExamplesError where no such permutation is found, which happens on a handful of documents only.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    order = generator.permutation(len(d1))
    for _ in range(attempts):
        dealt = pl.DataFrame({"d1": d1, "d2": d2[order]})
        wrong = (dealt["d1"] == dealt["d2"]) | ~dealt.select(pl.struct("d1", "d2").is_first_distinct()).to_series()
        if not wrong.any():
            return order
        # The wrong ones swap with as many others; a few rounds do.
        again = np.union1d(np.flatnonzero(wrong.to_numpy()), generator.integers(0, len(d1), int(wrong.sum())))
        order[again] = order[generator.permutation(again)]
    raise ExamplesError(
        f"{len(d1)} pairs are too few to deal their documents at random (synthesizer.partners is random): use more "
        "documents or a lower pairing.min_similarity"
    )


def heldout_seeds(seeds: Sequence[str]) -> list[str]:
    """Return the d1 whose examples are held out of tuning: about 2% by hash, and one at least where there are two.

    The hash is stable, so a seed document stays on its side as shards are added.
    """
    ranked = sorted((hashlib.sha256(f"tuning-heldout:{seed}".encode()).digest(), seed) for seed in set(seeds))
    below = int(HELDOUT_SHARE * 2**64)
    chosen = [seed for digest, seed in ranked if int.from_bytes(digest[:8], "big") < below]
    if len(chosen) == len(ranked):
        chosen = chosen[:-1]
    return chosen or [seed for _, seed in ranked[:1] if len(ranked) > 1]


def check_examples(
    arrays: TokenArrays, pairs: int, unique_ids: pl.Series, context_length: int, related_id: int, eos_id: int
) -> dict[str, list[str]]:
    """Return the ids (up to ten each) of examples that break a rule, by rule; empty where all hold.

    The rules: as many examples as `pairs`, no example twice, within the context, prompt_tokens points just behind
    `<related>` with d2 to follow, `<eos>` at the end exactly where d2 was not cut, d1 and d2 in D.
    """
    documents, lengths = arrays.documents, arrays.lengths
    prompt = documents["prompt_tokens"].to_numpy()
    inside = (prompt >= 2) & (prompt < lengths)
    starts = arrays.offsets[:-1]
    last_of_prompt = arrays.tokens[np.where(inside, starts + prompt - 1, starts)]
    ends = np.asarray(arrays.tokens[arrays.offsets[1:] - 1]) == eos_id
    known = unique_ids.implode()
    in_corpus = documents.select(pl.col("d1").is_in(known) & pl.col("d2").is_in(known)).to_series()
    broken = {
        "prompt_tokens": ~inside | (last_of_prompt != related_id),
        "longer than the context": lengths > context_length,
        "eos": ends == documents["cut"].to_numpy(),
        "not in D": ~in_corpus.to_numpy(),
        "repeated": documents["id"].is_duplicated().to_numpy(),
    }
    found = {rule: documents["id"].filter(pl.Series(mask)).head(10).to_list() for rule, mask in broken.items()}
    if len(documents) != pairs:
        found["count"] = [f"{len(documents)} examples for {pairs} pairs"]
    return {rule: ids for rule, ids in found.items() if ids}


def check_contents(
    arrays: TokenArrays,
    pairs: Mapping[str, pl.LazyFrame],
    tokens: Mapping[str, Path],
    related_id: int,
    max_document_tokens: int,
    shuffled: bool,
    sample: int = 100,
) -> dict[str, list[str]]:
    """Return the ids (up to ten each) of examples that are not of the pairs or their documents, by rule.

    It is empty where all are. The rules: d1 and d2 are those of `pairs` (`shuffled`: each as often, with other
    partners), the id is "d1->d2", the split is that of d1's hash; of an evenly spaced `sample`, the tokens are those
    of d1 and d2.
    """
    documents, sides = arrays.documents, ["d1", "d2"]
    wanted = pl.concat([frame.select(sides) for _, frame in sorted(pairs.items())]).collect()
    if shuffled:
        same = all(documents[side].sort().equals(wanted[side].sort()) for side in sides)
        other = [] if same else ["(documents)"]
    else:
        other = pl.concat([
            documents.select(sides).join(wanted, on=sides, how="anti"),
            wanted.join(documents.select(sides), on=sides, how="anti"),
        ]).select(pl.format("{}->{}", *sides)).to_series().to_list()  # fmt: skip
    heldout = pl.Series(heldout_seeds(documents["d1"].unique().to_list()), dtype=pl.String).implode()
    split = pl.when(pl.col("d1").is_in(heldout)).then(pl.lit(HELDOUT)).otherwise(pl.lit(TRAIN))
    places = np.unique(np.linspace(0, len(documents) - 1, min(sample, len(documents))).astype(int))
    chosen = documents[places]
    ids = pl.concat([chosen["d1"], chosen["d2"]]).unique().implode()
    found: dict[str, np.ndarray] = {}
    for shard, directory in sorted(tokens.items()):
        located = _locations(shard, directory).filter(pl.col("id").is_in(ids))
        source = np.load(directory / "tokens.npy", mmap_mode="r", allow_pickle=False)
        found |= {name: source[start:stop] for name, start, stop in located.select("id", "start", "stop").iter_rows()}
    untrue = []
    for place, d1, d2, name in zip(places, chosen["d1"], chosen["d2"], chosen["id"], strict=True):
        held = arrays.tokens[arrays.offsets[place] : arrays.offsets[place + 1]]
        known = d1 in found and d2 in found
        if not known or format_example(found[d1], found[d2], related_id, max_document_tokens)[0] != held.tolist():
            untrue.append(name)
    broken = {
        "not the pairs": other,
        "id": documents.filter(pl.col("id") != pl.format("{}->{}", *sides))["id"].to_list(),
        "split": documents.filter(pl.col("split") != split)["id"].to_list(),
        "other tokens": untrue,
    }
    return {rule: names[:10] for rule, names in broken.items() if names}


def _locations(shard: str, directory: Path) -> pl.DataFrame:
    """Return where each document of D of a shard lies in its token array: id, shard, start, stop."""
    offsets = np.load(directory / "offsets.npy", allow_pickle=False)
    return (
        read_table(directory / "documents.parquet", columns=["id", "split"])
        .with_columns(shard=pl.lit(shard), start=pl.Series(offsets[:-1]), stop=pl.Series(offsets[1:]))
        .filter(pl.col("split") == UNIQUE)
        .drop("split")
    )


def _located(shard: str, pairs: pl.DataFrame, index: pl.DataFrame) -> pl.DataFrame:
    rows = pairs.select("d1", "d2").sort("d1", "d2")
    for column in ("d1", "d2"):
        named = index.rename({"id": column, **{name: f"{column}_{name}" for name in ("shard", "start", "stop")}})
        rows = rows.join(named, on=column, how="left", maintain_order="left")
        if len(unknown := rows.filter(pl.col(f"{column}_start").is_null())):
            raise ExamplesError(
                f"pairing/neighbor_pairs, shard {shard}: {column} {unknown[column][0]!r} and {len(unknown) - 1} more "
                "are not documents of D in corpus/tokens; re-materialise pairing and corpus/tokens from the same corpus"
            )
    return rows
