"""The tasks of the pairing stage, executed in the run's process or on a node of a cluster (docs/cluster.md).

What a task reads it fetches itself from the artifact store, by name, and what it makes it publishes there. Only names,
versions and settings travel with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl

from sbp_assets.corpus.split import UNIQUE
from sbp_assets.fan_out import LazyMapping, PublishedFiles
from sbp_assets.pairing.embed import Embedder, embed, embeddings_frame
from sbp_assets.pairing.index import DIGEST_FILE, index_digest
from sbp_assets.pairing.quantizer import Quantizer
from sbp_assets.pairing.search import COVERAGE_FILE, BlockSearch, Coverage
from sbp_assets.settings import Pairing
from sbp_assets.storage.artifacts import content_version, release_staging, staging
from sbp_assets.storage.paths import scan_table
from sbp_assets.storage.progress import Progress

EMBEDDINGS_FILE, FIGURES_FILE = "embeddings.parquet", "figures.json"

# Shards whose files a process keeps in its node's cache of a remote store before it lets go of them.
_KEPT = 64


@dataclass(frozen=True)
class TaskResult:
    """What a task has published, and figures about it for the artifact's metadata."""

    files: PublishedFiles
    figures: dict[str, Any]


@dataclass(frozen=True)
class EmbeddingTask:
    """The embedding of a shard's documents; `store` is the artifact store, `made` are files staged for the artifact.

    `documents` is the content version that was recorded of them; None: nothing is.
    """

    shard: str
    pairing: Pairing
    device: Literal["auto", "cpu", "cuda"]
    batch_size: int
    embedder: Embedder
    store: PublishedFiles
    made: PublishedFiles
    documents: str | None


def embed_shard(task: EmbeddingTask) -> TaskResult:
    """Publish EMBEDDINGS_FILE (EMBEDDING_COLUMNS), the unit vectors of the shard's documents of D, unless it is there.

    FIGURES_FILE is published after it.
    """
    if task.made.exists(FIGURES_FILE):
        return TaskResult(task.made, json.loads(task.made.fetch(FIGURES_FILE).read_text(encoding="utf-8")))
    pairing = task.pairing
    file = task.store.fetch(f"corpus/documents/{task.shard}.parquet")
    if task.documents is not None and content_version(file) != task.documents:
        raise ValueError(
            f"corpus/documents of shard {task.shard} has been materialised again since this run began: run it again"
        )
    rows = scan_table(file).filter(pl.col("split") == UNIQUE).select("id", "text").sort("id").collect()
    engine = task.embedder.load(pairing.embedding_model, pairing.embedding_dtype, task.device)
    with Progress("embed", "documents", len(rows)) as progress:
        vectors = embed(
            engine, rows["text"].to_list(), pairing.max_tokens, task.batch_size, progress, pairing.embedding_prompt
        )
    with task.made.publish(EMBEDDINGS_FILE) as path:
        embeddings_frame(rows["id"], vectors).write_parquet(path, compression="zstd")
    task.store.release()
    figures: dict[str, Any] = {
        "dagster/row_count": len(rows),
        "dimensions": vectors.shape[1],
        "engine_startup_seconds": round(engine.startup_seconds, 3),
        "engine_reused": engine.reused,
        "device": str(engine.model.device),
        **progress.metadata(),
    }
    with task.made.publish(FIGURES_FILE) as path:
        path.write_text(json.dumps(figures), encoding="utf-8")
    return TaskResult(task.made, figures)


@dataclass(frozen=True)
class SearchTask:
    """The search of a block of keys, which may take `memory` bytes; `work_dir` is a folder of the node's own.

    `store` is the artifact store, `blocks` are the blocks' artifacts in it, and `tables` are staged for the block's:
    COVERAGE_FILE among them says of what. `quantizer` and `earlier` are the content versions of the quantisers and of
    the block's last artifact (None: there is none to build upon).
    """

    block: str
    pairing: Pairing
    memory: float
    work_dir: str
    store: PublishedFiles
    blocks: PublishedFiles
    tables: PublishedFiles
    quantizer: str
    earlier: str | None


def current_coverage(store: PublishedFiles, shards: Sequence[str], search: str) -> Coverage:
    """Return what a search covers of what `store` holds of all `shards`; `search` is its search_fingerprint."""
    names = [f"pairing/ann_index/{shard}" for shard in shards]
    with ThreadPoolExecutor(32) as readers:  # of an object store, each takes as long as its answer
        digests = readers.map(lambda name: store.read(name, DIGEST_FILE).decode(), names)
        versions = dict(zip(shards, digests, strict=True))
    return Coverage(search, versions, versions)


def staged_tables(blocks: PublishedFiles, block: str, made_of: Coverage) -> PublishedFiles:
    """Return the files that tasks stage for the artifact of a block, with COVERAGE_FILE among them.

    A list of thousands of shards with their versions is too large to travel with a task.
    """
    tables = blocks.staged_for(block, made_of=made_of.digest)
    if not tables.exists(COVERAGE_FILE):
        with tables.publish(COVERAGE_FILE) as path:
            made_of.write(path)
    return tables


def search_block(task: SearchTask) -> TaskResult:
    """Publish a table per query shard, as BlockSearch.run says, without those that are published already."""
    store = task.store
    made_of = Coverage.read(task.tables.fetch(COVERAGE_FILE))
    directory = store.fetch("pairing/quantizer", directory=True)
    if content_version(directory) != task.quantizer:
        raise ValueError("pairing/quantizer has been materialised again since this run began: run it again")
    quantizer = Quantizer.load(directory)
    # Not through `store`, whose copies are let go of meanwhile.
    earlier = _earlier(task.blocks, task.block, task.earlier)
    fetched = 0

    def index(shard: str) -> Path:
        nonlocal fetched
        fetched += 1
        if fetched % _KEPT == 0:
            store.release()
        path = store.fetch(f"pairing/ann_index/{shard}", directory=True)
        if index_digest(path) != made_of.keys[shard]:
            raise ValueError(f"pairing/ann_index of shard {shard} has been materialised again: run this again")
        return path

    indexes: Mapping[str, Path] = LazyMapping(made_of.keys, index)
    scratch = staging(task.work_dir, "search_block", task.block)
    try:
        with Progress(f"search block {task.block}", "queries") as progress:
            search = BlockSearch(int(task.block), task.pairing, task.memory)
            counts = search.run(quantizer, indexes, made_of, earlier, task.tables, scratch, progress)
    finally:
        release_staging(scratch)
        for files in (store, task.blocks, task.tables):
            files.release()
    return TaskResult(task.tables, {**counts, **progress.metadata()})


def _earlier(store: PublishedFiles, name: str, version: str | None) -> Path | None:
    """Return the directory artifact `name` where it is what was recorded of it; None where it is to re-materialise."""
    if version is None:
        return None
    try:
        artifact = store.fetch(name, directory=True)
    except FileNotFoundError:
        return None
    return artifact if content_version(artifact) == version else None
