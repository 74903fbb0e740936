"""Which partitions are pending, on an ephemeral instance with real runs."""

from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from sbp_assets.orchestration.materialisations import StalenessCache
from sbp_assets.orchestration.staleness import Staleness
from sbp_assets.orchestration.status import FRESH, PartitionStatus, Status
from sbp_assets.storage.io_managers import ParquetIOManager
from sbp_assets.storage.row_versions import row_versions

MANY = 101  # Dagster's own staleness looks at no input of 100 partitions or more

MISSING = PartitionStatus(Status.MISSING)
ROWS_CHANGED = PartitionStatus(Status.INPUT_CHANGED, inputs=(dg.AssetKey("rows"),))
COMPLETE = dg.AssetCheckKey(dg.AssetKey("total"), "complete")
FAILED = PartitionStatus(Status.CHECK_FAILED, check=COMPLETE)
UNCHECKED = PartitionStatus(Status.UNCHECKED, check=COMPLETE)


def definitions(
    tmp_path: Path, shards: int = MANY, text: str = "a", severity: str = "", passes: bool = True, checked: bool = True
) -> dg.Definitions:
    """rows ▤ -> total, which has a check, and rows ▤ -> searched ▤, each shard of which reads all rows."""
    keys = dg.StaticPartitionsDefinition([f"{shard:03d}" for shard in range(shards)])

    @dg.asset(partitions_def=keys, io_manager_key="parquet", code_version="1")
    def rows(context: dg.AssetExecutionContext):
        return dg.MaterializeResult(value=pl.DataFrame({"text": [text if context.partition_key == "000" else "."]}))

    everything = {"rows": dg.AssetIn(partition_mapping=dg.AllPartitionMapping())}

    @dg.asset(io_manager_key="parquet", code_version="1", ins=everything)
    def total(rows: dict[str, pl.LazyFrame]):
        return dg.MaterializeResult(value=pl.concat([frame.collect() for frame in rows.values()]))

    @dg.asset(partitions_def=keys, io_manager_key="parquet", code_version="1", ins=everything)
    def searched(rows: dict[str, pl.LazyFrame]):
        return dg.MaterializeResult(value=pl.DataFrame({"rows": [len(rows)]}))

    @dg.asset_check(asset=total, blocking=not severity)
    def complete():
        return dg.AssetCheckResult(passed=passes, severity=dg.AssetCheckSeverity[severity or "ERROR"])

    return dg.Definitions(
        assets=[rows, total, searched],
        asset_checks=[complete] if checked else [],
        resources={"parquet": ParquetIOManager(str(tmp_path / "store"), cache=str(tmp_path))},
        executor=dg.in_process_executor,
    )


def materialise(defs: dg.Definitions, instance: dg.DagsterInstance, name: str, *partitions: str) -> None:
    job = defs.resolve_implicit_global_asset_job_def()
    for partition in partitions or (None,):
        job.execute_in_process(
            instance=instance, asset_selection=[dg.AssetKey(name)], partition_key=partition, raise_on_error=False
        )


def pending(defs: dg.Definitions, instance: dg.DagsterInstance, name: str) -> dict[str | None, PartitionStatus]:
    return Staleness(defs.resolve_asset_graph(), instance).pending(dg.AssetKey(name))


def report(instance: dg.DagsterInstance, name: str, shards: int) -> None:
    """Report shards as materialised elsewhere, as any tool may: a hundred real runs would show no more."""
    for shard in range(shards):
        instance.report_runless_asset_event(
            dg.AssetMaterialization(name, partition=f"{shard:03d}", tags={"dagster/data_version": "reported"})
        )


