"""The query side: one shard's documents against the index of every key shard, in bounded memory.

Sides are asymmetric: a query keeps its float vector, a key is 8-bit codes. One index is in memory at a time, and per
query only the best k so far. Each query shard starts at another key shard, so that shards searched at the same time
do not all read the same file, as salted keys do in a shuffle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

from sbp_assets.pairing.embed import vectors_of
from sbp_assets.pairing.index import KeyShard
from sbp_assets.storage.columns import Column, table_schema
from sbp_assets.storage.progress import Progress

_VECTORS = "pairing/ann_index.vector pairing/embeddings.vector"
CANDIDATE_COLUMNS = [
    Column("query_id", pl.String, "Document of this shard.", "pairing/embeddings.id"),
    Column(
        "neighbor_id",
        pl.String,
        "One of its nearest documents in the whole of D, never itself.",
        "pairing/ann_index.id",
    ),
    Column("neighbor_shard", pl.String, "Shard of that document."),
    Column("similarity", pl.Float32, "Cosine, -1 to 1; the neighbour's side is 8-bit.", _VECTORS),
    Column("rank", pl.Int64, "1 is the nearest.", _VECTORS),
]
CANDIDATE_SCHEMA = table_schema(CANDIDATE_COLUMNS)

# Queries per call: bounds the hits held beside the running top-k to block x (k + 1) rows.
_BLOCK = 2048


def reading_order(shards: list[str], query_shard: str) -> list[str]:
    """Return `shards` rotated to a start that depends on the query shard; search results do not depend on the order."""
    if not shards:
        return []
    start = int(hashlib.sha256(query_shard.encode()).hexdigest(), 16) % len(shards)
    return shards[start:] + shards[:start]


def merge(best: pl.DataFrame, found: pl.DataFrame, k: int) -> pl.DataFrame:
    """Return the k best rows per query of both tables (query, neighbor_id, neighbor_shard, similarity), best first.

    Ties go to the smaller neighbor_id, so the result depends neither on the order of shards nor on their number.
    """
    rows = pl.concat([best, found]).sort(["query", "similarity", "neighbor_id"], descending=[False, True, False])
    return rows.group_by("query", maintain_order=True).head(k).select(best.columns)


def search(
    query_ids: pl.Series,
    queries: np.ndarray,
    keys: Mapping[str, Path],
    k: int,
    nprobe: int,
    query_shard: str,
    progress: Progress,
) -> pl.DataFrame:
    """Return the candidates (CANDIDATE_COLUMNS) of a query shard: each document's k nearest others over all key shards.

    queries: (rows, dim) float32 of unit length. keys: index directory of every shard. Similarity is the cosine of the
    query and the key's 8-bit codes, clamped to [-1, 1]. Advances `progress` by query × key-shard searches.
    """
    best = pl.DataFrame(
        schema={"query": pl.UInt32, "neighbor_id": pl.String, "neighbor_shard": pl.String, "similarity": pl.Float32}
    )
    for shard in reading_order(sorted(keys), query_shard):
        key = KeyShard.load(keys[shard], nprobe).without_excess(k)
        for start in range(0, len(queries), _BLOCK):
            block = queries[start : start + _BLOCK]
            found = _nearest(key, block, k).with_columns(
                (pl.col("query") + start).cast(pl.UInt32), neighbor_shard=pl.lit(shard)
            )
            itself = query_ids.gather(found["query"])
            best = merge(best, found.filter(found["neighbor_id"] != itself).select(best.columns), k)
            progress.advance(len(block))
    return best.select(
        query_id=query_ids.gather(best["query"]),
        neighbor_id="neighbor_id",
        neighbor_shard="neighbor_shard",
        similarity="similarity",
        rank=pl.int_range(1, pl.len() + 1).over("query").cast(pl.Int64),
    ).cast(CANDIDATE_SCHEMA)


def exact_neighbors(
    query_ids: list[str], queries: np.ndarray, embeddings: Mapping[str, pl.LazyFrame], k: int
) -> dict[str, pl.DataFrame]:
    """Return the ground truth of a few queries: by id the exact k nearest (neighbor_id, similarity) of float vectors.

    Reads one shard's vectors at a time.
    """
    empty = pl.DataFrame(schema={"neighbor_id": pl.String, "similarity": pl.Float32})
    best = dict.fromkeys(query_ids, empty)
    for frame in embeddings.values():
        shard = frame.collect()
        scores = queries @ vectors_of(shard).T
        for row, query in enumerate(query_ids):
            found = pl.DataFrame({"neighbor_id": shard["id"], "similarity": pl.Series(scores[row], dtype=pl.Float32)})
            rows = pl.concat([best[query], found.filter(pl.col("neighbor_id") != query)])
            best[query] = rows.sort(["similarity", "neighbor_id"], descending=[True, False]).head(k)
    return best


def recall(candidates: pl.DataFrame, exact: Mapping[str, pl.DataFrame], k: int, tolerance: float = 0.0) -> float:
    """Return the mean recall@k of the queries of `exact`, which may cover some key shards; 1 without neighbours.

    An exact neighbour counts as relevant when it is nearer than the last of the query's k candidates, by more than
    `tolerance` where it is missing: with every key shard in `exact` these are the true k nearest.
    """
    shares = []
    for query, near in exact.items():
        mine = candidates.filter(pl.col("query_id") == query)
        farthest = mine["similarity"].min() if len(mine) >= k else -2.0
        found = pl.col("neighbor_id").is_in(mine["neighbor_id"].implode())
        relevant = near.filter(found | (pl.col("similarity") - tolerance > farthest))
        if len(relevant):
            shares.append(relevant.filter(found).height / len(relevant))
    return float(np.mean(shares)) if shares else 1.0


def _nearest(key: KeyShard, queries: np.ndarray, k: int) -> pl.DataFrame:
    total = key.index.ntotal
    # One more for the query itself. A tie across the cut would leave the choice to FAISS's heap: then look further, for
    # that query alone, as in a block of many some query has a tie at any cut.
    look, left, fetch = key.searcher(queries), np.arange(len(queries)), min(k + 1, total)
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]
    while fetch and len(left):
        similarity, row = look(left, min(fetch + 1, total))
        if fetch < total:
            tied = (row[:, fetch] >= 0) & (similarity[:, fetch - 1] == similarity[:, fetch])
        else:
            tied = np.zeros(len(left), dtype=bool)
        query, rank = np.nonzero((row >= 0) & ~tied[:, None])
        found.append((left[query], row[query, rank], similarity[query, rank]))
        left, fetch = left[tied], min(2 * fetch, total)
    query, row, similarity = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return pl.DataFrame(
        {
            "query": query.astype(np.uint32),
            "neighbor_id": key.ids.gather(row),
            "similarity": np.clip(similarity, -1, 1).astype(np.float32),
        },
        schema_overrides={"neighbor_id": pl.String},
    )
