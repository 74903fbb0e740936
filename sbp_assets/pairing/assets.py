"""The pairing stage (paper section 2.1) embeds documents, indexes and searches them, and filters pairs."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import dagster as dg
import polars as pl
from pydantic import Field

from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.dagster_support.check_results import last_check_failed, last_version
from sbp_assets.dagster_support.partitions import ALL, key_blocks, shards
from sbp_assets.dagster_support.preview import table_preview
from sbp_assets.dagster_support.stage import for_settings
from sbp_assets.fan_out import Engine, PublishedFiles, tasks_of
from sbp_assets.pairing import ground_truth
from sbp_assets.pairing.embed import EMBEDDING_COLUMNS, Embedder, vectors_of
from sbp_assets.pairing.figures import funnel, histogram, histogram_markdown, quantiles, side_by_side
from sbp_assets.pairing.filter import (
    EDGE_COLUMNS,
    EDGES_FILE,
    PAIR_COLUMNS,
    bucket_edges,
    bucket_shards,
    shard_pairs,
)
from sbp_assets.pairing.index import INDEX_COLUMNS, write_index
from sbp_assets.pairing.quantizer import QUANTIZER_COLUMNS, Quantizer, fit, may_stay
from sbp_assets.pairing.search import (
    CANDIDATE_COLUMNS,
    PARTIAL_COLUMNS,
    assemble,
    merge,
    partial_tables,
    search_fingerprint,
)
from sbp_assets.pairing.tasks import (
    EMBEDDINGS_FILE,
    EmbeddingTask,
    SearchTask,
    current_coverage,
    embed_shard,
    search_block,
    staged_tables,
)
from sbp_assets.settings import Settings
from sbp_assets.settings.formats import memory_bytes
from sbp_assets.storage.artifacts import content_version, release_staging, staging
from sbp_assets.storage.column_metadata import column_metadata
from sbp_assets.storage.io_managers import DirectoryIOManager
from sbp_assets.storage.paths import read_table
from sbp_assets.storage.progress import Progress
from sbp_assets.storage.remote import CorruptedArtifactError

# The settings that vectors depend on, then candidates, then pairs.
_EMBEDDING = ("pairing.embedding_model", "pairing.embedding_dtype", "pairing.embedding_prompt", "pairing.max_tokens")
_QUANTIZER = ("pairing.index", "pairing.centring")
_EDGES = (
    "pairing.min_similarity",
    "pairing.max_similarity",
    "pairing.shingle_tokens",
    "pairing.max_shared_shingles",
    "pairing.max_pairs_per_document",
    "pairing.both_directions",
)
# What the quantisers are fitted for: while these stay, they do, whatever is added to the corpus.
_PINNED = ("corpus.source", "corpus.dedup", "corpus.split", *_EMBEDDING, *_QUANTIZER)
# Revisions of the code of assets, which also decide what is made of an earlier artifact of theirs.
_EMBEDDING_CODE, _QUANTIZER_CODE, _SEARCH_CODE = "2", "1", "1"

_DOCUMENTS = dg.AssetKey(["corpus", "documents"])


@for_settings(
    lambda settings: dg.asset(
        kinds={"huggingface", "parquet"},
        partitions_def=shards(settings),
        io_manager_key="parquet",
        deps=[["corpus", "documents"]],
        pool="device",
        code_version=settings.experiment.version(_EMBEDDING_CODE, *_EMBEDDING),
        metadata=column_metadata(EMBEDDING_COLUMNS),
    )
)
def embeddings(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    fan_out: dg.ResourceParam[Engine],
    embedder: dg.ResourceParam[Embedder],
) -> dg.MaterializeResult:
    """The table has one row per document of D (split `unique`): the unit vector of its text."""
    pairing, deployment, shard = settings.experiment.pairing, settings.deployment, context.partition_key
    store, own = PublishedFiles.of(deployment), PublishedFiles.of(deployment, "pairing/embeddings")
    code = settings.experiment.version(_EMBEDDING_CODE, *_EMBEDDING)

    def tasks(shards: Sequence[str]) -> Iterator[tuple[str, tuple[EmbeddingTask]]]:
        for one in shards:
            # Of documents that nothing is recorded of, only what this run has made is taken.
            documents = last_version(context.instance, _DOCUMENTS, one)
            made = own.staged_for(one, code=code, documents=documents or context.run.run_id)
            device, size = deployment.device, deployment.embedding_batch_size
            yield one, (EmbeddingTask(one, pairing, device, size, embedder, store, made, documents),)

    running = tasks_of(context)
    gpus = 1 if deployment.device == "cuda" else 0
    found = running.result(shard, fan_out, embed_shard, tasks, what="embed", cpus=None, gpus=gpus)
    running.when_recorded(shard, found.files.remove)
    return dg.MaterializeResult(value=found.files.fetch(EMBEDDINGS_FILE), metadata=found.figures)


class QuantizerConfig(dg.Config):
    """Configuration of a run that materialises the quantisers."""

    refit: bool = Field(
        default=False,
        description="Whether they are fitted again, to the present documents, which re-materialises what comes after.",
    )


@for_settings(
    lambda settings: dg.asset(
        kinds={"faiss"},
        io_manager_key="directory",
        ins={"embeddings": dg.AssetIn(["pairing", "embeddings"], partition_mapping=ALL)},
        pool="memory",
        code_version=settings.experiment.version(_QUANTIZER_CODE, *_QUANTIZER),
        metadata=column_metadata(QUANTIZER_COLUMNS),
    )
)
def quantizer(
    context: dg.AssetExecutionContext,
    config: QuantizerConfig,
    settings: dg.ResourceParam[Settings],
    directory: dg.ResourceParam[DirectoryIOManager],
    embeddings: dict[str, pl.LazyFrame],
) -> dg.MaterializeResult[Path]:
    """The directory holds what all shards share of the search: ranges of the bytes, centres of the cells, the centring.

    It is fitted once to a sample of D and then stays, so that one more shard changes no code of another.
    """
    made_for = settings.experiment.version(f"{_QUANTIZER_CODE}-{_EMBEDDING_CODE}", *_PINNED)
    earlier = None if config.refit else _last_artifact(context, directory, "quantizer", "codes_keep_directions")
    if earlier and not may_stay(earlier, made_for):
        earlier = None
    if not earlier:
        context.log.info("The quantisers are fitted to the present documents; indexes and pairs change with them.")
    staged = staging(settings.deployment.work_dir, "quantizer")
    with Progress("fit quantizer", "shards") as progress:
        if earlier:
            shutil.copytree(earlier, staged, dirs_exist_ok=True)
        else:
            fit(embeddings, settings.experiment.pairing, progress).save(staged, made_for)
    made = Quantizer.load(staged)
    return dg.MaterializeResult(
        value=staged,
        metadata={
            "refitted": earlier is None,
            "documents": made.documents,
            "sample": made.sampled,
            "cells": made.cells,
            "dimensions": made.dimensions,
            "centre_similarity": made.centre_similarity,
            **progress.metadata(),
        },
    )


@for_settings(
    lambda settings: dg.asset(
        kinds={"faiss"},
        partitions_def=shards(settings),
        io_manager_key="directory",
        ins={
            "quantizer": dg.AssetIn(["pairing", "quantizer"]),
            "embeddings": dg.AssetIn(["pairing", "embeddings"]),
        },
        code_version=settings.experiment.version("4", "pairing.nprobe"),
        metadata=column_metadata(INDEX_COLUMNS),
    )
)
def ann_index(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    quantizer: Path,
    embeddings: pl.LazyFrame,
) -> dg.MaterializeResult[Path]:
    """The directory holds the documents of one shard as keys and queries: codes, vectors, and cells to be searched."""
    staged = staging(settings.deployment.work_dir, "ann_index", context.partition_key)
    rows = embeddings.collect()
    with Progress("index", "vectors", len(rows)) as progress:
        cells = write_index(
            staged,
            context.partition_key,
            rows["id"],
            vectors_of(rows),
            Quantizer.load(quantizer),
            settings.experiment.pairing.nprobe,
        )
        progress.advance(len(rows))
    return dg.MaterializeResult(
        value=staged,
        metadata={"vectors": len(rows), "cells_used": len(set(cells.tolist())), **progress.metadata()},
    )


@for_settings(
    lambda settings: dg.asset(
        kinds={"faiss", "parquet"},
        partitions_def=key_blocks(settings),
        io_manager_key="directory",
        ins={"quantizer": dg.AssetIn(["pairing", "quantizer"])},
        deps=[dg.AssetDep(["pairing", "ann_index"], partition_mapping=ALL)],
        pool="memory",
        code_version=settings.experiment.version(_SEARCH_CODE, "pairing.neighbors", "pairing.key_blocks"),
        metadata=column_metadata(PARTIAL_COLUMNS),
    )
)
def partial_candidates(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    fan_out: dg.ResourceParam[Engine],
    quantizer: Path,
) -> dg.MaterializeResult[Path]:
    """The directory has a table per shard: the nearest neighbours of its documents among one block of all keys.

    What a stopped run has found is resumed, and of a corpus that has grown only what is new is searched.
    """
    block, pairing, deployment = context.partition_key, settings.experiment.pairing, settings.deployment
    memory = memory_bytes(deployment.memory_per_worker)
    store, artifacts = PublishedFiles.of(deployment), PublishedFiles.of(deployment, "pairing/partial_candidates")

    def tasks(blocks: Sequence[str]) -> Iterator[tuple[str, tuple[SearchTask]]]:
        version = content_version(quantizer)
        made_of = current_coverage(
            store, settings.experiment.shard_keys, search_fingerprint(_SEARCH_CODE, version, pairing)
        )
        for one in blocks:
            tables = staged_tables(artifacts, one, made_of)
            earlier = _version_to_build_on(context, "partial_candidates", "partials_are_of_the_block", one)
            task = SearchTask(one, pairing, memory, deployment.work_dir, store, artifacts, tables, version, earlier)
            yield one, (task,)

    running = tasks_of(context)
    found = running.result(block, fan_out, search_block, tasks, what="search", cpus=None, memory=int(memory))
    staged = staging(deployment.work_dir, "partial_candidates", block)
    assemble(found.files, staged)
    running.when_recorded(block, found.files.remove)
    return dg.MaterializeResult(value=staged, metadata=found.figures)


@for_settings(
    lambda settings: dg.asset(
        kinds={"polars", "parquet"},
        partitions_def=shards(settings),
        io_manager_key="parquet",
        ins={
            "partial_candidates": dg.AssetIn(["pairing", "partial_candidates"], partition_mapping=ALL),
            "embeddings": dg.AssetIn(["pairing", "embeddings"]),
        },
        code_version=settings.experiment.version("2", "pairing.neighbors"),
        metadata=column_metadata(CANDIDATE_COLUMNS),
    )
)
def neighbor_candidates(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    partial_candidates: dict[str, Path],
    embeddings: pl.LazyFrame,
) -> dg.MaterializeResult[pl.DataFrame]:
    """The table has one row per document of this shard and neighbour: its k nearest documents over all shards."""
    ids = embeddings.select("id").collect()["id"]
    with Progress("merge candidates", "queries", len(ids)) as progress:
        partials = partial_tables(partial_candidates, context.partition_key)
        candidates = merge(partials, ids, settings.experiment.pairing.neighbors)
        progress.advance(len(ids))
    nearest = candidates.filter(pl.col("rank") == 1)["similarity"]
    return dg.MaterializeResult(
        value=candidates,
        metadata={
            "dagster/row_count": len(candidates),
            "queries": len(ids),
            "key_blocks": len(partials),
            **quantiles(nearest, "nearest_similarity"),
            "similarity": dg.MetadataValue.md(histogram_markdown(histogram(candidates["similarity"]), "candidates")),
            **progress.metadata(),
        },
    )


@for_settings(
    lambda settings: dg.asset(
        kinds={"duckdb", "parquet"},
        partitions_def=key_blocks(settings),
        io_manager_key="directory",
        ins={
            "candidates": dg.AssetIn(["pairing", "neighbor_candidates"], partition_mapping=ALL),
            "documents": dg.AssetIn(["corpus", "documents"], partition_mapping=ALL),
        },
        pool="memory",
        code_version=settings.experiment.version("1", *_EDGES, "pairing.key_blocks"),
        metadata=column_metadata(EDGE_COLUMNS),
    )
)
def neighbor_edges(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    candidates: dict[str, Path],
    documents: dict[str, Path],
) -> dg.MaterializeResult[Path]:
    """The directory has the pairs whose d2 is in some of the shards: related, no near-copies, hubs as d2 capped."""
    block, pairing = context.partition_key, settings.experiment.pairing
    staged = staging(settings.deployment.work_dir, "neighbor_edges", block)
    bucket = bucket_shards(settings.experiment.shard_keys, int(block), pairing.key_blocks)
    with Progress("filter", "pairs") as progress:
        limit = settings.deployment.memory_limit
        counts = bucket_edges(candidates, documents, bucket, pairing, staged, limit, progress)
    similarity = read_table(staged / EDGES_FILE, ["similarity"])["similarity"]
    return dg.MaterializeResult(
        value=staged,
        metadata={
            **counts,
            "shards_of_d2": len(bucket),
            "similarity": dg.MetadataValue.md(histogram_markdown(histogram(similarity))),
            **progress.metadata(),
        },
    )


@for_settings(
    lambda settings: dg.asset(
        kinds={"polars", "parquet"},
        partitions_def=shards(settings),
        io_manager_key="parquet",
        ins={
            "edges": dg.AssetIn(["pairing", "neighbor_edges"], partition_mapping=ALL),
            "documents": dg.AssetIn(["corpus", "documents"]),
        },
        code_version=settings.experiment.version("3", "pairing.max_pairs_per_document"),
        metadata=column_metadata(PAIR_COLUMNS),
    )
)
def neighbor_pairs(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    edges: dict[str, Path],
    documents: pl.LazyFrame,
) -> dg.MaterializeResult[pl.DataFrame]:
    """The table has one row per training pair (d1, d2) with d1 in this shard: related, no near-copies, hubs capped."""
    shard = context.partition_key
    with Progress("pair", "pairs") as progress:
        pairs, counts = shard_pairs(edges, shard, settings.experiment.pairing)
        progress.advance(len(pairs))
    return dg.MaterializeResult(
        value=pairs,
        metadata={
            "dagster/row_count": len(pairs),
            **counts,
            "documents_with_pairs": pairs["d1"].n_unique(),
            "pairs_across_shards": pairs.filter(pl.col("d2_shard") != shard).height,
            **quantiles(pairs["similarity"], "similarity"),
            "funnel": dg.MetadataValue.md(funnel(counts)),
            "similarity": dg.MetadataValue.md(histogram_markdown(histogram(pairs["similarity"]))),
            "preview": dg.MetadataValue.md(side_by_side(pairs.filter(d2_shard=shard), documents)),
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
        code_version=settings.experiment.version("2", "truth", "pairing.max_pairs_per_document"),
        metadata=column_metadata(ground_truth.PAIR_TRUTH_COLUMNS),
    )
)
def pair_truth(
    settings: dg.ResourceParam[Settings], neighbor_pairs: dict[str, Path], documents: dict[str, pl.LazyFrame]
) -> dg.MaterializeResult[pl.DataFrame]:
    """The table has precision and recall of the pairs as pairs about one concept: a row per shard of d1, and `all`.

    It is empty for every source but `concepts`, the only one whose ground truth is known.
    """
    concepts = settings.experiment.ground_truth
    with Progress("pair_truth", "shards", len(neighbor_pairs)) as progress:
        if concepts:
            cap = settings.experiment.pairing.max_pairs_per_document
            scratch = staging(settings.deployment.work_dir, "pair_truth")
            table = ground_truth.pair_truth(
                neighbor_pairs, documents, ConceptWorld(concepts), cap, scratch, settings.deployment.memory_limit
            )
            release_staging(scratch)
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


def _last_artifact(context: dg.AssetExecutionContext, store: DirectoryIOManager, asset: str, check: str) -> Path | None:
    """Return what the last materialisation of the pairing's unpartitioned `asset` has written.

    None where it is gone or corrupted, or has failed its blocking `check`: it is not to be built upon.
    """
    version = _version_to_build_on(context, asset, check)
    try:
        artifact = store.fetch(dg.AssetKey(["pairing", asset])) if version else None
    except (FileNotFoundError, CorruptedArtifactError):
        return None
    return artifact if artifact and content_version(artifact) == version else None


def _version_to_build_on(
    context: dg.AssetExecutionContext, asset: str, check: str, partition: str | None = None
) -> str | None:
    """Return the content version that was recorded last of the pairing's `asset`; None where its `check` has failed."""
    key = dg.AssetKey(["pairing", asset])
    if last_check_failed(context.instance, dg.AssetCheckKey(key, check), partition):
        return None
    return last_version(context.instance, key, partition)
