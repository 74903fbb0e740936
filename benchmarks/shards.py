"""What a shard costs beside its own work: python -m benchmarks.shards [SHARDS ...] [--by run backfill] [--postgres].

For each number of shards (default: 8, 32 and 128), a corpus of 25 generated documents a shard is taken to `pair`:

- by `sbp run --until pair`, in one process;
- by backfills of each step, as the UI launches them, with a real daemon and webserver, on Dagster's run queue.

Start-up, measured on a second `sbp run` with nothing to do, is told apart. The rest of the processor seconds
of all processes, children included, is own work (`processor_seconds` that the assets record: reading, embedding,
searching) and overhead: storage, checks, runs. Printed per shard and asset (9 assets of a shard) with the number of
runs and the bytes of run and event storage; the exponent is that of the overhead's growth with the shards, fitted on a
logarithmic scale. `--step embed` takes a finished store, and measures one backfill of that step alone.

The last line printed is one JSON object.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import psutil

from benchmarks.arguments import parser
from benchmarks.machine import describe, looking
from sbp_assets.orchestration.pipeline import PIPELINE
from sbp_assets_tests.operations.deployment import BACKFILL_FINISHED, Deployment
from sbp_assets_tests.operations.servers import PostgresServer

DOCUMENTS = 25
UNTIL = "pair"
STEPS = PIPELINE[: [step.name for step in PIPELINE].index(UNTIL) + 1]
OF_A_SHARD: tuple[str, ...] = (
    "raw_documents",
    "rejected_rows",
    "minhash_signatures",
    "documents",
    "tokens",
    "embeddings",
    "ann_index",
)
OF_A_SHARD += ("neighbor_candidates", "neighbor_pairs")
UNPARTITIONED, BY_BLOCK = ("manifest", "deduplicate", "train_tokenizer", "fit_quantizer"), ("search", "filter")
HOURS = 3600.0


def main(shards: list[int], ways: list[str], postgres: bool, step: str | None) -> None:
    found: dict[str, list[dict[str, Any]]] = {}
    for way in ways:
        for number in shards:
            with tempfile.TemporaryDirectory() as home, _storage(postgres) as storage:
                settings = {
                    "SBP_EXPERIMENT__CORPUS__SHARDS": str(number),
                    "SBP_EXPERIMENT__CORPUS__SOURCE__DOCUMENTS": str(number * DOCUMENTS),
                    **storage,
                }
                with Deployment(Path(home), settings) as deployment:
                    measured = _one_step(deployment, step, number) if step else _measure(deployment, way, number)
            found.setdefault(way, []).append(measured)
            print(f"{way}, {number} shards: {json.dumps(measured)}", flush=True)
    exponents = {way: _exponent(rows) for way, rows in found.items() if len(rows) > 1}
    summary = {"storage": "postgresql" if postgres else "sqlite", "exponent_of_overhead": exponents, **found}
    print(json.dumps({"machine": describe(), **summary}))


@contextmanager
def _storage(postgres: bool) -> Iterator[dict[str, str]]:
    if postgres:
        with PostgresServer() as server:
            yield {"SBP_POSTGRES_URL": server.url}
    else:
        yield {}


def _measure(deployment: Deployment, way: str, shards: int) -> dict[str, Any]:
    started = time.monotonic()
    with ProcessorSeconds() as used_by_all:
        if way == "run":
            deployment.sbp("run", "--until", UNTIL, seconds=HOURS, fresh=True)
        else:
            _backfill(deployment, shards)
    used, wall = used_by_all.seconds, time.monotonic() - started
    with ProcessorSeconds() as used_by_all:
        deployment.sbp("run", "--until", UNTIL, seconds=HOURS, fresh=True)
    startup = used_by_all.seconds
    by_asset, runs, size = recorded(deployment)
    own = sum(by_asset.values())
    overhead = used - own - startup
    return {
        "shards": shards,
        "seconds": round(wall, 1),
        "processor_seconds": round(used, 1),
        "own_processor_seconds": round(own, 1),
        "startup_processor_seconds": round(startup, 1),
        "overhead_per_shard_and_asset": round(overhead / shards / len(OF_A_SHARD), 4),
        "runs": runs,
        "storage_bytes": size,
    }


def _one_step(deployment: Deployment, name: str, shards: int) -> dict[str, Any]:
    """Run everything before a step, and measure a backfill of that step over all shards."""
    place = [step.name for step in STEPS].index(name)
    deployment.sbp("run", "--until", STEPS[place - 1].name, seconds=HOURS, fresh=True)
    deployment.start_webserver()
    deployment.start_daemon()
    with deployment.instance() as instance:
        runs = instance.get_runs_count()
    started = time.monotonic()
    with ProcessorSeconds() as used:
        _launch(deployment, place, shards)
    wall = time.monotonic() - started
    with deployment.instance() as instance:
        runs = instance.get_runs_count() - runs
    took = {"seconds": round(wall, 1), "processor_seconds": round(used.seconds, 1)}
    return {"step": name, "shards": shards, **took, "runs": runs}


def _backfill(deployment: Deployment, shards: int) -> None:
    deployment.start_webserver()
    deployment.start_daemon()
    for place, step in enumerate(STEPS):
        if step.name in UNPARTITIONED:
            deployment.wait_run(deployment.launch(step.name))
        else:
            _launch(deployment, place, 1 if step.name in BY_BLOCK else shards)


def _launch(deployment: Deployment, place: int, partitions: int) -> None:
    backfill = deployment.backfill(list(STEPS[place].assets), [f"{number:05d}" for number in range(partitions)])

    def ended(instance: dg.DagsterInstance) -> str | None:
        found = instance.get_backfill(backfill)
        return found.status.value if found and found.status.value in BACKFILL_FINISHED else None

    status = deployment.wait(ended, f"the backfill of {STEPS[place].name}", seconds=HOURS, every=1)
    if status != "COMPLETED_SUCCESS":
        raise SystemExit(f"the backfill of {STEPS[place].name} ended as {status}")


def recorded(deployment: Deployment) -> tuple[dict[str, float], int, int]:
    """Return the processor seconds that each asset recorded, the number of runs, and the bytes of their records."""
    own: dict[str, float] = {}
    with deployment.instance() as instance:
        for key in (key for step in STEPS for key in step.keys):
            partitions = instance.get_materialized_partitions(key)
            records = dg.AssetRecordsFilter(key)
            for record in instance.fetch_materializations(records, limit=2 * len(partitions) + 1).records:
                metadata = record.asset_materialization.metadata if record.asset_materialization else {}
                if "processor_seconds" in metadata:
                    name = key.to_user_string()
                    own[name] = own.get(name, 0.0) + float(str(metadata["processor_seconds"].value))
        runs = instance.get_runs_count()
    folder = deployment.home / "instance"
    return own, runs, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class ProcessorSeconds:
    """Processor seconds of this process's descendants in a block; a run's process outlives nobody who would count it.

    Each is looked at five times a second, so that of one that ends up to 0.2 s are missed.
    """

    def __enter__(self) -> ProcessorSeconds:
        self._used: dict[tuple[int, float], float] = {}
        self._look()
        self._before = sum(self._used.values())
        self._looking = looking(self._look, 0.2)
        self._looking.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._looking.__exit__(None, None, None)
        self.seconds = sum(self._used.values()) - self._before

    def _look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                self._used[process.pid, process.create_time()] = times.user + times.system


def _exponent(rows: list[dict[str, Any]]) -> float:
    shards = np.log([row["shards"] for row in rows])
    totals = np.log([row["overhead_per_shard_and_asset"] * row["shards"] for row in rows])
    return round(float(np.polyfit(shards, totals, 1)[0]), 3)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("shards", nargs="*", type=int, default=[8, 32, 128], help="numbers of shards")
    arguments.add_argument("--by", nargs="+", choices=["run", "backfill"], default=["run", "backfill"])
    arguments.add_argument("--postgres", action="store_true", help="PostgreSQL, of a cluster of its own, not SQLite")
    arguments.add_argument("--step", choices=["ingest", "tokenise", "embed"], help="one backfill of this step alone")
    given = arguments.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(given.shards, ["backfill"] if given.step else given.by, given.postgres, given.step)
