"""Pairs of documents of D and synthetic documents of an earlier run: one more round of bootstrapping.

A synthetic document is related to its seed document as the synthesizer takes documents to be related, so that the pairs
need no search. A shard has as many of them as it has neighbour pairs, each document in either order, d1 and d2, as
neighbours are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from sbp_assets.corpus.split import UNIQUE
from sbp_assets.corpus.tokenizer import encode_documents
from sbp_assets.storage.columns import Column, table_schema
from sbp_assets.storage.paths import read_table, scan_table
from sbp_assets.storage.token_arrays import TokenArrays, write_token_arrays

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PREFIX = "earlier-"  # Of ids: this run's own synthetic documents may have the same ids without it.
PAIRS = "pairs.parquet"
NO_ENGINE = "none"  # Of rows that are real pairs, as synthesis/real_pairs.py writes them.
PAIR_COLUMNS = [
    Column("d1", pl.String, "Of pairs.parquet: document of D, or synthetic document.", "corpus/tokens.id"),
    Column("d2", pl.String, "Of pairs.parquet: the other of the two.", "corpus/tokens.id"),
]
COLUMNS = [
    *PAIR_COLUMNS,
    Column("id", pl.String, f"Of documents.parquet: `{PREFIX}` and the synthetic document's id."),
    Column("split", pl.String, "Of documents.parquet: unique, as they are tuned on like documents of D."),
    Column("tokens", "array[uint]", "Of tokens.npy: `<bos>`, the text's ids, `<eos>`."),
]


class EarlierRoundError(ValueError):
    """The earlier run cannot be used; the message names the file or folder and says what is wrong with it."""


def write_earlier_pairs(
    directory: Path, artifacts: Path, shard: str, tokens: Path, pairs: int, tokenizer: PreTrainedTokenizerFast
) -> dict[str, int]:
    """Write token arrays of synthetic documents of `shard`, and `pairs` pairs with their seed documents to PAIRS.

    `artifacts` is the data_dir of the earlier run, and `tokens` the directory of the shard's corpus/tokens, among whose
    documents of D the seed documents have to be. Of the synthetic documents that its SBP arm was trained on, those with
    the lowest sampling seeds, which are hashes, are taken: a uniform sample, the same each time. Memory holds the
    sample. Returns the numbers of documents, pairs and tokens; there are fewer pairs than `pairs` where the shard has
    fewer documents than half of it.

    Raises EarlierRoundError where the run has not synthesised the shard, has kept none of its documents, has real pairs
    in their place, or has another corpus or split.
    """
    written = artifacts / f"synthesis/synthetic_documents/{shard}.parquet"
    trained_on = artifacts / f"synthesis/synthetic_tokens/{shard}/documents.parquet"
    for path in (written, trained_on):
        if not path.is_file():
            raise EarlierRoundError(
                f"synthesizer.earlier_round: there is no {path}: name the data_dir of a run that has synthesised all "
                "shards of the same corpus"
            )
    table = scan_table(written)
    if "engine" in table.collect_schema() and not table.filter(engine=NO_ENGINE).head(1).collect().is_empty():
        raise EarlierRoundError(
            f"synthesizer.earlier_round: {written} holds real pairs (synthesis.condition was pairs): name a run whose "
            "synthesizer wrote its documents"
        )
    kept = table.select("id", "seed_id", "sampling_seed").join(scan_table(trained_on).select("id"), on="id", how="semi")
    chosen = kept.bottom_k((pairs + 1) // 2, by=["sampling_seed", "id"]).collect()
    if pairs and chosen.is_empty():
        raise EarlierRoundError(
            f"synthesizer.earlier_round: {trained_on} has none of the synthetic documents: loosen the filter of "
            "that run (synthesis.filter), or name another"
        )
    texts = table.select("id", "text").join(chosen.lazy().select("id"), on="id", how="semi").collect()
    # Two runs give a document of the same seed document and rollout the same id.
    documents = chosen.join(texts, on="id").sort("id").with_columns(id=PREFIX + pl.col("id"))
    of_d = read_table(tokens / "documents.parquet", ["id", "split"]).filter(split=UNIQUE)
    if foreign := sorted(set(documents["seed_id"]) - set(of_d["id"])):
        raise EarlierRoundError(
            f"synthesizer.earlier_round: {written} has synthetic documents of {len(foreign)} seed documents that are "
            f"not in D of shard {shard}, the first is {foreign[0]!r}: name a run on the same corpus, split and shards"
        )
    # As documents of D are: `examples.locations` finds no others.
    rows = documents.select("id", split=pl.lit(UNIQUE))
    total = write_token_arrays(
        directory, rows, encode_documents(tokenizer, documents["text"].to_list()), len(tokenizer)
    )
    both = pl.concat([
        documents.select(d1="seed_id", d2="id"),
        documents.select(d1="id", d2="seed_id").head(pairs - len(documents)),
    ])  # fmt: skip
    both.match_to_schema(table_schema(PAIR_COLUMNS)).write_parquet(directory / PAIRS)
    return {"documents": len(documents), "pairs": len(both), "tokens": total}


def earlier_pairs_problems(directory: Path, tokens: Path, bos_id: int, eos_id: int) -> list[str]:
    """Return what is wrong with the pairs in `directory`, in sentences; none where all holds.

    Each pair joins a document of the directory with one of D, which `tokens` (the shard's corpus/tokens) has, no pair
    and no id is there twice, and each document begins with `<bos>` and ends with `<eos>`.
    """
    arrays, pairs = TokenArrays.load(directory), read_table(directory / PAIRS)
    of_d = read_table(tokens / "documents.parquet", ["id", "split"]).filter(split=UNIQUE)["id"].implode()
    own = arrays.documents["id"].implode()
    joined = pl.any_horizontal(
        pl.col(one).is_in(own) & pl.col(other).is_in(of_d) for one, other in (("d1", "d2"), ("d2", "d1"))
    )
    counts = {
        "pairs do not join a synthetic document with one of D": len(pairs.filter(~joined)),
        "pairs are there twice": int(pairs.is_duplicated().sum()),
        "ids are there twice, or are those of documents of D": len(arrays.documents)
        - int(arrays.documents.select(pl.col("id").filter(~pl.col("id").is_in(of_d)).n_unique()).item()),
        "documents do not begin with <bos>": int((arrays.tokens[arrays.offsets[:-1]] != bos_id).sum()),
        "documents do not end with <eos>": int((arrays.tokens[arrays.offsets[1:] - 1] != eos_id).sum()),
    }
    return [f"{count} {what}" for what, count in counts.items() if count]
