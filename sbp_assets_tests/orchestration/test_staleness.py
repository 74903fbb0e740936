"""What has to be made, on an ephemeral instance with real runs."""

from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from sbp_assets.orchestration.staleness import Staleness
from sbp_assets.storage.io_managers import ParquetIOManager
from sbp_assets.storage.row_versions import row_versions

MANY = 101  # Dagster's own staleness looks at no input of 100 partitions or more


def definitions(
    tmp_path: Path, shards: int = MANY, text: str = "a", severity: str = "", sound: bool = True, checked: bool = True
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
        return dg.AssetCheckResult(passed=sound, severity=dg.AssetCheckSeverity[severity or "ERROR"])

    return dg.Definitions(
        assets=[rows, total, searched],
        asset_checks=[complete] if checked else [],
        resources={"parquet": ParquetIOManager(str(tmp_path / "store"), cache=str(tmp_path))},
        executor=dg.in_process_executor,
    )


def make(defs: dg.Definitions, instance: dg.DagsterInstance, name: str, *partitions: str) -> None:
    job = defs.resolve_implicit_global_asset_job_def()
    for partition in partitions or (None,):
        job.execute_in_process(
            instance=instance, asset_selection=[dg.AssetKey(name)], partition_key=partition, raise_on_error=False
        )


def pending(defs: dg.Definitions, instance: dg.DagsterInstance, name: str) -> dict[str | None, str]:
    return Staleness(defs.resolve_asset_graph(), instance).pending(dg.AssetKey(name))


def report(instance: dg.DagsterInstance, name: str, shards: int) -> None:
    """Shards made elsewhere and reported, as any tool may: a hundred real runs would say no more."""
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
    make(defs, instance, "rows", "000")
    make(defs, instance, "total")
    make(defs, instance, "searched", "000", "001")
    assert pending(defs, instance, "rows") == {}
    assert pending(defs, instance, "total") == {}
    assert "000" not in pending(defs, instance, "searched")

    make(defs, instance, "rows", "000")
    assert pending(defs, instance, "total") == {}, "made again, the same"
    changed = definitions(tmp_path, text="b")
    make(changed, instance, "rows", "000")
    make(changed, instance, "searched", "001")
    assert pending(changed, instance, "total") == {None: "input rows"}
    reasons = pending(changed, instance, "searched")
    assert (reasons["000"], reasons.get("001"), reasons["002"]) == ("input rows", None, "missing")


def test_a_new_partition_of_an_input_counts(tmp_path: Path):
    instance = dg.DagsterInstance.ephemeral()
    defs = definitions(tmp_path, shards=2)
    make(defs, instance, "rows", "000", "001")
    make(defs, instance, "total")
    assert pending(defs, instance, "total") == {}
    grown = definitions(tmp_path, shards=3)
    assert pending(grown, instance, "rows") == {"002": "missing"}
    make(grown, instance, "rows", "002")
    assert pending(grown, instance, "total") == {None: "input rows"}


@pytest.mark.parametrize(
    ("severity", "sound", "reason"),
    [("", True, None), ("", False, "check complete"), ("ERROR", False, "check complete"), ("WARN", False, None)],
)
def test_a_failed_check_counts_unless_it_only_warns(tmp_path: Path, severity: str, sound: bool, reason: str | None):
    instance = dg.DagsterInstance.ephemeral()
    defs = definitions(tmp_path, 1, "a", severity, sound)
    make(defs, instance, "rows", "000")
    make(defs, instance, "total")
    assert pending(defs, instance, "total") == ({None: reason} if reason else {})
    blocked = Staleness(defs.resolve_asset_graph(), instance).blocked(dg.AssetKey("total"))
    assert blocked == ([None] if reason and not severity else [])


def test_a_blocking_check_that_was_never_run_counts_as_unchecked(tmp_path: Path):
    instance = dg.DagsterInstance.ephemeral()
    older = definitions(tmp_path, 1, checked=False)
    make(older, instance, "rows", "000")
    make(older, instance, "total")
    assert pending(older, instance, "total") == {}
    assert pending(definitions(tmp_path, 1), instance, "total") == {None: "unchecked complete"}
    assert pending(definitions(tmp_path, 1, severity="ERROR"), instance, "total") == {}


def test_what_was_made_after_its_check_was_last_run_is_unchecked(tmp_path: Path):
    instance = dg.DagsterInstance.ephemeral()
    defs, total = definitions(tmp_path, 1), dg.AssetKey("total")
    make(defs, instance, "rows", "000")
    make(defs, instance, "total")
    job = defs.resolve_implicit_global_asset_job_def().get_subset(asset_selection={total}, asset_check_selection=set())
    made = job.execute_in_process(instance=instance)
    assert pending(defs, instance, "total") == {None: "unchecked complete"}
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
    make(defs, instance, "total")
    assert seen == [({None: "unchecked complete"}, {})]
    staleness = Staleness(defs.resolve_asset_graph(), instance)
    assert staleness.pending(total.key) == {None: "unchecked complete"}
    assert [*staleness.unchecked(total.key)] == [None]


def test_what_a_queued_run_is_to_check_is_left_to_it(tmp_path: Path):
    instance, total = dg.DagsterInstance.ephemeral(), dg.AssetKey("total")
    defs = definitions(tmp_path, 1)
    make(defs, instance, "rows", "000")
    make(defs, instance, "total")
    job = defs.resolve_implicit_global_asset_job_def().get_subset(asset_selection={total})
    # As it is made when a backfill is asked for: Dagster notes at once what it will check.
    run = instance.create_run_for_job(job, status=dg.DagsterRunStatus.NOT_STARTED, asset_selection=frozenset({total}))
    assert pending(defs, instance, "total") == {None: "unchecked complete"}
    assert Staleness(defs.resolve_asset_graph(), instance).unchecked(total) == {}
    instance.report_run_canceled(run)
    assert [*Staleness(defs.resolve_asset_graph(), instance).unchecked(total)] == [None]


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
