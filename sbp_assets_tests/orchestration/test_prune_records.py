"""Which runs are superseded, and what staleness and Dagster say without them; on SQLite files with real runs."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from sbp_assets.orchestration import prune_records
from sbp_assets.orchestration.prune_records import delete_run, forget, look_at_runs, superseded_artifacts
from sbp_assets.orchestration.staleness import Staleness
from sbp_assets.storage.io_managers import ParquetIOManager
from sbp_assets.storage.row_versions import ROW_VERSIONS
from sbp_assets_tests.orchestration.test_staleness import MANY, definitions, materialise, pending, report

MATERIALIZED = dg.DagsterEventType.ASSET_MATERIALIZATION


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    """SQLite in memory, which is faster."""
    with dg.DagsterInstance.ephemeral() as made:
        yield made


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    (tmp_path / "instance").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "instance")) as made:
        yield made


def statuses(defs: dg.Definitions, instance: dg.DagsterInstance) -> Mapping[dg.AssetKey, Any]:
    """All that is said of the artifacts: what is pending and why, versions, latest runs, failed partitions."""
    graph = defs.resolve_asset_graph()
    staleness, storage = Staleness(graph, instance), instance.event_log_storage
    found = {}
    for key in graph.materializable_asset_keys:
        versions = staleness.versions(key)
        events = staleness.materialisations(key, [*versions])
        found[key] = (
            staleness.pending(key),
            versions,
            {name: (event.run_id, event.storage_id) for name, event in events.items()},
            storage.get_latest_asset_partition_materialization_attempts_without_materializations(key),
            sorted(map(repr, storage.get_asset_check_partition_info([*graph.get(key).check_keys]))),
        )
    return found


def prune(defs: dg.Definitions, instance: dg.DagsterInstance, before: float | None = None) -> int:
    """Delete the superseded runs, and return how many there were."""
    runs = look_at_runs(instance, defs.resolve_asset_graph(), time.time() if before is None else before)
    for run_id in runs.superseded:
        delete_run(instance, run_id)
    return len(runs.superseded)


def log_files(instance: dg.DagsterInstance) -> set[str]:
    storage: Any = instance.event_log_storage
    return {path.name.partition(".db")[0] for path in Path(storage.path_for_shard("x")).parent.iterdir()} - {"index"}


def runs_of(instance: dg.DagsterInstance) -> set[str]:
    return {run.run_id for run in instance.get_runs()}


def test_superseded_runs_go_with_everything_that_is_theirs(tmp_path: Path, on_disk: dg.DagsterInstance):
    defs = definitions(tmp_path, shards=2)
    for _ in range(3):
        materialise(defs, on_disk, "rows", "000", "001")
        materialise(defs, on_disk, "total")
    logs = tmp_path / "instance/storage"
    all_runs, before = runs_of(on_disk), statuses(defs, on_disk)
    runs = look_at_runs(on_disk, defs.resolve_asset_graph(), time.time())
    assert runs.unfinished == [] and len(runs.superseded) == 6
    sizes = prune_records.bytes_of_runs(on_disk, runs.superseded, logs)
    for run_id, size in sizes.items():
        assert size > (tmp_path / f"instance/history/runs/{run_id}.db").stat().st_size > 0
        assert (logs / run_id).is_dir()
    assert prune(defs, on_disk) == 6
    assert runs_of(on_disk) == log_files(on_disk) == all_runs - {*runs.superseded}
    assert not [run_id for run_id in runs.superseded if (logs / run_id).exists()]
    storage: Any = on_disk.event_log_storage
    with storage.index_connection() as connection:
        for table in ("event_logs", "asset_check_executions"):
            left = {run_id for (run_id,) in connection.exec_driver_sql(f"select run_id from {table}")}
            assert left <= runs_of(on_disk), table
    run_storage: Any = on_disk.run_storage
    with run_storage.connect() as connection:
        assert {run_id for (run_id,) in connection.exec_driver_sql("select run_id from run_tags")} <= runs_of(on_disk)
    assert statuses(defs, on_disk) == before
    assert prune(defs, on_disk) == 0
    prune_records.compact(on_disk)
    assert statuses(defs, on_disk) == before


def test_young_and_unfinished_runs_stay(tmp_path: Path, instance: dg.DagsterInstance):
    defs = definitions(tmp_path, shards=1)
    materialise(defs, instance, "rows", "000", "000")
    between = time.time()
    materialise(defs, instance, "rows", "000", "000")
    job = defs.resolve_implicit_global_asset_job_def()
    queued = instance.create_run_for_job(job, status=dg.DagsterRunStatus.NOT_STARTED)
    runs = look_at_runs(instance, defs.resolve_asset_graph(), between)
    assert runs.unfinished == [queued.run_id] and len(runs.superseded) == 2
    assert len(look_at_runs(instance, defs.resolve_asset_graph(), time.time()).superseded) == 3


def test_a_failed_attempt_and_a_failed_check_stay_known(tmp_path: Path, instance: dg.DagsterInstance):
    defs, bad = definitions(tmp_path, shards=2), definitions(tmp_path, shards=2, passes=False)
    materialise(defs, instance, "rows", "000", "001")
    materialise(defs, instance, "total")
    checks = bad.resolve_implicit_global_asset_job_def().get_subset(
        asset_check_selection=set(bad.resolve_asset_graph().asset_check_keys)
    )
    for _ in range(2):
        checks.execute_in_process(instance=instance, raise_on_error=False)
    # Without its input, `searched` fails: its last attempt is a failure.
    (tmp_path / "store/rows/001.parquet").unlink()
    materialise(defs, instance, "searched", "000", "000")
    materialise(defs, instance, "rows", "001")
    before = statuses(defs, instance)
    assert before[dg.AssetKey("searched")][3].keys() == {"000"}
    assert "complete" in str(before[dg.AssetKey("total")][0])
    # The first of rows[001], the first failure of the check, the first of the attempt.
    assert prune(defs, instance) == 3
    assert statuses(defs, instance) == before


def test_what_a_large_input_was_before_stays_while_staleness_compares_with_it(
    tmp_path: Path, instance: dg.DagsterInstance
):
    defs = definitions(tmp_path)
    frame = pl.DataFrame({"text": ["."]})
    (tmp_path / "store/rows").mkdir(parents=True)
    for shard in range(MANY):
        frame.write_parquet(tmp_path / f"store/rows/{shard:03d}.parquet")
    report(instance, "rows", MANY)
    materialise(defs, instance, "rows", "000", "000", "000")
    materialise(defs, instance, "total")
    materialise(defs, instance, "rows", "000", "000")  # with the same content
    before = statuses(defs, instance)
    assert before[dg.AssetKey("total")][0] == {}
    # Of five runs of rows[000] the third is what total has read, and the fifth what is there now.
    assert prune(defs, instance) == 3
    assert statuses(defs, instance) == before
    # Then nothing but the present ones is compared.
    materialise(defs, instance, "total")
    assert prune(defs, instance) == 2
    assert pending(defs, instance, "total") == {}


def test_the_table_whose_rows_a_shard_has_read_stays(tmp_path: Path, instance: dg.DagsterInstance):
    keys = dg.StaticPartitionsDefinition(["00000", "00001"])
    versions = {"00000": "a", "00001": "a"}

    @dg.asset(code_version="1", io_manager_key="parquet")
    def table():
        data = pl.DataFrame({"n": [time.time()]})
        return dg.MaterializeResult(value=data, metadata={ROW_VERSIONS: dg.JsonMetadataValue(dict(versions))})

    @dg.asset(partitions_def=keys, code_version="1", io_manager_key="parquet")
    def read(table: pl.LazyFrame):
        return dg.MaterializeResult(value=table.collect())

    defs = dg.Definitions(
        assets=[table, read],
        resources={"parquet": ParquetIOManager(str(tmp_path / "store"), cache=str(tmp_path))},
        executor=dg.in_process_executor,
    )
    materialise(defs, instance, "table")
    materialise(defs, instance, "table")
    materialise(defs, instance, "read", "00000", "00001")
    versions["00001"] = "b"
    materialise(defs, instance, "table")
    before = statuses(defs, instance)
    assert before[dg.AssetKey("read")][0].keys() == {"00001"}
    assert prune(defs, instance) == 1
    assert statuses(defs, instance) == before


def test_the_newest_event_and_run_stay_so_that_no_id_is_given_twice(tmp_path: Path, on_disk: dg.DagsterInstance):
    @dg.op
    def nothing() -> None: ...

    @dg.job
    def other() -> None:
        nothing()

    defs = definitions(tmp_path, shards=1)
    materialise(defs, on_disk, "rows", "000")
    slow = on_disk.create_run_for_job(other)
    for _ in range(2):
        other.execute_in_process(instance=on_disk)
    on_disk.report_run_canceled(slow)  # the newest event is not of the newest run
    storage: Any = on_disk.event_log_storage

    def highest() -> int:
        with storage.index_connection() as connection:
            return connection.scalar(prune_records.NEWEST_EVENT)

    (newest,) = on_disk.get_run_records(limit=1)
    before = highest()
    assert prune(defs, on_disk) == 1
    assert highest() == before and {newest.dagster_run.run_id, slow.run_id} <= runs_of(on_disk)
    materialise(defs, on_disk, "rows", "000")
    (newer,) = on_disk.get_run_records(limit=1)
    assert highest() > before and newer.storage_id > newest.storage_id


def test_runs_of_a_backfill_that_goes_on_and_of_a_retried_run_stay(
    tmp_path: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
):
    defs = definitions(tmp_path, shards=1)
    job, rows = defs.resolve_implicit_global_asset_job_def(), [dg.AssetKey("rows")]

    def run(**tags: str) -> str:
        return job.execute_in_process(
            instance=instance,
            asset_selection=rows,
            partition_key="000",
            tags={f"dagster/{k}": v for k, v in tags.items()},
        ).run_id

    going_on, ended, first = run(backfill="goes-on"), run(backfill="ended"), run()
    retry = instance.create_run_for_job(job, asset_selection=frozenset(rows), root_run_id=first, parent_run_id=first)
    instance.report_run_canceled(retry)
    run()
    monkeypatch.setattr(prune_records, "_unfinished_backfills", lambda _: {"goes-on"})
    assert prune(defs, instance) == 1
    assert going_on in runs_of(instance) and ended not in runs_of(instance) and first in runs_of(instance)
    monkeypatch.undo()
    assert prune(defs, instance) == 1, "its backfill has ended"
    assert going_on not in runs_of(instance)


def test_a_run_whose_removal_was_killed_is_found_again(
    tmp_path: Path, on_disk: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
):
    defs = definitions(tmp_path, shards=1)
    materialise(defs, on_disk, "rows", "000", "000")
    before = statuses(defs, on_disk)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(on_disk.run_storage, "delete_run", killed)
        prune(defs, on_disk)
    assert statuses(defs, on_disk) == before
    assert prune(defs, on_disk) == 1
    assert runs_of(on_disk) == log_files(on_disk)


def test_what_is_recorded_of_undefined_artifacts_is_forgotten(tmp_path: Path, instance: dg.DagsterInstance):
    defs, fewer = definitions(tmp_path, shards=3), definitions(tmp_path, shards=1)
    materialise(defs, instance, "rows", "000", "001", "002")
    materialise(defs, instance, "total")

    @dg.asset(io_manager_key="parquet")
    def gone():
        return dg.MaterializeResult(value=pl.DataFrame({"a": [1]}))

    store = {"parquet": ParquetIOManager(str(tmp_path / "store"), cache=str(tmp_path))}
    materialise(dg.Definitions(assets=[gone], resources=store, executor=dg.in_process_executor), instance, "gone")
    instance.report_runless_asset_event(dg.AssetMaterialization("theirs", tags={"dagster/data_version": "1"}))
    graph = fewer.resolve_asset_graph()
    superseded = superseded_artifacts(instance, graph)
    assert sorted(artifact.name for artifact in superseded) == ["gone", "rows/001", "rows/002"]
    for artifact in superseded:
        path = tmp_path / f"store/{artifact.name}.parquet"
        assert artifact.recorded.bytes == path.stat().st_size
        path.unlink()
    before = statuses(fewer, instance)
    forget(instance, graph, superseded)
    assert superseded_artifacts(instance, graph) == []
    assert statuses(fewer, instance) == before
    assert {*instance.get_asset_keys()} == {dg.AssetKey(name) for name in ("rows", "total", "theirs")}
    # Defined again, they are missing, not lost.
    assert pending(defs, instance, "rows").keys() == {"001", "002"}
    assert instance.event_log_storage.get_materialized_partitions(dg.AssetKey("rows")) == {"000"}