def test_an_input_of_more_than_a_hundred_partitions_counts(tmp_path: Path):
    instance = dg.DagsterInstance.ephemeral()
    defs = definitions(tmp_path)
    frame = pl.DataFrame({"text": ["."]})
    (tmp_path / "store/rows").mkdir(parents=True)
    for shard in range(MANY):
        frame.write_parquet(tmp_path / f"store/rows/{shard:03d}.parquet")
    report(instance, "rows", MANY)
    materialise(defs, instance, "rows", "000")
    materialise(defs, instance, "total")
    materialise(defs, instance, "searched", "000", "001")
    assert pending(defs, instance, "rows") == {}
    assert pending(defs, instance, "total") == {}
    assert "000" not in pending(defs, instance, "searched")

    materialise(defs, instance, "rows", "000")
    assert pending(defs, instance, "total") == {}, "materialised again, with the same content"
    changed = definitions(tmp_path, text="b")
    materialise(changed, instance, "rows", "000")
    materialise(changed, instance, "searched", "001")
    assert pending(changed, instance, "total") == {None: ROWS_CHANGED}
    statuses = pending(changed, instance, "searched")
    assert (statuses["000"], statuses.get("001"), statuses["002"]) == (ROWS_CHANGED, None, MISSING)


def test_a_new_partition_of_an_input_counts(tmp_path: Path):
    instance = dg.DagsterInstance.ephemeral()
    defs = definitions(tmp_path, shards=2)
    materialise(defs, instance, "rows", "000", "001")
    materialise(defs, instance, "total")
    assert pending(defs, instance, "total") == {}
    grown = definitions(tmp_path, shards=3)
    assert pending(grown, instance, "rows") == {"002": MISSING}
    materialise(grown, instance, "rows", "002")
    assert pending(grown, instance, "total") == {None: ROWS_CHANGED}


@pytest.mark.parametrize(
    ("severity", "passes", "status"),
    [("", True, FRESH), ("", False, FAILED), ("ERROR", False, FAILED), ("WARN", False, FRESH)],
)
def test_a_failed_check_counts_unless_it_only_warns(
    tmp_path: Path, severity: str, passes: bool, status: PartitionStatus
):
    instance = dg.DagsterInstance.ephemeral()
    defs = definitions(tmp_path, 1, "a", severity, passes)
    materialise(defs, instance, "rows", "000")
    materialise(defs, instance, "total")
    staleness, total = Staleness(defs.resolve_asset_graph(), instance), dg.AssetKey("total")
    assert staleness.status(total, None) == status
    assert staleness.pending(total) == ({None: status} if status.is_pending else {})
    assert staleness.blocked(total) == ([None] if status is FAILED and not severity else [])


def test_a_blocking_check_that_was_never_run_counts_as_unchecked(tmp_path: Path):
    instance = dg.DagsterInstance.ephemeral()
    older = definitions(tmp_path, 1, checked=False)
    materialise(older, instance, "rows", "000")
    materialise(older, instance, "total")
    assert pending(older, instance, "total") == {}
    assert pending(definitions(tmp_path, 1), instance, "total") == {None: UNCHECKED}
    assert pending(definitions(tmp_path, 1, severity="ERROR"), instance, "total") == {}


def test_what_is_newer_than_the_last_run_of_its_check_is_unchecked(tmp_path: Path):
    instance = dg.DagsterInstance.ephemeral()
    defs, total = definitions(tmp_path, 1), dg.AssetKey("total")
    materialise(defs, instance, "rows", "000")
    materialise(defs, instance, "total")
    job = defs.resolve_implicit_global_asset_job_def().get_subset(asset_selection={total}, asset_check_selection=set())
    made = job.execute_in_process(instance=instance)
    assert pending(defs, instance, "total") == {None: UNCHECKED}
    staleness = Staleness(defs.resolve_asset_graph(), instance)
    event = instance.get_latest_materialization_event(total)
    assert event and event.run_id == made.run_id and [*staleness.unchecked(total)] == [None]

    checks = defs.resolve_implicit_global_asset_job_def().get_subset(
        asset_check_selection=set(defs.resolve_asset_graph().asset_check_keys)
    )
    assert checks.execute_in_process(instance=instance).success
    assert pending(defs, instance, "total") == {}


