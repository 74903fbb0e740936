"""Which split a document belongs to: a function of its id and the settings alone, whatever else is in the corpus."""

from __future__ import annotations

import hashlib

import polars as pl

from sbp_assets.settings import Split

UNIQUE, ORACLE, HELDOUT = "unique", "oracle", "heldout"


def split_of(document_id: str, split: Split) -> str | None:
    """'unique' (D), 'oracle', 'heldout', or None for a document outside every split.

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
    """`documents` of `shard` without `duplicates`, with column `split`; documents outside every split left out."""
    dropped = duplicates.filter(pl.col("shard") == shard).select("id")
    kept = documents.join(dropped, on="id", how="anti", maintain_order="left")
    splits = pl.Series("split", [split_of(name, split) for name in kept["id"]], dtype=pl.String)
    return kept.with_columns(splits).filter(pl.col("split").is_not_null())


def expected_deviation(share: float, documents: int) -> float:
    """How far a split's share may stray from `share` over `documents`: five standard deviations of the binomial."""
    return 5 * (share * (1 - share) / max(documents, 1)) ** 0.5 + 1 / max(documents, 1)
