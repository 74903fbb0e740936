"""Tasks of the tests: at the top of a module, as a node imports them, each publishing its own file."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import faiss
import numpy as np
import polars as pl

from sbp_assets.fan_out import PublishedFiles
from sbp_assets.pairing.embed import Embedder, embed, embeddings_frame
from sbp_assets.storage.progress import Progress


def square(number: int) -> int:
    return number * number


def threads() -> tuple[int, int]:
    import torch

    return faiss.omp_get_max_threads(), torch.get_num_threads()


def refuse(path: str) -> None:
    raise ValueError(f"{path} holds no vectors; embed it first")


class AwkwardError(Exception):
    """Pickled, it could not be made again."""

    def __init__(self, shard: str, rows: int) -> None:
        super().__init__(f"{shard} has {rows} rows")


def refuse_awkwardly() -> None:
    raise AwkwardError("00001", 7)


def large_result(size: int) -> bytes:
    return b"x" * size


def embed_shard(texts: tuple[str, ...], model: str, files: PublishedFiles, name: str) -> int:
    """Publish the embeddings of `texts` by the model in the folder `model`."""
    with Progress("embedding", "documents") as progress:
        vectors = embed(Embedder().load(model, "float32", "cpu"), texts, 64, 4, progress)
    with files.publish(name) as path:
        embeddings_frame(pl.Series([f"{name}-{row}" for row in range(len(texts))]), vectors).write_parquet(path)
    return len(texts)


def search_block(block: str, shards: tuple[str, ...], vectors: str, files: PublishedFiles, seconds: float = 0) -> int:
    """Search the queries of every shard in one block's keys, and publish one partial result per shard.

    Returns how many there were still to publish; `attempts/` beside `vectors` has a line for each that was begun.
    """
    folder, made = Path(vectors), 0
    keys = np.load(folder / f"{block}.npy")
    index = faiss.IndexScalarQuantizer(keys.shape[1], faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    index.train(keys)
    index.add(keys)
    for shard in shards:
        name = f"{block}/{shard}.parquet"
        if files.exists(name):
            continue
        note(folder, f"{block}-{shard}")
        time.sleep(seconds)
        similarity, row = index.search(np.load(folder / f"{shard}.npy"), 5)
        with files.publish(name) as path:
            pl.DataFrame({"similarity": similarity.ravel(), "row": row.ravel()}).write_parquet(path)
        made += 1
    return made


def note(folder: Path, what: str) -> None:
    (folder / "attempts").mkdir(exist_ok=True)
    with (folder / "attempts" / what).open("a", encoding="utf-8") as lines:
        lines.write(f"{os.getpid()}\n")


def attempts(folder: Path) -> dict[str, int]:
    """How often each piece of work has been begun."""
    return {path.name: len(path.read_text().splitlines()) for path in (folder / "attempts").iterdir()}


def write_vectors(folder: Path, names: list[str], rows: int = 300, width: int = 16) -> None:
    random = np.random.default_rng(0)
    for name in names:
        np.save(folder / f"{name}.npy", random.standard_normal((rows, width)).astype(np.float32))


def written(files: PublishedFiles, names: list[str]) -> dict[str, bytes]:
    return {name: files.fetch(name).read_bytes() for name in names}


def die_once(folder: str, times: int) -> str:
    """Kill the process that executes this, the first `times` times."""
    note(Path(folder), "deaths")
    if attempts(Path(folder))["deaths"] <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return "lived"


def where(seconds: float) -> str:
    """The address of the node that executes this, after `seconds`."""
    import ray

    time.sleep(seconds)
    return ray.util.get_node_ip_address()


def write_slowly(folder: str, name: str, seconds: float) -> None:
    """Say that it has begun, take `seconds`, and say that it has ended; a half-written file says neither."""
    files = PublishedFiles(folder, folder)
    with files.publish(name) as path:
        path.write_text("half")
        (Path(folder) / f"{name}.begun").touch()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(0.05)
        path.write_text("whole")


def publish_often(folder: str, name: str, letter: str, times: int) -> None:
    """Publish the same name again and again, a megabyte of one letter each time."""
    files = PublishedFiles(folder, folder)
    for _ in range(times):
        with files.publish(name) as path:
            path.write_bytes(letter.encode() * 2**20)


def environment(name: str) -> str | None:
    return os.environ.get(name)


def write_row(files: PublishedFiles, shard: str, broken: bool) -> str:
    """Publish a table of one row, or refuse to; return its name."""
    if broken:
        raise ValueError(f"file {shard}.jsonl cannot be read")
    with files.publish("table") as path:
        pl.DataFrame({"v": [shard]}).write_parquet(path, compression="zstd")
    return "table"


def copy_rows(store: PublishedFiles, shard: str, made: PublishedFiles) -> None:
    """Publish `rows` of what the shard's documents are now."""
    with made.publish("rows.parquet") as path:
        path.write_bytes(store.fetch(f"t/documents/{shard}.parquet").read_bytes())
