"""How the definitions load and Dagster's UI answers with many shards: python -m benchmarks.ui_scale [SHARDS ...].

For each number of shards (default: 2, for reference, and 2000), profile tiny with that many:

- load: seconds until a fresh process has imported the definitions, built the repository and what a code server sends of
  it; the median of several, by the clock and of the processor alone, which other work on the machine disturbs less;
- records: every shard of every asset has a materialisation with data version and preview, and every check of it an
  evaluation. Those of the first shard are reported to Dagster, the others are copies of their rows;
- pages: seconds from opening a page in Chromium until what it is for is seen, with the real webserver: the first visit,
  in which Dagster computes the state of all partitions, and the median of those after it; and the processor seconds
  of webserver, code server and browser together in one of these;
- nightly: one evaluation of the nightly automation: by day; at the tick, with nothing to do, first and again in the
  same process; and at the tick when a setting has made every shard of a stage stale;
- backfill: of all shards of one asset, with a daemon: seconds until its runs are queued, how many there are, its page
  while it runs, and the lists of runs and backfills.

Each page is pictured in build/screenshots (or $SBP_SCREENSHOTS). The last line printed is one JSON object.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import psutil

from benchmarks.arguments import parser
from sbp_assets.dagster_support.internals import BACKFILL_ID_TAG
from sbp_assets.definitions import build_definitions
from sbp_assets.settings import load_settings
from sbp_assets_tests.operations.deployment import Deployment, wait_for
from sbp_assets_tests.operations.pages import Ui, chromium

REPEATS = 3
ASSET = "corpus/raw_documents"
FIRST = "00000"
LOOKED_AT = "materialization_event_storage_id"

LOAD = """
import json, time
from sbp_assets.definitions import build_definitions
from sbp_assets.settings import load_settings
defs = build_definitions(load_settings())
from dagster._core.remote_representation.external_data import RepositorySnap
from dagster._serdes import serialize_value
imported = time.process_time()
sent = serialize_value(RepositorySnap.from_def(defs.get_repository_def()))
print(json.dumps({"import": imported, "processor": time.process_time(), "sent_bytes": len(sent)}))
"""

# What each artifact says that it was made from is what the others say that they are, as after a finished run.
REPORT = """
import hashlib
import dagster as dg
from dagster._core.definitions.asset_checks.asset_check_evaluation import AssetCheckEvaluationTargetMaterializationData
from dagster._core.definitions.data_version import SKIP_PARTITION_DATA_VERSION_DEPENDENCY_THRESHOLD as LARGE
from sbp_assets.definitions import build_definitions
from sbp_assets.settings import load_settings
defs = build_definitions(load_settings())
graph = defs.resolve_asset_graph()
version = "0" * 64
last_event = 2**53

def tags(key, first):
    found = {"dagster/data_version": version, "dagster/code_version": graph.get(key).code_version}
    for parent in graph.get(key).parent_keys:
        partitions, mapping = graph.get(parent).partitions_def, graph.get_partition_mapping(key, parent)
        if partitions is None:
            read = version
        else:
            one = first and isinstance(mapping, dg.IdentityPartitionMapping)
            number = 1 if one else len(partitions.get_partition_keys())
            read = version if number >= LARGE else hashlib.sha256((version * number).encode()).hexdigest()
        found[f"dagster/input_data_version/{parent.to_user_string()}"] = read
        found[f"dagster/input_event_pointer/{parent.to_user_string()}"] = str(last_event)
    return found
preview = dg.MetadataValue.md("| a | b |\\n|---|---|\\n" + "| text | text |\\n" * 100)
with dg.DagsterInstance.get() as instance:
    for key in graph.materializable_asset_keys:
        partitions = graph.get(key).partitions_def
        first = partitions.get_partition_keys()[0] if partitions else None
        numbers = {name: 1.0 for name in ("dagster/row_count", "bytes", "wall_seconds", "peak_memory_mb", "per_second")}
        instance.report_runless_asset_event(dg.AssetMaterialization(
            key, partition=first, metadata=numbers | {"preview": preview}, tags=tags(key, first)))
        event = instance.fetch_materializations(dg.AssetRecordsFilter(key), limit=1).records[0]
        looked_at = AssetCheckEvaluationTargetMaterializationData(
            storage_id=event.storage_id, run_id="", timestamp=event.timestamp)
        for check in (check for check in graph.asset_check_keys if check.asset_key == key):
            instance.report_runless_asset_event(dg.AssetCheckEvaluation(
                key, check.name, passed=True, partition=first if graph.get(check).partitions_def else None,
                metadata={"rows": 1, "problems": []}, target_materialization_data=looked_at))
