"""Pairs of documents of D and synthetic documents of an earlier run: one more round of bootstrapping.

A synthetic document is related to its seed document as the synthesizer takes documents to be related, so that the pairs
need no search. As many are tuned on as there are neighbour pairs, each document in either order, d1 and d2, as
neighbours are.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from sbp_assets.corpus.split import UNIQUE
from sbp_assets.corpus.tokenizer import encode_documents
from sbp_assets.storage.columns import Column, table_schema
from sbp_assets.storage.paths import read_table, scan_table
from sbp_assets.storage.token_arrays import write_token_arrays

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DOCUMENTS, TRAINED_ON = "synthesis/synthetic_documents", "synthesis/synthetic_tokens"
PAIRS = "pairs.parquet"
PAIR_COLUMNS = [
    Column("d1", pl.String, "Document of D or synthetic document (`earlier-` and its id)."),
    Column("d2", pl.String, "The other: the synthetic document, or its seed document."),
]


class EarlierRoundError(ValueError):
    """The earlier run cannot be used; the message names the folder and says what is wrong with it."""


def write_earlier_pairs(
    directory: Path, artifacts: Path, known: Iterable[Path], pairs: int, tokenizer: PreTrainedTokenizerFast
) -> dict[str, int]:
    """Write token arrays of synthetic documents, and `pairs` pairs of them with their seed documents to PAIRS.

    `artifacts` is the data_dir of the earlier run, and `known` are the directories of corpus/tokens, whose documents
    the seed documents have to be. Of the synthetic documents that its SBP arm was trained on, those with the lowest
    sampling seeds, which are hashes, are taken: a uniform sample, the same each time, which memory holds. Returns the
    numbers of documents, pairs and tokens; there are fewer pairs where the run has fewer documents than half of
    `pairs`. Raises EarlierRoundError where the run has no synthetic documents, or has documents of another corpus.
    """
    files = sorted((artifacts / DOCUMENTS).glob("*.parquet"))
    trained_on = sorted((artifacts / TRAINED_ON).glob("*/documents.parquet"))
    if not files or not trained_on:
        raise EarlierRoundError(
            f"synthesizer.earlier_round: {artifacts} has no {TRAINED_ON if files else DOCUMENTS}: name the data_dir of "
            "a run that has synthesised, or unset it"
        )
    kept = pl.concat([scan_table(file).select("id") for file in trained_on])
    sampled = pl.concat([scan_table(file).select("id", "seed_id", "sampling_seed", "text") for file in files])
    sampled = sampled.join(kept, on="id", how="semi")
    chosen = sampled.bottom_k((pairs + 1) // 2, by=["sampling_seed", "id"]).sort("id").collect()
    # Two runs give a document of the same seed document and rollout the same id.
    documents = chosen.with_columns(id="earlier-" + pl.col("id"))
    of_d = pl.concat([
        read_table(path / "documents.parquet", ["id", "split"]).filter(split=UNIQUE).select("id") for path in known
    ])  # fmt: skip
    if foreign := documents.join(of_d, left_on="seed_id", right_on="id", how="anti")["seed_id"].sort().to_list():
        raise EarlierRoundError(
            f"synthesizer.earlier_round: {len(foreign)} synthetic documents of {artifacts} have a seed document that "
            f"is not in D, the first is {foreign[0]!r}: name a run on the same corpus and split"
        )
    encoded = encode_documents(tokenizer, documents["text"].to_list())
    tokens = write_token_arrays(directory, documents.select("id", split=pl.lit(UNIQUE)), encoded, len(tokenizer))
    both = pl.concat([
        documents.select(d1="seed_id", d2="id"),
        documents.select(d1="id", d2="seed_id").head(pairs - len(documents)),
    ])  # fmt: skip
    both.match_to_schema(table_schema(PAIR_COLUMNS)).write_parquet(directory / PAIRS)
    return {"documents": len(documents), "pairs": len(both), "tokens": tokens}
