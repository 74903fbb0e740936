"""What the end of `sbp run` and `sbp verify` says of checks that failed, on a toy asset with real runs."""

from pathlib import Path

import dagster as dg
import polars as pl

from sbp_assets.dagster_support.check_results import problems_result
from sbp_assets.orchestration.failed_checks import FailedCheck, failed_check_lines, failed_checks
from sbp_assets.storage.io_managers import ParquetIOManager

ROWS, WHOLE = dg.AssetKey(["t", "rows"]), dg.AssetKey(["t", "whole"])
WARN = dg.AssetCheckSeverity.WARN


def definitions(tmp_path: Path, shards: list[str], bad: set[str]) -> dg.Definitions:
    partitions = dg.StaticPartitionsDefinition(shards)

    @dg.asset(key=ROWS, partitions_def=partitions, io_manager_key="parquet")
    def rows():
        return dg.MaterializeResult(value=pl.DataFrame({"v": [1]}))

    @dg.asset(key=WHOLE, io_manager_key="parquet")
    def whole():
        return dg.MaterializeResult(value=pl.DataFrame({"v": [1]}))

    @dg.asset_check(asset=ROWS, partitions_def=partitions)
    def warns(context: dg.AssetCheckExecutionContext):
        problems = [f"x_[{context.partition_key}]\n\x1b[31m www.a.b", "second"] if context.partition_key in bad else []
        return problems_result(problems, WARN)

    @dg.asset_check(asset=WHOLE)
    def has_numbers():
        return dg.AssetCheckResult(passed=not bad, metadata={"share": 0.123456, "rows": 7})

    return dg.Definitions(
        assets=[rows, whole],
        asset_checks=[warns, has_numbers],
        jobs=[dg.define_asset_job("rows", [ROWS]), dg.define_asset_job("whole", [WHOLE])],
        resources={"parquet": ParquetIOManager(str(tmp_path / "store"), cache=str(tmp_path / "cache"))},
    )


def materialise(defs: dg.Definitions, instance: dg.DagsterInstance, shards: list[str]) -> None:
    for shard in shards:
        defs.resolve_job_def("rows").execute_in_process(instance=instance, partition_key=shard)
    defs.resolve_job_def("whole").execute_in_process(instance=instance)


def lines(defs: dg.Definitions, instance: dg.DagsterInstance, *keys: dg.AssetKey) -> list[str]:
    found = failed_checks(defs.resolve_asset_graph(), instance, keys or (ROWS, WHOLE))
    return failed_check_lines(found).splitlines()


def test_every_failed_check_is_a_line_and_what_passes_again_is_none(tmp_path: Path):
    shards, instance = ["a", "b", "c", "d", "e", "f"], dg.DagsterInstance.ephemeral()
    defs = definitions(tmp_path, shards, {"b", "c", "d", "e", "f"})
    assert lines(defs, instance) == []
    materialise(defs, instance, shards)
    assert lines(defs, instance) == [
        "checks: 1 failed, 1 with a warning",
        "  failed: t/whole:has_numbers: rows 7, share 0.1235",
        "  warning: t/rows:warns [b, c, d and 2 more]: x_[b] [31m www.a.b; second",
    ]
    assert lines(defs, instance, ROWS)[0] == "checks: 1 with a warning"
    fewer = definitions(tmp_path, ["a", "b"], {"b"})
    assert "warns [b]: " in lines(fewer, instance, ROWS)[1], "of partitions that the settings define"
    materialise(definitions(tmp_path, shards, set()), instance, shards)
    assert lines(defs, instance) == []


def test_a_failure_is_told_only_of_what_is_materialised_now(tmp_path: Path):
    instance = dg.DagsterInstance.ephemeral()
    defs = definitions(tmp_path, ["a"], {"a"})
    materialise(defs, instance, ["a"])
    instance.report_runless_asset_event(dg.AssetMaterialization(WHOLE))
    assert lines(defs, instance, WHOLE) == []


def test_a_line_is_short_however_long_the_reason():
    line = FailedCheck(dg.AssetCheckKey(WHOLE, "c"), "warning", [None], "long " * 1000).line
    assert line.endswith("…") and len(line) < 350