def test_what_is_being_checked_is_left_to_its_run(tmp_path: Path):
    """Asked from inside the check, as another process would while it runs."""
    instance, seen = dg.DagsterInstance.ephemeral(), []

    @dg.asset(code_version="1")
    def total():
        return dg.MaterializeResult()

    @dg.asset_check(asset=total, blocking=True)
    def complete():
        staleness = Staleness(defs.resolve_asset_graph(), instance)
        seen.append((staleness.pending(total.key), staleness.unchecked(total.key)))
        raise RuntimeError("killed, say")

    defs = dg.Definitions(assets=[total], asset_checks=[complete], executor=dg.in_process_executor)
    materialise(defs, instance, "total")
    assert seen == [({None: UNCHECKED}, {})]
    staleness = Staleness(defs.resolve_asset_graph(), instance)
    assert staleness.pending(total.key) == {None: UNCHECKED}
    assert [*staleness.unchecked(total.key)] == [None]


def test_what_a_queued_run_is_to_check_is_left_to_it(tmp_path: Path):
    instance, total = dg.DagsterInstance.ephemeral(), dg.AssetKey("total")
    defs = definitions(tmp_path, 1)
    materialise(defs, instance, "rows", "000")
    materialise(defs, instance, "total")
    job = defs.resolve_implicit_global_asset_job_def().get_subset(asset_selection={total})
    # As a backfill creates it: Dagster records at once what the run will check.
    run = instance.create_run_for_job(job, status=dg.DagsterRunStatus.NOT_STARTED, asset_selection=frozenset({total}))
    assert pending(defs, instance, "total") == {None: UNCHECKED}
    assert Staleness(defs.resolve_asset_graph(), instance).unchecked(total) == {}
    instance.report_run_canceled(run)
    assert [*Staleness(defs.resolve_asset_graph(), instance).unchecked(total)] == [None]


def test_a_cache_spares_reading_the_same_event_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    instance = dg.DagsterInstance.ephemeral()
    defs = definitions(tmp_path, shards=3)
    materialise(defs, instance, "rows", "000", "001", "002")
    read: list[int] = []
    fetch = instance.fetch_materializations

    def counted(records_filter: dg.AssetRecordsFilter, limit: int):
        read.extend(records_filter.storage_ids or ())
        return fetch(records_filter, limit)

    monkeypatch.setattr(instance, "fetch_materializations", counted)
    cache = StalenessCache()

    def look() -> tuple[dict[str | None, PartitionStatus], int]:
        read.clear()
        pending = Staleness(defs.resolve_asset_graph(), instance, cache).pending(dg.AssetKey("rows"))
        return pending, len(read)

    assert [look(), look()] == [({}, 3), ({}, 0)]
    materialise(defs, instance, "rows", "001")
    assert look() == ({}, 1)


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (FRESH, "up to date"),
        (MISSING, "never materialised"),
        (PartitionStatus(Status.CODE_CHANGED), "code or settings changed"),
        (ROWS_CHANGED, "input rows changed"),
        (FAILED, "check complete failed"),
        (UNCHECKED, "check complete has not been run"),
    ],
)
def test_a_status_describes_itself_to_people(status: PartitionStatus, text: str):
    assert status.describe() == text


def test_versions_of_rows_change_where_they_do():
    table = pl.DataFrame({"shard": [0, 0, 2, None], "file": ["a", "b", "c", "d"], "when": [1, 2, 3, 4]})
    keys = ["00000", "00001", "00002"]
    before = row_versions(table, keys, ["file"])
    assert list(before) == keys
    assert row_versions(table.with_columns(when=0), keys, ["file"]) == before
    moved = table.with_columns(pl.when(pl.col("file") == "d").then(1).otherwise(pl.col("shard")).alias("shard"))
    after = row_versions(moved, keys, ["file"])
    assert [key for key in keys if after[key] != before[key]] == ["00001"]
    assert set(row_versions(table.clear(), keys, ["file"]).values()) == {before["00001"]}
