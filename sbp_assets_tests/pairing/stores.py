"""The pairing stage's artifacts in an artifact store, as its tasks read them, and those tasks."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from sbp_assets.corpus.split import UNIQUE
from sbp_assets.fan_out import PublishedFiles
from sbp_assets.pairing.embed import Embedder
from sbp_assets.pairing.search import COVERAGE_FILE, search_fingerprint, table_name
from sbp_assets.pairing.tasks import EmbeddingTask, SearchTask, current_coverage, staged_tables
from sbp_assets.settings import Pairing
from sbp_assets.storage.artifacts import content_version
from sbp_assets_tests.pairing.searches import fitted, indexed, sharded, unit


def shard_names(shards: int) -> list[str]:
    return [f"{shard:05d}" for shard in range(shards)]


def write_store(folder: Path, shards: int, documents: int = 600) -> None:
    """Write embeddings, quantisers and indexes of `documents` documents below `folder`, and their texts."""
    ids = [f"d{row:05d}" for row in range(documents)]
    tables = sharded(ids, unit(documents), [row % shards for row in range(documents)], shards)
    (folder / "pairing/embeddings").mkdir(parents=True)
    (folder / "corpus/documents").mkdir(parents=True)
    for shard, table in tables.items():
        table.write_parquet(folder / f"pairing/embeddings/{shard}.parquet")
        text = pl.format("river {} and the sea of {}", pl.col("id"), pl.col("id").str.slice(3))
        rows = table.select("id", text=text, split=pl.lit(UNIQUE))
        rows.write_parquet(folder / f"corpus/documents/{shard}.parquet")
    quantizer = fitted(tables, Pairing())
    (folder / "pairing/quantizer").mkdir()
    quantizer.save(folder / "pairing/quantizer", "1")
    made = indexed(folder / "made", tables, quantizer)
    (folder / "pairing/ann_index").mkdir()
    for shard, index in made.items():
        index.rename(folder / f"pairing/ann_index/{shard}")


@dataclass(frozen=True)
class ObservedFiles(PublishedFiles):
    """Files of which each that is begun is noted in `notes`/attempts, and takes `seconds`.

    The process that first begins the one called `fatal` dies of it.
    """

    notes: str = ""
    seconds: float = 0
    fatal: str = ""

    @contextmanager
    def publish(self, name: str) -> Iterator[Path]:
        what = f"{Path(self.location).name}-{name}"
        folder = Path(self.notes, "attempts")
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / what).open("a", encoding="utf-8") as lines:
            lines.write(f"{os.getpid()}\n")
        if name == self.fatal and begun(Path(self.notes))[what] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        with super().publish(name) as path:
            yield path


def begun(notes: Path) -> Counter[str]:
    """How often each table has been begun."""
    folder = notes / "attempts"
    files = list(folder.iterdir()) if folder.exists() else []
    return Counter({path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files})


def search_tasks(
    data: Path, made: Path, shards: int, blocks: int, seconds: float = 0, fatal: str = ""
) -> dict[str, tuple[SearchTask]]:
    """The tasks of a search of the store in `data` in so many blocks, whose artifacts would be in `made`."""
    pairing, quantizer = Pairing(key_blocks=blocks, neighbors=5), content_version(data / "pairing/quantizer")
    store, artifacts = (PublishedFiles(str(folder), f"{made}/cache") for folder in (data, made))
    made_of = current_coverage(store, shard_names(shards), search_fingerprint("1", quantizer, pairing))
    tasks = {}
    for block in shard_names(blocks):
        tables = ObservedFiles(
            **vars(staged_tables(artifacts, block, made_of)), notes=str(made), seconds=seconds, fatal=fatal
        )
        work = str(made / "work")
        tasks[block] = (SearchTask(block, pairing, 1e9, work, store, artifacts, tables, quantizer, None),)
    return tasks


def tables_of(tasks: dict[str, tuple[SearchTask]], shards: int) -> dict[str, bytes]:
    """What the tasks have published, by block and name."""
    names = [COVERAGE_FILE, *map(table_name, shard_names(shards))]
    return {
        f"{block}/{name}": task.tables.fetch(name).read_bytes() for block, (task,) in tasks.items() for name in names
    }


def embedding_tasks(data: Path, made: Path, shards: int, model: str) -> dict[str, tuple[EmbeddingTask]]:
    pairing, embedder = Pairing(embedding_model=model, embedding_dtype="float32", max_tokens=32), Embedder()
    store, artifacts = (PublishedFiles(str(folder), f"{made}/cache") for folder in (data, made))
    return {
        shard: (
            EmbeddingTask(shard, pairing, "cpu", 4, embedder, store, artifacts.staged_for(shard, documents="1"), None),
        )
        for shard in shard_names(shards)
    }
