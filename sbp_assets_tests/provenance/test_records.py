from pathlib import Path

import dagster as dg
import polars as pl

from sbp_assets.orchestration.staleness import Staleness
from sbp_assets.provenance.records import Records
from sbp_assets.storage.io_managers import ParquetIOManager


def definitions(folder: Path, value: int) -> dg.Definitions:
    shards = dg.StaticPartitionsDefinition(["a", "b"])

    @dg.asset(key=["t", "rows"], partitions_def=shards, io_manager_key="parquet", code_version="1")
    def rows():
        return dg.MaterializeResult(value=pl.DataFrame({"v": [value]}))

    @dg.asset(
        key=["t", "twice"],
        partitions_def=shards,
        io_manager_key="parquet",
        code_version="1",
        ins={"frame": dg.AssetIn(rows.key)},
    )
    def twice(frame: pl.LazyFrame):
        return dg.MaterializeResult(value=frame.collect() * 2)

    resources = {"parquet": ParquetIOManager(str(folder), cache=str(folder))}
    return dg.Definitions(assets=[rows, twice], resources=resources)


def make(defs: dg.Definitions, instance: dg.DagsterInstance, *names: str) -> str:
    job = defs.resolve_implicit_global_asset_job_def()
    keys = [dg.AssetKey(["t", name]) for name in names]
    return job.execute_in_process(instance=instance, partition_key="a", asset_selection=keys).run_id


def test_an_artifact_older_than_its_inputs_is_stale(tmp_path: Path):
    with dg.DagsterInstance.ephemeral() as instance:
        first = make(definitions(tmp_path, 1), instance, "rows", "twice")
        fresh = Records(definitions(tmp_path, 1), instance)("t/twice", "a")
        assert (fresh["state"], fresh["run_id"], fresh["reasons"]) == ("fresh", first, [])
        changed = definitions(tmp_path, 2)
        second = make(changed, instance, "rows")
        records = Records(changed, instance)
        assert records("t/rows", "a")["state"] == "fresh"
        assert records("t/rows", "a")["run_id"] == second
        stale = records("t/twice", "a")
        assert (stale["state"], stale["data_version"]) == ("stale", fresh["data_version"])
        assert stale["reasons"] == ["input t/rows changed"]
        assert records("t/twice", "b")["state"] == "unrecorded"


def test_an_input_of_a_hundred_partitions_makes_stale_as_for_every_other_command(tmp_path: Path):
    """Dagster's own resolver skips such an input."""
    names, rows = [f"{number:03d}" for number in range(101)], dg.AssetKey("rows")

    @dg.asset(key=rows, partitions_def=dg.StaticPartitionsDefinition(names), code_version="1")
    def source():
        return None

    @dg.asset(code_version="1", deps=[dg.AssetDep(rows, partition_mapping=dg.AllPartitionMapping())])
    def total():
        return None

    defs = dg.Definitions(assets=[source, total])
    job = defs.resolve_implicit_global_asset_job_def()

    def report(name: str, version: str) -> None:
        tags = {"dagster/data_version": version}
        instance.report_runless_asset_event(dg.AssetMaterialization(rows, partition=name, tags=tags))

    with dg.DagsterInstance.ephemeral() as instance:
        for name in names:
            report(name, "first")
        job.execute_in_process(instance=instance, asset_selection=[total.key])
        assert Records(defs, instance)("total", None)["state"] == "fresh"
        report("007", "second")
        record = Records(defs, instance)("total", None)
        assert (record["state"], record["reasons"]) == ("stale", ["input rows changed"])
        assert list(Staleness(defs.resolve_asset_graph(), instance).pending(total.key)) == [None]


def test_a_failed_check_is_a_state_of_its_own(tmp_path: Path):
    @dg.asset(code_version="1")
    def total():
        return None

    @dg.asset_check(asset=total)
    def complete():
        return dg.AssetCheckResult(passed=False)

    defs = dg.Definitions(assets=[total], asset_checks=[complete])
    with dg.DagsterInstance.ephemeral() as instance:
        defs.resolve_implicit_global_asset_job_def().execute_in_process(instance=instance)
        record = Records(defs, instance)("total", None)
    assert (record["state"], record["reasons"]) == ("check failed", ["check complete failed"])


def test_without_an_instance_nothing_is_known(tmp_path: Path):
    record = Records(definitions(tmp_path, 1), None)("t/rows", "a")
    assert (record["state"], record["data_version"]) == ("unrecorded", None)
