"""The pairing stage's tasks on two one-core Ray nodes against one.

In a network of its own: unshare --map-root-user --net python -m benchmarks.cluster.

The cluster is on this machine: a head without cores, and two nodes that are kept to one core each, since polars would
take both for the tasks of one. `search` is that of `--vectors` generated vectors (those of benchmarks.pairing) in
`--blocks` blocks of keys, `embed` the embedding of `--documents` documents in as many shards by the bundled model. In
turn, `--rounds` times, after one that is not counted: on one of the nodes, on both, and in the loop of this process.
Their files are compared. Processes of a node that had nothing to do for a second are started again, in some 2 s.

`seconds` are the medians by the clock, `times` that of one node over that of both, at the end for search and embedding
together; what runs beside takes from it. `processor_seconds` are those of the tasks, all together and of the node with
the most: `balance` is all over the most, what the clock would show on two free cores if nothing but tasks took time.
The last line is a JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.arguments import parser
from benchmarks.machine import describe
from benchmarks.pairing import vectors
from sbp_assets.corpus.split import UNIQUE
from sbp_assets.fan_out import Engine, InProcess, PublishedFiles
from sbp_assets.fan_out.ray_cluster import RayCluster
from sbp_assets.pairing.embed import Embedder, embeddings_frame, vectors_of
from sbp_assets.pairing.index import write_index
from sbp_assets.pairing.quantizer import Quantizer, fit
from sbp_assets.pairing.search import search_fingerprint
from sbp_assets.pairing.tasks import (
    EmbeddingTask,
    SearchTask,
    current_coverage,
    embed_shard,
    search_block,
    staged_tables,
)
from sbp_assets.settings import Pairing, load_settings
from sbp_assets.storage.artifacts import content_version
from sbp_assets.storage.progress import Progress
from sbp_assets_tests.cluster.conftest import in_namespace

SHARDS, MEMORY = 8, 10**9
OBJECT_STORE = 100 * 2**20
Tasks = dict[str, tuple[Any]]


def on_node(function: Callable[[Any], Any], task: Any) -> tuple[str, float]:
    """Execute a task; return the node that it was on, and the seconds of the processor that it took."""
    import ray

    started = time.process_time()
    function(task)
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    return node, time.process_time() - started


class Store:
    """A store with what the tasks read."""

    def __init__(self, folder: Path, count: int, documents: int, blocks: int) -> None:
        self._folder, self._data, self._rounds = folder, PublishedFiles(f"{folder}/data", f"{folder}/cache"), 0
        self.pairing = Pairing(index="ivf", key_blocks=blocks)
        self.shards = [f"{shard:05d}" for shard in range(SHARDS)]
        self.blocks = [f"{block:05d}" for block in range(blocks)]
        self._embedder = Embedder()
        found, ids = vectors(None, count, 384), pl.Series([f"{row:08d}" for row in range(count)])
        tables = {shard: embeddings_frame(ids[n::SHARDS], found[n::SHARDS]) for n, shard in enumerate(self.shards)}
        with Progress("fit", "shards") as progress:
            quantizer = fit({shard: table.lazy() for shard, table in tables.items()}, self.pairing, progress)
        self._write(tables, quantizer, documents)

    def _write(self, tables: dict[str, pl.DataFrame], quantizer: Quantizer, documents: int) -> None:
        for name in ("pairing/embeddings", "pairing/quantizer", "corpus/documents"):
            (self._folder / "data" / name).mkdir(parents=True)
        quantizer.save(self._folder / "data/pairing/quantizer", "1")
        for number, (shard, table) in enumerate(tables.items()):
            table.write_parquet(self._folder / f"data/pairing/embeddings/{shard}.parquet")
            (index := self._folder / f"data/pairing/ann_index/{shard}").mkdir(parents=True)
            write_index(index, shard, table["id"], vectors_of(table), quantizer, self.pairing.nprobe)
            texts = [
                f"document {row} of the sea, " + "rivers and stars " * 40 for row in range(number, documents, SHARDS)
            ]
            rows = pl.DataFrame({"id": [f"{shard}-{row}" for row in range(len(texts))], "text": texts, "split": UNIQUE})
            rows.write_parquet(self._folder / f"data/corpus/documents/{shard}.parquet")

    def search(self) -> Tasks:
        made = self._made()
        version = content_version(self._folder / "data/pairing/quantizer")
        covered = current_coverage(self._data, self.shards, search_fingerprint("1", version, self.pairing))
        return {
            block: (
                SearchTask(
                    block, self.pairing, MEMORY, f"{self._folder}/work", self._data, made,
                    staged_tables(made, block, covered), version, None,
                ),
            )
            for block in self.blocks
        }  # fmt: skip

    def embed(self) -> Tasks:
        made = self._made()
        return {
            shard: (
                EmbeddingTask(shard, self.pairing, "cpu", 16, self._embedder, self._data, made.staged_for(shard), None),
            )
            for shard in self.shards
        }

    def written(self) -> str:
        """Return the version of what the tasks that were made last have published, figures left out."""
        made = sorted(path for path in (self._folder / f"made-{self._rounds}").rglob("*.parquet"))
        return " ".join(f"{path.name}:{content_version(path)}" for path in made)

    def _made(self) -> PublishedFiles:
        self._rounds += 1
        return PublishedFiles(f"{self._folder}/made-{self._rounds}", f"{self._folder}/cache")


def measure(
    engines: dict[str, tuple[Engine, int]], store: Store, tasks: Callable[[], Tasks], function: Any, rounds: int
) -> dict[str, Any]:
    from benchmarks.cluster import on_node  # not __main__, which a node could not import

    seconds, processor, most = (defaultdict[str, list[float]](list) for _ in range(3))
    files = set()
    for number in range(rounds + 1):
        for name, (engine, gpus) in engines.items():
            todo = {key: (function, *task) for key, task in tasks().items()}
            started, used = time.perf_counter(), defaultdict[str, float](float)
            for _, (node, processed) in engine.run(on_node, todo.items(), gpus=gpus, memory=MEMORY):
                used[node] += processed
            files.add(store.written())
            took = time.perf_counter() - started
            by_node = " + ".join(f"{spent:.1f}" for spent in used.values())
            what = f"{function.__name__}, round {number}, {name}: {took:.1f} s, of the processor {by_node} s"
            print(what, file=sys.stderr, flush=True)
            if number:
                seconds[name].append(took)
                processor[name].append(sum(used.values()))
                most[name].append(max(used.values()))
    clock = {name: round(statistics.median(times), 2) for name, times in seconds.items()}
    total = {name: round(statistics.median(times), 2) for name, times in processor.items()}
    busiest = {name: round(statistics.median(times), 2) for name, times in most.items()}
    return {
        "seconds": clock,
        "times": round(clock["one node"] / clock["two nodes"], 2),
        "by_round": {name: [round(second, 2) for second in times] for name, times in seconds.items()},
        "processor_seconds": total,
        "of_the_busiest_node": busiest,
        "balance": round(total["two nodes"] / busiest["two nodes"], 2),
        "equal_files": len(files) == 1,
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--vectors", type=int, default=60_000)
    arguments.add_argument("--documents", type=int, default=2400)
    arguments.add_argument("--blocks", type=int, default=8)
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    if not in_namespace():
        raise SystemExit("run it as unshare --map-root-user --net python -m benchmarks.cluster")
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two nodes of one core need two cores, and this process may use one")
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "node_ip_address": "127.0.0.2", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "object_store_memory": OBJECT_STORE})
    with tempfile.TemporaryDirectory() as folder:
        names = ("DATA_DIR", "WORK_DIR", "INSTANCE_DIR")
        places = {f"SBP_DEPLOYMENT__{name}": f"{folder}/{name}" for name in names}
        engine = RayCluster(load_settings("tiny", {**places, "SBP_DEPLOYMENT__RAY_ADDRESS": cluster.address}))
        try:
            # The GPU is a name: what asks for it is on the first node alone.
            node = {"num_cpus": 1, "memory": 2 * MEMORY, "object_store_memory": OBJECT_STORE}
            cores = os.sched_getaffinity(0)
            try:
                for core, address, own in zip(cores, ("127.0.0.3", "127.0.0.4"), ({"num_gpus": 1}, {}), strict=False):
                    os.sched_setaffinity(0, {core})  # A node's processes inherit it.
                    cluster.add_node(**node, **own, node_ip_address=address)
            finally:
                os.sched_setaffinity(0, cores)
            cluster.wait_for_nodes()
            store = Store(Path(folder), given.vectors, given.documents, given.blocks)
            engines = {"one node": (engine, 1), "two nodes": (engine, 0), "in process": (InProcess(), 0)}
            found = {
                "machine": describe(),
                "vectors": given.vectors,
                "blocks": given.blocks,
                "documents": given.documents,
                "search": measure(engines, store, store.search, search_block, given.rounds),
                "embed": measure(engines, store, store.embed, embed_shard, given.rounds),
            }
        finally:
            engine.close()
            cluster.shutdown()
    one, two = (sum(found[kind]["seconds"][name] for kind in ("search", "embed")) for name in ("one node", "two nodes"))
    print(json.dumps({**found, "times": round(one / two, 2)}))


if __name__ == "__main__":
    main()
