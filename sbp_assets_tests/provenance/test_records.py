from pathlib import Path
from unittest import mock

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


def make(defs: dg.Definitions, instance: dg.DagsterInstance, *names: str, partition: str = "a") -> str:
    job = defs.resolve_implicit_global_asset_job_def()
    keys = [dg.AssetKey(["t", name]) for name in names]
    return job.execute_in_process(instance=instance, partition_key=partition, asset_selection=keys).run_id


def test_an_artifact_older_than_its_inputs_is_stale(tmp_path: Path):
    with dg.DagsterInstance.ephemeral() as instance:
        first = make(definitions(tmp_path, 1), instance, "rows", "twice")
        fresh = Records(definitions(tmp_path, 1), instance)([("t/twice", "a")])[0]
        assert (fresh["state"], fresh["run_id"], fresh["reasons"]) == ("fresh", first, [])
        changed = definitions(tmp_path, 2)
        second = make(changed, instance, "rows")
        artifacts = [("t/rows", "a"), ("t/twice", "a"), ("t/twice", "b")]
        rows, stale, missing = Records(changed, instance)(artifacts)
        assert (rows["state"], rows["run_id"]) == ("fresh", second)
        assert (stale["state"], stale["data_version"]) == ("stale", fresh["data_version"])
        assert stale["reasons"] == ["input t/rows changed"]
        assert (missing["partition"], missing["state"]) == ("b", "unrecorded")


def test_the_instance_is_asked_for_many_partitions_as_often_as_for_one(tmp_path: Path):
    defs = definitions(tmp_path, 1)
    with dg.DagsterInstance.ephemeral() as instance:
        for partition in ("a", "b"):
            make(defs, instance, "rows", "twice", partition=partition)
        with mock.patch.object(instance, "fetch_materializations", wraps=instance.fetch_materializations) as fetch:
            asked = []
            for artifacts in ([("t/twice", "a")], [("t/twice", "a"), ("t/twice", "b")]):
                assert {row["state"] for row in Records(defs, instance)(artifacts)} == {"fresh"}
                asked.append(fetch.call_count)
                fetch.reset_mock()
    assert asked[0] == asked[1]


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
        assert Records(defs, instance)([("total", None)])[0]["state"] == "fresh"
        report("007", "second")
        record = Records(defs, instance)([("total", None)])[0]
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
        record = Records(defs, instance)([("total", None)])[0]
    assert (record["state"], record["reasons"]) == ("check failed", ["check complete failed"])


def test_without_an_instance_nothing_is_known(tmp_path: Path):
    record = Records(definitions(tmp_path, 1), None)([("t/rows", "a")])[0]
    assert (record["state"], record["data_version"]) == ("unrecorded", None)
