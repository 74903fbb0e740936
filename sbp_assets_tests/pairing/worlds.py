"""Many tiny shards with exact neighbours, and tables that tell which shards were opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from sbp_assets.pairing.embed import embeddings_frame
from sbp_assets.pairing.filter import PAIR_SCHEMA
from sbp_assets.pairing.search import CANDIDATE_SCHEMA

Tables = dict[str, pl.DataFrame]


class Opened(Mapping[str, pl.LazyFrame]):
    """Tables by shard that count how often each was asked for."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self.times: Counter[str] = Counter()

    def __getitem__(self, shard: str) -> pl.LazyFrame:
        self.times[shard] += 1
        return self._tables[shard].lazy()

    def __contains__(self, shard: object) -> bool:
        return shard in self._tables

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)


@dataclass(frozen=True)
class World:
    documents: Tables
    embeddings: Tables
    candidates: Tables
    pairs: Tables

    def opened(self) -> dict[str, Opened]:
        return {name: Opened(tables) for name, tables in vars(self).items()}


def make_world(shards: int, of_each: int, k: int) -> World:
    """Return `of_each` documents in each shard, their exact k nearest, and all of these as pairs."""
    keys = [f"{shard:05d}" for shard in range(shards)]
    of = [key for key in keys for _ in range(of_each)]
    ids = np.array([f"d{row:04d}" for row in range(len(of))])
    vectors = np.random.default_rng(0).standard_normal((len(of), 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -2)
    nearest = np.argsort(-cosines, axis=1)[:, :k]
    candidates = pl.DataFrame(
        {
            "query_id": np.repeat(ids, k),
            "neighbor_id": ids[nearest].ravel(),
            "neighbor_shard": np.array(of)[nearest].ravel(),
            "similarity": np.take_along_axis(cosines, nearest, 1).ravel(),
            "rank": np.tile(np.arange(1, k + 1), len(of)),
        },
        schema=CANDIDATE_SCHEMA,
    )
    pairs = candidates.select(
        d1="query_id", d2="neighbor_id", d2_shard="neighbor_shard", similarity="similarity", shared_shingles=0.0
    ).cast(PAIR_SCHEMA)  # type: ignore[arg-type]
    documents = pl.DataFrame({"id": ids, "text": [f"{name} alone" for name in ids], "split": "unique"})
    return World(
        documents=by_shard(documents, of),
        embeddings=by_shard(embeddings_frame(pl.Series(ids), vectors), of),
        candidates=by_shard(candidates, np.repeat(of, k)),
        pairs=by_shard(pairs, np.repeat(of, k)),
    )


def by_shard(table: pl.DataFrame, shards: Iterable[str]) -> Tables:
    parts = table.with_columns(shard=pl.Series(list(shards))).partition_by("shard", as_dict=True, include_key=False)
    return {str(key): part for (key,), part in parts.items()}


def with_first(table: pl.DataFrame, **values: str) -> pl.DataFrame:
    """Return the table with other values in its first row."""
    first = pl.int_range(pl.len()) == 0
    return table.with_columns(
        **{name: pl.when(first).then(pl.lit(value)).otherwise(name) for name, value in values.items()}
    )
