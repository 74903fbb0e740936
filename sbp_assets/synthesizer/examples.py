"""Synthesizer-tuning examples `<bos> d1 <related> d2 <eos>` from neighbour pairs (paper section 2.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import duckdb
import numpy as np
import polars as pl

from sbp_assets.corpus.split import UNIQUE
from sbp_assets.storage.columns import Column, table_schema
from sbp_assets.storage.database import batches, database, scalar
from sbp_assets.storage.paths import duckdb_table, read_table, write_tables
from sbp_assets.storage.progress import Progress

TRAIN = "train"
HELDOUT = "heldout"
HELDOUT_SHARE = 0.02
BATCH = 20_000  # Examples in memory at a time.

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
    scratch: Path,
    memory_limit: str,
    progress: Progress | None = None,
    shuffle_seed: int | None = None,
) -> dict[str, int]:
    """Write every pair as an example, in token-array format, and return what `_COUNTED` counts.

    With `shuffle_seed` the d2 are dealt at random over all pairs (see `random_partners`): the same documents occur as
    often as before, without their relation.

    `pairs` (d1, d2) and `tokens` are keyed by shard; a pair lies in the shard of its d1. The rows of documents.parquet
    have DOCUMENT_COLUMNS and are in order of shard, d1, d2. DuckDB joins pairs and documents in `memory_limit`, and
    spills into the folder `scratch`, where they are staged. Beside it memory holds one shard and BATCH examples; with
    `shuffle_seed` all pairs.

    Raises ExamplesError where there are no pairs or a pair names a document outside D.
    """
    with database(scratch, memory_limit) as db:
        _locate(db, pairs, tokens, scratch)
        split = split_of_seeds(db, "located")
        if shuffle_seed is not None:
            _deal(db, scratch, shuffle_seed)
        db.execute(
            f"CREATE VIEW examples AS SELECT {_EXAMPLE.format(most=max_document_tokens)}, {split} AS split FROM located"
        )
        counted = db.execute(f"SELECT {_COUNTED} FROM examples").pl().row(0, named=True)
        counts = {name: int(value) for name, value in counted.items()}
        directory.mkdir(parents=True, exist_ok=True)
        kind = np.uint16 if vocab_size <= 2**16 else np.uint32
        shape = (counts["tokens"],)
        out = np.lib.format.open_memmap(directory / "tokens.npy", mode="w+", dtype=kind, shape=shape)
        ends = np.lib.format.open_memmap(
            directory / "offsets.npy", mode="w+", dtype=np.int64, shape=(counts["examples"] + 1,)
        )
        directories = [tokens[shard] for shard in sorted(tokens)]
        # An open file takes a descriptor, of which a process has 1,024 in many places.
        opened = lru_cache(maxsize=128)(
            lambda shard: np.load(directories[shard] / "tokens.npy", mmap_mode="r", allow_pickle=False)
        )
        done = 0
        (staged := scratch / "examples").mkdir()
        query = "SELECT * FROM examples ORDER BY shard, d1, d2"
        for number, rows in enumerate(batches(db, query, BATCH, file=scratch / "in_order.parquet")):
            ends[done + 1 : done + 1 + len(rows)] = ends[done] + rows["tokens"].cum_sum().to_numpy()
            places = rows.select("d1_shard", "d1_start", "d1_stop", "d2_shard", "d2_start", "d2_stop")
            for s1, a1, b1, s2, a2, b2 in places.iter_rows():
                example, _ = format_example(opened(s1)[a1:b1], opened(s2)[a2:b2], related_id, max_document_tokens)
                out[ends[done] : ends[done + 1]] = example
                done += 1
                if progress:
                    progress.advance()
            for (shard,), part in rows.partition_by("shard", as_dict=True).items():
                documents = part.select([column.name for column in DOCUMENT_COLUMNS])
                documents.write_parquet(staged / f"{shard:06d}-{number:09d}.parquet")
        out.flush()
        ends.flush()
    # As the rows of one shard after another were written before, and those dealt at random all at once.
    parts = groupby(sorted(staged.iterdir()), lambda path: path.name[:6] if shuffle_seed is None else "")
    tables = (pl.concat([read_table(path) for path in of_shard]) for _, of_shard in parts)
    write_tables(tables, table_schema(DOCUMENT_COLUMNS), directory / "documents.parquet")
    return counts


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


def split_of_seeds(db: duckdb.DuckDBPyConnection, pairs: str) -> str:
    """Return the SQL expression of an example's split by its `d1`, of the d1 that the table `pairs` has.

    About 2% are held out by hash, and one d1 at least where there are two; nor are all of them. The hash is stable, so
    a seed document stays on its side as shards are added.
    """
    found = db.execute(f"SELECT min({_HASH}), max({_HASH}) FROM {pairs}").fetchone()
    assert found is not None
    lowest, highest = (value or "" for value in found)
    # In hexadecimal digits, of which a digest has 64: of two texts the one that begins with the other is the greater.
    below = int(HELDOUT_SHARE * 2**64).to_bytes(8, "big").hex()
    if highest < below:
        below = highest
    elif lowest >= below:
        below = f"{lowest}0" if lowest < highest else lowest
    return f"CASE WHEN {_HASH} < '{below}' THEN '{HELDOUT}' ELSE '{TRAIN}' END"


def locations(directory: Path) -> pl.DataFrame:
    """Return where each document of D of a shard lies in its token array: id, start, stop."""
    offsets = np.load(directory / "offsets.npy", allow_pickle=False)
    return (
        read_table(directory / "documents.parquet", columns=["id", "split"])
        .with_columns(start=pl.Series(offsets[:-1]), stop=pl.Series(offsets[1:]))
        .filter(pl.col("split") == UNIQUE)
        .drop("split")
    )


_PLACED = """
SELECT found.*, places.shard AS {side}_shard, places.start AS {side}_start, places.stop AS {side}_stop
FROM {found} found LEFT JOIN places ON places.id = {side}
"""
_EXAMPLE = """
*, d1 || '->' || d2 AS id, least(d1_stop - d1_start - 2, {most}) + 2 AS prompt_tokens,
d2_stop - d2_start - 2 > {most} AS cut,
least(d1_stop - d1_start - 2, {most}) + 2 + least(d2_stop - d2_start - 2, {most}) + CASE WHEN
d2_stop - d2_start - 2 > {most} THEN 0 ELSE 1 END AS tokens
"""
_HASH = "sha256('tuning-heldout:' || d1)"
_COUNTED = f"""
count(*) AS examples, count_if(split = '{HELDOUT}') AS heldout_examples, count(DISTINCT d1) AS seed_documents,
count_if(cut) AS cut_examples, sum(tokens) AS tokens, sum(prompt_tokens) AS prompt_tokens
"""


def _copy(db: duckdb.DuckDBPyConnection, query: str, file: Path) -> None:
    path = str(file).replace("'", "''")
    db.execute(f"COPY ({query}) TO '{path}' (FORMAT parquet, ROW_GROUP_SIZE 30720)")


def _locate(
    db: duckdb.DuckDBPyConnection, pairs: Mapping[str, pl.LazyFrame], tokens: Mapping[str, Path], scratch: Path
) -> None:
    """Create the view `located`: a row per pair, with the places of its documents; shards are numbered in order."""
    for number, shard in enumerate(sorted(tokens)):
        placed = locations(tokens[shard]).with_columns(shard=pl.lit(number, pl.Int32))
        placed.write_parquet(scratch / f"places-{number:06d}.parquet")
    for number, shard in enumerate(sorted(pairs)):
        own = pairs[shard].select("d1", "d2", shard=pl.lit(number, pl.Int32)).collect()
        own.write_parquet(scratch / f"pairs-{number:06d}.parquet")
    for name in ("places", "pairs"):
        db.execute(f"CREATE VIEW {name} AS SELECT * FROM {duckdb_table(scratch, f'{name}-*.parquet')}")
    # One join at a time, into files: the limit is then for one hash table, and DuckDB spills no table of its own.
    for side, found, name in (("d1", "pairs", "with_d1"), ("d2", "with_d1", "located")):
        _copy(db, _PLACED.format(side=side, found=found), scratch / f"{name}.parquet")
        db.execute(f"CREATE VIEW {name} AS SELECT * FROM {duckdb_table(scratch, f'{name}.parquet')}")
    if not scalar(db, "SELECT count(*) FROM located"):
        raise ExamplesError(
            "no neighbour pairs, so there is nothing to tune the synthesizer on: lower pairing.min_similarity, raise "
            "pairing.neighbors, or use a corpus with more related documents (pairing/neighbor_pairs says what each "
            "filter dropped)"
        )
    for column in ("d1", "d2"):
        lost = f"FROM located WHERE {column}_start IS NULL"
        if count := scalar(db, f"SELECT count(*) {lost}"):
            first = db.execute(f"SELECT shard, {column} {lost} ORDER BY shard, d1, d2 LIMIT 1").fetchone()
            assert first is not None
            raise ExamplesError(
                f"pairing/neighbor_pairs, shard {sorted(pairs)[first[0]]}: {column} {first[1]!r} and {count - 1} more "
                "are not documents of D in corpus/tokens; re-materialise pairing and corpus/tokens from the same corpus"
            )


def _deal(db: duckdb.DuckDBPyConnection, scratch: Path, seed: int) -> None:
    """Deal the d2 of the view `located` over its pairs at random."""
    rows = db.execute("SELECT * FROM located ORDER BY shard, d1, d2").pl()
    second = [name for name in rows.columns if name == "d2" or name.startswith("d2_")]
    dealt = rows.with_columns(rows.select(second)[random_partners(rows["d1"], rows["d2"], seed)])
    dealt.with_columns(shard="d1_shard").write_parquet(scratch / "dealt.parquet")
    db.execute(f"CREATE OR REPLACE VIEW located AS SELECT * FROM {duckdb_table(scratch, 'dealt.parquet')}")
