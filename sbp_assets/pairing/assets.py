"""The pairing stage (paper section 2.1) embeds documents, indexes and searches them, and filters pairs."""

from pathlib import Path

import dagster as dg
import polars as pl

from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.corpus.split import UNIQUE
from sbp_assets.dagster_support.partitions import ALL, shards
from sbp_assets.dagster_support.preview import table_preview
from sbp_assets.dagster_support.stage import for_settings
from sbp_assets.pairing import ground_truth
from sbp_assets.pairing.embed import EMBEDDING_COLUMNS, Embedder, embed, embeddings_frame, vectors_of
from sbp_assets.pairing.filter import PAIR_COLUMNS, filter_pairs, histogram, histogram_markdown, texts_of
from sbp_assets.pairing.index import INDEX_COLUMNS, build_index, write_index
from sbp_assets.pairing.search import CANDIDATE_COLUMNS, search
from sbp_assets.settings import Settings
from sbp_assets.storage.artifacts import staging
from sbp_assets.storage.column_metadata import column_metadata
from sbp_assets.storage.progress import Progress

# The settings that vectors depend on, then candidates, then pairs.
_EMBEDDING = ("pairing.embedding_model", "pairing.embedding_dtype", "pairing.embedding_prompt", "pairing.max_tokens")
_SEARCH = ("pairing.index", "pairing.nprobe", "pairing.neighbors")
_FILTER = (
    "pairing.min_similarity",
    "pairing.max_similarity",
    "pairing.shingle_tokens",
    "pairing.max_shared_shingles",
    "pairing.max_pairs_per_document",
    "pairing.both_directions",
)


@for_settings(
    lambda settings: dg.asset(
        kinds={"huggingface", "parquet"},
        partitions_def=shards(settings),
        io_manager_key="parquet",
        ins={"documents": dg.AssetIn(["corpus", "documents"])},
        pool="device",
        code_version=settings.experiment.version("2", *_EMBEDDING),
        metadata=column_metadata(EMBEDDING_COLUMNS),
    )
)
def embeddings(
    settings: dg.ResourceParam[Settings], embedder: dg.ResourceParam[Embedder], documents: pl.LazyFrame
) -> dg.MaterializeResult:
    """The table has one row per document of D (split `unique`): the unit vector of its text."""
    pairing = settings.experiment.pairing
    rows = documents.filter(pl.col("split") == UNIQUE).select("id", "text").sort("id").collect()
    engine = embedder.load(pairing.embedding_model, pairing.embedding_dtype, settings.deployment.device)
    with Progress("embed", "documents", len(rows)) as progress:
        vectors = embed(
            engine,
            rows["text"].to_list(),
            pairing.max_tokens,
            settings.deployment.embedding_batch_size,
            progress,
            pairing.embedding_prompt,
        )
    return dg.MaterializeResult(
        value=embeddings_frame(rows["id"], vectors),
        metadata={
            "dagster/row_count": len(rows),
            "dimensions": vectors.shape[1],
            "engine_startup_seconds": round(engine.startup_seconds, 3),
            "engine_reused": engine.reused,
            "device": str(engine.model.device),
            **progress.metadata(),
        },
    )


@for_settings(
    lambda settings: dg.asset(
        kinds={"faiss"},
        partitions_def=shards(settings),
        io_manager_key="directory",
        ins={"embeddings": dg.AssetIn(["pairing", "embeddings"])},
        code_version=settings.experiment.version("2", "pairing.index"),
        metadata=column_metadata(INDEX_COLUMNS),
    )
)
def ann_index(
    context: dg.AssetExecutionContext, settings: dg.ResourceParam[Settings], embeddings: pl.LazyFrame
) -> dg.MaterializeResult:
    """The directory holds the key side of one shard's search.

    `index.faiss` has the vectors, one byte per component; `ids.parquet` has the ids of its rows.
    """
    directory = staging(settings.deployment.work_dir, "ann_index", context.partition_key)
    rows = embeddings.collect()
    with Progress("index", "vectors", len(rows)) as progress:
        index = build_index(vectors_of(rows), settings.experiment.pairing.index)
        write_index(directory, index, rows["id"])
        progress.advance(len(rows))
    return dg.MaterializeResult(
        value=directory,
        metadata={
            "vectors": index.ntotal,
            "dimensions": index.d,
            "cells": getattr(index, "nlist", 1),
            **progress.metadata(),
        },
    )


