"""What the checks of the search verify, as plain functions like those of `audit`: quantisers, indexes, candidates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

from sbp_assets.pairing.audit import (
    NORM_TOLERANCE,
    PAIRS_SAMPLE,
    SIMILARITY_TOLERANCE,
    Result,
    sampled_shards,
    seed_of,
    some,
    unknown_ids,
)
from sbp_assets.pairing.embed import vectors_of
from sbp_assets.pairing.index import ShardIndex, index_digest
from sbp_assets.pairing.quantizer import Quantizer
from sbp_assets.pairing.search import CODED_PER_NEIGHBOR, Coverage, exact_neighbors, recall
from sbp_assets.settings import Pairing
from sbp_assets.storage.paths import read_table
from sbp_assets.storage.progress import Progress

# A corpus that has grown so much would have twice the cells. So much less near to the centres of their cells than those
# of the fit are documents of another kind, which share few cells with their neighbours.
MAX_GROWTH, MAX_LOST_SIMILARITY = 4.0, 0.05
# One byte per component keeps a cosine of 0.9999 and more. Later documents may lie outside of the sample's ranges, and
# a vector that centring leaves nothing of has no direction.
CODED_SAMPLE, MIN_CODE_COSINE, MAX_LOST = 100, 0.99, 0.05
RECALL_SAMPLE, MIN_RECALL = 50, 0.95
# So far the order of two neighbours may be that of the stored bytes. Where few neighbours lie in the shards that are
# read, one such pair at the end of a list would be a missing neighbour (seen with 5 documents of D a shard).
QUANTISATION = 0.005
REFIT = "fit the quantisers to the present documents: `sbp run --refit`"
LOW_RECALL = "where pairing.index is ivf, raise pairing.nprobe: a query finds only what its cells hold"


def check_drift(quantizer: Quantizer, embeddings: Mapping[str, pl.LazyFrame]) -> Result:
    """Return whether D, whose embeddings are tables by shard, has grown or moved little since the fit."""
    with Progress("sample", "shards") as progress:
        found = quantizer.drift(embeddings, progress)
    passed = found["growth"] < MAX_GROWTH and found["lost_similarity"] < MAX_LOST_SIMILARITY
    return passed, {**found, "advice": "" if passed else REFIT}


def check_quantizer(quantizer: Quantizer, embeddings: Mapping[str, pl.LazyFrame], others: int) -> Result:
    """Return whether codes keep the directions of a sample of vectors, of `others` shards, and these are in all cells.

    Raises ValueError where the vectors have other dimensions.
    """
    few = sampled_shards("quantizer", embeddings, others)
    parts = [quantizer.prepared(vectors_of(embeddings[shard].head(CODED_SAMPLE).collect())) for shard in few]
    vectors = np.concatenate(parts)
    decoded = quantizer.decoded(quantizer.codes(vectors))
    norms = np.linalg.norm(decoded, axis=1) * np.linalg.norm(vectors, axis=1)
    cosines = np.divide((decoded * vectors).sum(axis=1), norms, out=np.zeros(len(vectors)), where=norms > 0)
    centres = quantizer.centres()
    lost = int((cosines < MIN_CODE_COSINE).sum())
    return lost <= MAX_LOST * len(vectors) and bool(np.isfinite(centres).all()), {
        "sample": len(vectors),
        "directions_lost": lost,
        "advice": "" if lost <= MAX_LOST * len(vectors) else REFIT,
        "least_cosine": float(cosines.min(initial=1.0)),
        "cells": len(centres),
        "cells_that_are_not_finite": int((~np.isfinite(centres).all(axis=1)).sum()),
    }


def check_index(directory: Path, embeddings: pl.DataFrame, quantizer: Quantizer, nprobe: int) -> Result:
    """Return whether the index has the documents of `embeddings`, each with its vector, code, and `nprobe` cells."""
    index = ShardIndex.open(directory)
    expected = pl.DataFrame({"id": embeddings["id"]}).with_row_index("row")
    joined = index.keys.select("id", "cell").join(expected, on="id", how="left", maintain_order="left")
    same = len(joined) == len(embeddings) and not joined["row"].null_count() and joined["id"].n_unique() == len(joined)
    wrong = np.zeros(len(joined), bool)
    if same:
        prepared = quantizer.prepared(vectors_of(embeddings))[joined["row"].to_numpy()]
        wrong |= (np.abs(prepared - index.vectors) > NORM_TOLERANCE).any(axis=1)
        wrong |= (quantizer.codes(prepared) != index.codes).any(axis=1)
        cells = quantizer.nearest_cells(prepared, nprobe)[1]
        wrong |= cells[:, 0] != joined["cell"].to_numpy()
        wrong |= (cells != index.probes).any(axis=1) if cells.shape == index.probes.shape else True
    ordered = index.keys.equals(index.keys.sort("cell", "salt", "id"))
    return same and ordered and not wrong.any(), {
        "keys": len(index.keys),
        "embeddings": len(embeddings),
        "same_ids": int(same),
        "in_order": int(ordered),
        "keys_of_other_vectors": int(wrong.sum()),
        "offending_ids": some(joined["id"].filter(pl.Series(wrong))),
    }


def check_partials(directory: Path, indexes: Mapping[str, Path], block: str, settings: Pairing, others: int) -> Result:
    """Return whether a block's tables are there, of the present keys, and have no neighbour that cannot be.

    Of `others` shards the tables are read: no more than there are to be of a document, none of itself, and of a sample,
    whose neighbours are in the shards that are read, the similarities.
    """
    covered = Coverage.of(directory)
    versions = {shard: index_digest(index) for shard, index in indexes.items()}
    missing = [shard for shard in indexes if not (directory / f"{shard}.parquet").exists()]
    few = [shard for shard in sampled_shards(f"block {block}", indexes, others) if shard not in missing]
    opened = {shard: ShardIndex.open(indexes[shard]) for shard in few}
    most = CODED_PER_NEIGHBOR * settings.neighbors
    many, itself, unlike = (list[pl.Series]() for _ in range(3))
    read = 0
    for shard in few:
        rows = read_table(directory / f"{shard}.parquet")
        read += len(rows)
        many.append(rows.group_by("query_id").len().filter(pl.col("len") > most)["query_id"])
        itself.append(rows.filter(pl.col("query_id") == pl.col("neighbor_id"))["query_id"])
        rows = rows.filter(pl.col("neighbor_shard").is_in(few))
        rows = rows.sample(min(PAIRS_SAMPLE, len(rows)), seed=seed_of(shard))
        for (key,), part in rows.partition_by("neighbor_shard", as_dict=True).items():
            queries, keys = opened[shard].vectors_of(part["query_id"]), opened[str(key)].vectors_of(part["neighbor_id"])
            found = (queries * keys).sum(axis=1)
            unlike.append(part["query_id"].filter(~pl.Series(np.abs(found - part["similarity"].to_numpy()) < 1e-4)))
    faults = {
        "tables_missing": len(missing),
        "of_other_keys": int(covered.keys != versions),
        "documents_with_too_many": sum(map(len, many)),
        "own_neighbors": sum(map(len, itself)),
        "similarities_not_of_the_vectors": sum(map(len, unlike)),
    }
    return not any(faults.values()), {
        **faults,
        "shards_read": len(few),
        "candidates_read": read,
        "offending_ids": some(*many, *itself, *unlike),
    }


def check_candidates(
    candidates: pl.DataFrame,
    queries: pl.DataFrame,
    embeddings: Mapping[str, pl.LazyFrame],
    shard: str,
    quantizer: Quantizer,
    k: int,
    others: int,
) -> Result:
    """Return whether ranks are 1 … k, none is its own neighbour, ids are known, and similarities fall with the rank.

    On a sample, recall@k and similarities are compared with those of exact search. `embeddings` are tables by shard,
    `queries` that of the candidates' own `shard`. Beside it `others` shards are read; other ids are not looked up.
    Where those read hold no more than k documents, how many ranks are possible is not known: all have the same number.
    """
    few = sampled_shards(shard, embeddings, others)
    known = {shard: queries["id"], **{key: embeddings[key].select("id").collect()["id"] for key in few}}
    ranks = candidates.group_by("query_id").agg(n=pl.len(), ranks=pl.col("rank").sort())
    least = max(0, min(k, sum(map(len, known.values())) - 1))
    most = least if len(known) == len(embeddings) else k
    expected = min(max(least, ranks["n"].max() or 0), most)  # type: ignore[type-var]
    short = len(queries) - len(ranks) if expected else 0
    whole = pl.int_ranges(1, pl.col("n") + 1).cast(pl.List(pl.Int64))
    bad_ranks = ranks.filter((pl.col("n") != expected) | (pl.col("ranks") != whole))
    itself = candidates.filter(pl.col("query_id") == pl.col("neighbor_id"))
    outside = candidates.filter(~pl.col("similarity").is_between(-1, 1))
    rising = candidates.sort("query_id", "rank").filter(pl.col("similarity").diff().over("query_id") > 0)
    references = pl.concat(
        [
            candidates.select(id="query_id", shard=pl.lit(shard)),
            candidates.select(id="neighbor_id", shard="neighbor_shard"),
        ]
    )
    unknown = unknown_ids(references, known, embeddings)
    sample = queries.sample(min(RECALL_SAMPLE, len(queries)), seed=seed_of(shard))
    read = {shard: queries.lazy(), **{key: embeddings[key] for key in few}}
    exact = exact_neighbors(sample["id"].to_list(), quantizer.prepared(vectors_of(sample)), read, k, quantizer)
    found = recall(candidates, exact, k, QUANTISATION)
    ground_truth = pl.concat(
        [near.with_columns(query_id=pl.lit(query)) for query, near in exact.items()] or [candidates[:0]]
    )
    both = candidates.join(ground_truth, on=["query_id", "neighbor_id"], suffix="_exact")
    inexact = both.filter(~((pl.col("similarity") - pl.col("similarity_exact")).abs() <= SIMILARITY_TOLERANCE))
    faults = (bad_ranks, itself, outside, rising, unknown, inexact)
    return not short and all(rows.is_empty() for rows in faults) and found >= MIN_RECALL, {
        "queries_without_neighbors": short,
        "queries_with_wrong_ranks": len(bad_ranks),
        "own_neighbors": len(itself),
        "similarities_out_of_range": len(outside),
        "similarities_rising_with_rank": len(rising),
        "similarities_not_of_the_vectors": len(inexact),
        "unknown_ids": len(unknown),
        f"recall_at_{k}": found,
        "advice": "" if found >= MIN_RECALL and not short and bad_ranks.is_empty() else LOW_RECALL,
        "recall_sample": len(sample),
        "shards_read": len(read),
        "offending_ids": some(
            bad_ranks["query_id"],
            itself["query_id"],
            outside["query_id"],
            rising["query_id"],
            inexact["query_id"],
            unknown,
        ),
    }