"""

EVALUATE = """
import datetime, json, sys, time
import dagster as dg
from sbp_assets.definitions import build_definitions
from sbp_assets.settings import load_settings
defs = build_definitions(load_settings())
from sbp_assets.orchestration.nightly import NIGHTLY
midnight = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
found, cursor = {}, None
with dg.DagsterInstance.get() as instance:
    for name, minutes in (("by_day", -720), ("at_the_tick", 180), ("again", 181)):
        started, processor = time.monotonic(), time.process_time()
        result = dg.evaluate_automation_conditions(
            defs, instance, dg.AssetSelection.assets(*NIGHTLY), cursor=cursor,
            evaluation_time=midnight + datetime.timedelta(minutes=minutes))
        cursor = result.cursor
        found[name] = {"seconds": round(time.monotonic() - started, 2),
                       "processor": round(time.process_time() - processor, 2), "requested": result.total_requested}
print(json.dumps(found))
"""


def measure_load(deployment: Deployment) -> dict[str, float]:
    """Medians over fresh processes."""
    runs = []
    for _ in range(REPEATS):
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", LOAD], env=deployment.environ, capture_output=True, text=True, check=True
        )
        runs.append(json.loads(done.stdout) | {"seconds": time.monotonic() - started})
    return {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}


def fill(deployment: Deployment, shards: int) -> int:
    """Records of all shards; returns how many events the instance then holds."""
    subprocess.run([sys.executable, "-c", REPORT], env=deployment.environ, check=True)
    return copy_first(deployment.home / "instance/history/runs/index.db", shards)


def copy_first(index: Path, shards: int) -> int:
    """Copy the first shard's rows of Dagster's event log (SQLite) for the others; returns the events then there."""
    with contextlib.closing(sqlite3.connect(index)) as database, database:
        database.row_factory = sqlite3.Row
        # Of evaluations the column `partition` is empty.
        mine = f'%"partition": "{FIRST}"%'
        templates = []
        # In order, so that the materialisation that a check looked at comes before what the check said of it.
        events = database.execute("select * from event_logs where event like ? order by id", (mine,)).fetchall()
        for event in events:
            related = [
                (table, reference, dict(row))
                for table, reference in (
                    ("asset_event_tags", "event_id"),
                    ("asset_check_executions", "evaluation_event_storage_id"),
                )
                for row in database.execute(f"select * from {table} where {reference} = ?", (event["id"],))
            ]
            templates.append((dict(event), related))
        (next_id,) = database.execute("select max(id) + 1 from event_logs").fetchone()
        for number in range(1, shards):
            shard, copies = f"{number:05d}", {}
            for event, related in templates:
                copies[event["id"]] = next_id
                _insert(database, "event_logs", event | {"id": next_id}, shard)
                for table, reference, row in related:
                    row = row | {"id": None, reference: next_id}
                    if LOOKED_AT in row:
                        row |= {LOOKED_AT: copies[row[LOOKED_AT]]}
                    _insert(database, table, row, shard)
                next_id += 1
        (events,) = database.execute("select count(*) from event_logs").fetchone()
    return events


def _renamed(value: Any, shard: str) -> Any:
    if value == FIRST:
        return shard
    return value.replace(f'"{FIRST}"', f'"{shard}"') if isinstance(value, str) else value


def _insert(database: sqlite3.Connection, table: str, row: dict[str, Any], shard: str) -> None:
    names = ", ".join(f'"{name}"' for name in row)
    values = [_renamed(value, shard) for value in row.values()]
    database.execute(f"insert into {table} ({names}) values ({', '.join('?' * len(row))})", values)


def measure_nightly_automation(deployment: Deployment, shards: int) -> dict[str, Any]:
    """Return the measurements; raise RuntimeError where what is requested is not what there is to do."""

    def evaluations(**settings: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", EVALUATE],
            env=deployment.environ | settings,
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    found = {"fresh": evaluations(), "stale": evaluations(SBP_EXPERIMENT__PAIRING__MIN_SIMILARITY="0.61")}
    requested = [found[state]["at_the_tick"]["requested"] for state in found]
    if requested[0] != 0 or requested[1] < shards:
        raise RuntimeError(
            f"of {shards} shards, none and then all of them stale, the nightly automation requested {requested}"
        )
    return found


def measure_pages(deployment: Deployment, ui: Ui, shards: int) -> dict[str, dict[str, float]]:
    pages: dict[str, Callable[[], Any]] = {
        "catalog": lambda: ui.open("/assets").see("corpus"),
        "lineage": lambda: ui.open("/asset-groups").see("pretraining", ui.page.locator("svg")),
        "lineage_of_a_stage": lambda: ui.open("/locations/sbp_assets/asset-groups/corpus/lineage").see(
            "raw_documents", ui.page.locator("svg")
        ),
        "asset": lambda: ui.asset(ASSET).see("peak_memory_mb"),
        "partitions": lambda: ui.asset(ASSET, "partitions").see(f"Materialized ({shards})"),
        "one_shard": lambda: ui.asset(ASSET, "partitions", partition=FIRST).metadata("preview"),
        "checks": lambda: ui.asset(ASSET, "checks").see("artifact_is_intact"),
        "shards_of_a_check": lambda: _shards_of_a_check(ui),
    }
    return {name: _timed(ui, f"{shards}-{name}", page) for name, page in pages.items()}


def _shards_of_a_check(ui: Ui) -> None:
    ui.asset(ASSET, "checks", checkDetail="artifact_is_intact").see("Latest execution")
    ui.page.get_by_role("tab", name="Partitions").last.click()
    ui.see(FIRST)


def _timed(ui: Ui, name: str, page: Callable[[], Any]) -> dict[str, float]:
    took, used = [], []
    for _ in range(REPEATS):
        started, processor = time.monotonic(), _processor_seconds()
        page()
        took.append(time.monotonic() - started)
        used.append(_processor_seconds() - processor)
    ui.picture(name)
    then, processor = statistics.median(took[1:]), statistics.median(used[1:])
    return {"first": round(took[0], 1), "then": round(then, 1), "processor": round(processor, 2)}


def _processor_seconds() -> float:
    """Of all processes that this one has started and that still run."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def measure_backfill(deployment: Deployment, ui: Ui, shards: int) -> dict[str, Any]:
    """Launch over all shards, and look at the pages of it while the daemon works on it, and of its runs.

    RuntimeError where the backfill has failed by then, or makes more runs than it must: its pages would be others.
    """
    launched = time.monotonic()
    backfill = deployment.backfill([ASSET, "corpus/rejected_rows"], [f"{number:05d}" for number in range(shards)])
    accepted = time.monotonic() - launched

    def page(name: str) -> dict[str, float]:
        return _timed(ui, f"{shards}-{name}", lambda: ui.open(f"/runs/b/{backfill}").see(ASSET.replace("/", " / ")))

    requested = page("backfill_before_runs")
    daemon = deployment.start_daemon()
    started, expected = time.monotonic(), -(-shards // _shards_of_a_run(deployment))

    def count(*statuses: str) -> int:
        with deployment.instance() as instance:
            return instance.get_runs_count(_of(backfill, *statuses))

    wait_for(lambda: count("SUCCESS"), "the first run of the backfill", 1800)
    first_run = time.monotonic() - started
    wait_for(lambda: count() >= expected, "all runs of the backfill", 1800)
    running = page("backfill_while_running")
    with deployment.instance() as instance:
        state = instance.get_backfill(backfill)
    if state is None or state.error or count() != expected:
        raise RuntimeError(
            f"the backfill of {shards} shards made {count()} runs, not {expected}: {state and state.error}"
        )
    deployment.stop(daemon)
    queued = count("QUEUED")
    lists: dict[str, Callable[[], Any]] = {
        "run_list": lambda: ui.open("/runs").see(f"Queued ({queued})"),
        "backfill_list": lambda: ui.open("/runs?tab=backfills").see(backfill),
        "partitions_then": lambda: ui.asset(ASSET, "partitions").see("Missing (0)"),
    }
    return {
        "accepted_seconds": round(accepted, 1),
        "page_before_runs": requested,
        "first_run_succeeded_seconds": round(first_run, 1),
        "runs": expected,
        "page_while_running": running,
        **{name: _timed(ui, f"{shards}-{name}", page) for name, page in lists.items()},
    }


def _shards_of_a_run(deployment: Deployment) -> int:
    graph = build_definitions(load_settings(environ=deployment.environ)).resolve_asset_graph()
    policy = graph.get(dg.AssetKey(ASSET.split("/"))).backfill_policy
    assert policy and policy.max_partitions_per_run
    return policy.max_partitions_per_run


def _of(backfill: str, *statuses: str) -> dg.RunsFilter:
    return dg.RunsFilter(tags={BACKFILL_ID_TAG: backfill}, statuses=[dg.DagsterRunStatus(name) for name in statuses])


def measure(shards: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="sbp-ui-scale-") as folder:
        overrides = {"SBP_EXPERIMENT__CORPUS__SHARDS": str(shards)}
        with Deployment(Path(folder), overrides) as deployment:
            found: dict[str, Any] = {"shards": shards, "load": measure_load(deployment)}
            print(found, file=sys.stderr, flush=True)
            deployment.sbp("run", "--until", "manifest")  # what the backfill reads
            found["events"] = fill(deployment, shards)
            found["nightly"] = measure_nightly_automation(deployment, shards)
            print(found, file=sys.stderr, flush=True)
            started = time.monotonic()
            deployment.start_webserver()
            found["webserver_ready_seconds"] = round(time.monotonic() - started, 1)
            with chromium() as browser:
                ui = Ui(browser, deployment.url)
                found["pages"] = measure_pages(deployment, ui, shards)
                print(found, file=sys.stderr, flush=True)
                found["backfill"] = measure_backfill(deployment, ui, shards)
    print(found, file=sys.stderr, flush=True)
    return found


def main(counts: list[int]) -> None:
    measured = [measure(shards) for shards in counts]
    print(json.dumps({"cores": os.cpu_count(), "load_average": os.getloadavg()[0], "measured": measured}))


if __name__ == "__main__":
    taking = parser(__doc__)
    taking.add_argument("shards", nargs="*", type=int, default=[2, 2000], help="numbers of shards (default: 2 2000)")
    main(taking.parse_args().shards)
