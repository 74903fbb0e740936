"""The split of a document: a function of its id and the settings alone, independent of the rest of the corpus."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import polars as pl

from sbp_assets.corpus.ingest import RAW_DOCUMENT_COLUMNS
from sbp_assets.settings import Split
from sbp_assets.storage.columns import Column

UNIQUE, ORACLE, HELDOUT = "unique", "oracle", "heldout"

# Which ids there are depends on the duplicates, too.
_SOURCES = {"id": "corpus/duplicates corpus/raw_documents"}
_SPLIT = "'unique' (D), 'oracle' or 'heldout', by salted hash of the id."
DOCUMENT_COLUMNS = [
    *(replace(column, sources=_SOURCES.get(column.name, "corpus/raw_documents")) for column in RAW_DOCUMENT_COLUMNS),
    Column("split", pl.String, _SPLIT, "corpus/raw_documents.id"),
]


def split_of(document_id: str, split: Split) -> str | None:
    """Return 'unique' (D), 'oracle', 'heldout', or None for a document outside every split.

    The id's salted hash is a place in [0, 1): D lies at the lower end, the held-out documents at the upper end and the
    oracle's beside D, so that changing the oracle's share moves no document of the other two.
    """
    digest = hashlib.sha256(f"{split.salt}:{document_id}".encode()).digest()
    # 53 bits: every place is a float exactly, and none rounds up to 1.
    place = (int.from_bytes(digest[:8]) >> 11) / 2**53
    if place < split.unique:
        return UNIQUE
    if place >= 1 - split.heldout:
        return HELDOUT
    return ORACLE if place < split.unique + split.oracle else None


def split_documents(documents: pl.DataFrame, duplicates: pl.DataFrame, shard: int, split: Split) -> pl.DataFrame:
    """Return the `documents` of `shard` that are in a split and not in `duplicates`, with the column `split`."""
    dropped = duplicates.filter(pl.col("shard") == shard).select("id")
    kept = documents.join(dropped, on="id", how="anti", maintain_order="left")
    splits = pl.Series("split", [split_of(name, split) for name in kept["id"]], dtype=pl.String)
    return kept.with_columns(splits).filter(pl.col("split").is_not_null())


def expected_deviation(share: float, documents: int) -> float:
    """Return how far a split's share may differ from `share`: five standard deviations of the binomial."""
    return 5 * (share * (1 - share) / max(documents, 1)) ** 0.5 + 1 / max(documents, 1)