@for_settings(
    lambda settings: dg.asset(
        kinds={"faiss", "parquet"},
        partitions_def=shards(settings),
        io_manager_key="parquet",
        ins={
            "embeddings": dg.AssetIn(["pairing", "embeddings"], partition_mapping=ALL),
            "indexes": dg.AssetIn(["pairing", "ann_index"], partition_mapping=ALL),
        },
        pool="memory",
        code_version=settings.experiment.version("1", *_SEARCH),
        metadata=column_metadata(CANDIDATE_COLUMNS),
    )
)
def neighbor_candidates(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    embeddings: dict[str, pl.LazyFrame],
    indexes: dict[str, Path],
) -> dg.MaterializeResult[pl.DataFrame]:
    """The table has one row per document of this shard and neighbour: its k nearest documents over all shards."""
    pairing = settings.experiment.pairing
    rows = embeddings[context.partition_key].collect()
    with Progress("search", "queries", len(rows) * len(indexes)) as progress:
        candidates = search(
            rows["id"], vectors_of(rows), indexes, pairing.neighbors, pairing.nprobe, context.partition_key, progress
        )
    nearest = candidates.filter(pl.col("rank") == 1)["similarity"]
    return dg.MaterializeResult(
        value=candidates,
        metadata={
            "dagster/row_count": len(candidates),
            "queries": len(rows),
            "key_shards": len(indexes),
            **_quantiles(nearest, "nearest_similarity"),
            "similarity": dg.MetadataValue.md(histogram_markdown(histogram(candidates["similarity"]), "candidates")),
            **progress.metadata(),
        },
    )


@for_settings(
    lambda settings: dg.asset(
        kinds={"polars", "parquet"},
        partitions_def=shards(settings),
        io_manager_key="parquet",
        ins={
            "candidates": dg.AssetIn(["pairing", "neighbor_candidates"], partition_mapping=ALL),
            "documents": dg.AssetIn(["corpus", "documents"], partition_mapping=ALL),
        },
        code_version=settings.experiment.version("2", *_FILTER),
        metadata=column_metadata(PAIR_COLUMNS),
    )
)
def neighbor_pairs(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    candidates: dict[str, pl.LazyFrame],
    documents: dict[str, pl.LazyFrame],
) -> dg.MaterializeResult[pl.DataFrame]:
    """The table has one row per training pair (d1, d2) with d1 in this shard: related, no near-copies, hubs capped."""
    shard = context.partition_key
    with Progress("filter", "pairs") as progress:
        pairs, counts = filter_pairs(candidates, documents, shard, settings.experiment.pairing, progress)
    return dg.MaterializeResult(
        value=pairs,
        metadata={
            "dagster/row_count": len(pairs),
            **counts,
            "documents_with_pairs": pairs["d1"].n_unique(),
            "pairs_across_shards": pairs.filter(pl.col("d2_shard") != shard).height,
            **_quantiles(pairs["similarity"], "similarity"),
            "funnel": dg.MetadataValue.md(_funnel(counts)),
            "similarity": dg.MetadataValue.md(histogram_markdown(histogram(pairs["similarity"]))),
            "preview": dg.MetadataValue.md(_side_by_side(pairs, documents, shard)),
            **progress.metadata(),
        },
    )


