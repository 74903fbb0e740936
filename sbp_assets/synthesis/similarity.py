"""Synthetic documents beside the documents of D, by the embedding model and the centring that pairs were found with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from sbp_assets.pairing.embed import Engine, embed, vectors_of
from sbp_assets.pairing.quantizer import Quantizer
from sbp_assets.settings import Pairing
from sbp_assets.storage.progress import Progress

# The settings that the vectors depend on; the centring is in the quantizer.
EMBEDDING_SETTINGS = (
    "pairing.embedding_model",
    "pairing.embedding_dtype",
    "pairing.embedding_prompt",
    "pairing.max_tokens",
)


@dataclass(frozen=True)
class Similarity:
    """An embedding model as the pairing stage uses it: cosines of its vectors are the similarities of pairs."""

    engine: Engine
    pairing: Pairing
    batch_size: int
    quantizer: Quantizer

    def vectors(self, texts: Sequence[str], progress: Progress) -> np.ndarray:
        """Return the unit vectors of `texts`, (texts, dim), as pairs are compared; advances `progress` by texts."""
        pairing = self.pairing
        found = embed(
            self.engine, texts, pairing.max_tokens, self.batch_size, progress, prompt=pairing.embedding_prompt
        )
        return self.quantizer.prepared(found)

    def with_seeds(self, rows: pl.DataFrame, embeddings: pl.LazyFrame) -> tuple[pl.DataFrame, np.ndarray]:
        """Return those of `rows` (seed_id, …) whose seed is in `embeddings`, and the vectors of the seeds.

        `embeddings` is the table of pairing/embeddings of the rows' shard. The order of the rows is kept.
        """
        seeds = rows["seed_id"].unique().to_list()
        known = embeddings.filter(pl.col("id").is_in(seeds)).select(seed_id="id", seed_vector="vector").collect()
        joined = rows.join(known, on="seed_id", how="inner", maintain_order="left")
        return joined.drop("seed_vector"), self.quantizer.prepared(vectors_of(joined.select(vector="seed_vector")))

    def to_seeds(self, embeddings: Mapping[str, pl.LazyFrame]) -> Callable[[str, pl.DataFrame], np.ndarray]:
        """Return what gives the cosines of a shard's synthetic documents (seed_id, text) to their seed documents.

        `embeddings` are the tables of pairing/embeddings by shard. It raises ValueError for a seed that they lack.
        """

        def of_shard(shard: str, rows: pl.DataFrame) -> np.ndarray:
            known, seeds = self.with_seeds(rows, embeddings[shard])
            if len(known) < len(rows):
                raise ValueError(
                    f"shard {shard}: pairing/embeddings lacks the seeds of {len(rows) - len(known)} synthetic "
                    "documents; re-materialise it, and what comes after it"
                )
            with Progress(f"embed synthetic documents {shard}", "documents", len(rows)) as progress:
                vectors = self.vectors(rows["text"].to_list(), progress)
            return (vectors * seeds).sum(axis=1)

        return of_shard