@for_settings(
    lambda settings: dg.asset(
        kinds={"polars", "parquet"},
        io_manager_key="parquet",
        ins={
            "neighbor_pairs": dg.AssetIn(["pairing", "neighbor_pairs"], partition_mapping=ALL),
            "documents": dg.AssetIn(["corpus", "documents"], partition_mapping=ALL),
        },
        code_version=settings.experiment.version("1", "truth", "pairing.max_pairs_per_document"),
        metadata=column_metadata(ground_truth.PAIR_TRUTH_COLUMNS),
    )
)
def pair_truth(
    settings: dg.ResourceParam[Settings], neighbor_pairs: dict[str, pl.LazyFrame], documents: dict[str, pl.LazyFrame]
) -> dg.MaterializeResult[pl.DataFrame]:
    """The table has precision and recall of the pairs as pairs about one concept: a row per shard of d1, and `all`.

    It is empty for every source but `concepts`, the only one whose ground truth is known.
    """
    concepts = settings.experiment.ground_truth
    with Progress("pair_truth", "shards", len(neighbor_pairs)) as progress:
        if concepts:
            cap = settings.experiment.pairing.max_pairs_per_document
            table = ground_truth.pair_truth(neighbor_pairs, documents, ConceptWorld(concepts), cap)
        else:
            table = pl.DataFrame(schema=ground_truth.PAIR_TRUTH_SCHEMA)
        progress.advance(len(neighbor_pairs))
    overall = table.filter(shard=ground_truth.OVERALL).select(list(ground_truth.SHARES)).to_dicts()
    definitions = "\n".join(f"- **{name}**: {text}" for name, text in ground_truth.DEFINITIONS.items())
    metadata: dict[str, dg.RawMetadataValue] = {
        "dagster/row_count": len(table),
        **{name: value for row in overall for name, value in row.items() if value is not None},
        **progress.metadata(),
        "definitions": dg.MetadataValue.md(definitions),
        "preview": dg.MetadataValue.md(
            table_preview(table) if concepts else "Not known for this corpus: only `concepts` has a ground truth."
        ),
    }
    return dg.MaterializeResult(value=table, metadata=metadata)


def _quantiles(values: pl.Series, name: str) -> dict[str, float]:
    if values.is_empty():
        return {}
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    return {
        f"{name}_p{round(100 * share)}": round(float(values.quantile(share, "nearest") or 0), 4) for share in shares
    }


def _funnel(counts: dict[str, int]) -> str:
    steps = [("nearest neighbours", counts["candidates"], counts["candidates"])]
    left = counts["candidates"]
    for label, key, sign in (
        ("found from the other side", "reversed", 1),
        ("below min_similarity", "too_dissimilar", -1),
        ("above max_similarity", "too_similar", -1),
        ("near-copies", "near_copies", -1),
        ("over the cap as d2", "over_d2_cap", -1),
        ("over the cap as d1", "over_d1_cap", -1),
    ):
        left += sign * counts[key]
        steps.append((label, sign * counts[key], left))
    return "| step | change | left |\n|---|---:|---:|\n" + "\n".join(f"| {a} | {b:+,} | {c:,} |" for a, b, c in steps)


def _side_by_side(pairs: pl.DataFrame, documents: dict[str, pl.LazyFrame], shard: str, rows: int = 6) -> str:
    # Evenly over the range of similarities, as the least similar pairs tell most.
    falling = pairs.sort(["similarity", "d1", "d2"], descending=[True, False, False])
    sample = falling.gather_every(max(1, len(pairs) // rows)).head(rows)
    first = texts_of(sample["d1"], documents[shard])
    second: dict[str, str] = {}
    for (key,), part in sample.partition_by("d2_shard", as_dict=True).items():
        second |= texts_of(part["d2"], documents[str(key)])
    return table_preview(
        sample.select(
            "similarity",
            "shared_shingles",
            seed=pl.Series([first[i] for i in sample["d1"]], dtype=pl.String),
            related=pl.Series([second[i] for i in sample["d2"]], dtype=pl.String),
        )
    )
