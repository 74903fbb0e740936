"""The step runner on a three-step toy pipeline with real runs on an ephemeral instance."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from sbp_assets.orchestration.display import StepStatus
from sbp_assets.orchestration.pipeline import Step, display_logger
from sbp_assets.orchestration.runner import PipelineError, pending_partitions, run_pipeline
from sbp_assets.orchestration.verification import Outcome, VerifyResult
from sbp_assets.orchestration.verification import verify as verify_partitions
from sbp_assets.storage.io_managers import ParquetIOManager

PIPELINE = (Step("one", "One", ("t/rows",)), Step("two", "Two", ("t/sum",)))


DONE, FRESH = StepStatus.DONE, StepStatus.FRESH
PASSED = dg.AssetCheckResult(passed=True)


def definitions(
    tmp_path: Path,
    version: str = "1",
    fail: str = "",
    end: str = "",
    outcome: dg.AssetCheckResult = PASSED,
    blocking: bool = True,
    checked: bool = True,
) -> dg.Definitions:
    shards = dg.StaticPartitionsDefinition(["a", "b", "c"])

    @dg.asset(key=["t", "rows"], partitions_def=shards, io_manager_key="parquet", code_version=version)
    def rows(context: dg.AssetExecutionContext):
        if context.partition_key == fail:
            raise ValueError(f"file-{fail}.jsonl cannot be read")
        if context.partition_key == end:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return dg.MaterializeResult(value=pl.DataFrame({"v": [version]}), metadata={"wall_seconds": 0.25})

    @dg.asset_check(asset=rows.key, blocking=blocking, partitions_def=shards)
    def passes():
        return outcome

    ins = {"frames": dg.AssetIn(rows.key, partition_mapping=dg.AllPartitionMapping())}

    @dg.asset(key=["t", "sum"], io_manager_key="parquet", ins=ins, code_version="1")
    def total(frames: dict[str, pl.LazyFrame]):
        return dg.MaterializeResult(value=pl.concat([f.collect() for f in frames.values()]))

    return dg.Definitions(
        assets=[rows, total],
        asset_checks=[passes] if checked else [],
        jobs=[step.job for step in PIPELINE],
        loggers={"display": display_logger},
        resources={"parquet": ParquetIOManager(str(tmp_path / "store"), cache=str(tmp_path))},
    )


def verify(defs: dg.Definitions, instance: dg.DagsterInstance, step: Step, partition: str | None) -> VerifyResult:
    ((_, result),) = verify_partitions(defs, instance, step, [partition])
    return result


def run(defs: dg.Definitions, instance: dg.DagsterInstance) -> list[StepStatus]:
    return [state.status for state in run_pipeline(defs, instance, {}, pipeline=PIPELINE)]


def test_a_second_run_materialises_nothing_and_a_new_version_what_depends_on_it(tmp_path: Path):
    instance = dg.DagsterInstance.ephemeral()
    assert run(definitions(tmp_path), instance) == [DONE, DONE]
    assert run(definitions(tmp_path), instance) == [FRESH, FRESH]
    assert run(definitions(tmp_path, version="2"), instance) == [DONE, DONE]
    assert len(instance.get_runs()) == 8


def test_a_failing_shard_spares_the_others_and_is_named(tmp_path: Path):
    instance = dg.DagsterInstance.ephemeral()
    broken = definitions(tmp_path, fail="b")
    with pytest.raises(PipelineError, match=r"1 of 3.*\n.*b: .*file-b.jsonl cannot be read"):
        run(broken, instance)
    assert pending_partitions(broken, instance, PIPELINE[0]) == ["b"]
    fixed = definitions(tmp_path)
    assert run(fixed, instance) == [DONE, DONE]


def test_a_terminated_run_begins_nothing_more_and_resumes(tmp_path: Path):
    """Ctrl-C, or SIGTERM as a batch system sends it."""
    instance = dg.DagsterInstance.ephemeral()
    with pytest.raises(KeyboardInterrupt):
        run(definitions(tmp_path, end="b"), instance)
    assert [run.is_failure for run in instance.get_runs()] == [True, False]
    assert pending_partitions(definitions(tmp_path), instance, PIPELINE[0]) == ["b", "c"]
    assert run(definitions(tmp_path), instance) == [DONE, DONE]


def test_a_failed_blocking_check_keeps_the_step_pending(tmp_path: Path):
    instance = dg.DagsterInstance.ephemeral()
    with pytest.raises(PipelineError, match="passes"):
        run(definitions(tmp_path, outcome=dg.AssetCheckResult(passed=False)), instance)
    assert pending_partitions(definitions(tmp_path), instance, PIPELINE[0]) == ["a", "b", "c"]


@pytest.mark.parametrize(("severity", "again"), [("WARN", FRESH), ("ERROR", DONE)])
def test_a_failed_check_is_retried_unless_it_only_warns(tmp_path: Path, severity: str, again: StepStatus):
    instance = dg.DagsterInstance.ephemeral()
    outcome = dg.AssetCheckResult(passed=False, severity=dg.AssetCheckSeverity[severity])
    defs = definitions(tmp_path, outcome=outcome, blocking=False)
    assert run(defs, instance) == [DONE, DONE]
    assert run(defs, instance)[0] == again


@pytest.mark.parametrize("passed", [True, False])
def test_time_passes_and_is_shown_while_partitions_are_only_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], passed: bool
):
    instance = dg.DagsterInstance.ephemeral()
    run(definitions(tmp_path, checked=False), instance)
    capsys.readouterr()
    outcome: Any = PASSED if passed else "no result"
    with nullcontext() if passed else pytest.raises(PipelineError, match="check crashed: t/rows:passes"):
        states = run_pipeline(definitions(tmp_path, outcome=outcome), instance, {}, pipeline=PIPELINE)
        assert states[0].seconds > 0 and states[0].own_seconds == 0
    shown = capsys.readouterr().err
    counts = re.findall(r"\[running\] One (\d/3) \d\.\d s", shown)
    assert counts == (["1/3", "2/3", "3/3"] if passed else ["0/3"] * 3), shown


def test_verify_tells_failed_checks_from_crashed_ones(tmp_path: Path):
    instance = dg.DagsterInstance.ephemeral()
    defs = definitions(tmp_path)
    run(defs, instance)
    runs = len(instance.get_runs())
    assert verify(defs, instance, PIPELINE[0], "a").outcome is Outcome.PASSED
    assert verify(defs, instance, PIPELINE[1], None).outcome is Outcome.PASSED, "a step without checks"
    outcome = dg.AssetCheckResult(passed=False, description="three rows are missing")
    failed = verify(definitions(tmp_path, outcome=outcome), instance, PIPELINE[0], "a")
    check = dg.AssetCheckKey(dg.AssetKey(["t", "rows"]), "passes")
    assert (failed.outcome, failed.failed, failed.crashed) == (Outcome.FAILED, {check: "three rows are missing"}, [])
    assert failed.names == ["t/rows:passes"]
    wrong: Any = "no result"
    crashed = verify(definitions(tmp_path, outcome=wrong), instance, PIPELINE[0], "a")
    assert (crashed.outcome, crashed.failed, crashed.names) == (Outcome.CRASHED, {}, ["t/rows:passes"])
    assert len(instance.get_runs()) == runs + 3


def test_release_is_called_and_work_is_counted(tmp_path: Path):
    released: list[str] = []
    states = run_pipeline(
        definitions(tmp_path),
        dg.DagsterInstance.ephemeral(),
        {"one": lambda: released.append("one")},
        until="one",
        pipeline=PIPELINE,
    )
    assert released == ["one"]
    assert states[0].own_seconds == pytest.approx(0.75)
    assert states[1].status == StepStatus.WAITING


KILLED = """
import os, sys, time
import dagster as dg
from sbp_assets.orchestration.in_process import HOST_TAGS, RUN_TAGS
from sbp_assets.orchestration.runner import end_killed_runs

@dg.asset(pool="training")
def model():
    if sys.argv[1] == "hang":
        print("inside", flush=True)
        time.sleep(600)

job = dg.define_asset_job("job", executor_def=dg.in_process_executor)
defs = dg.Definitions(assets=[model], jobs=[job])
with dg.DagsterInstance.get() as instance:
    end_killed_runs(instance)
    assert defs.resolve_job_def("job").execute_in_process(instance=instance, tags=eval(sys.argv[2])).success
    print(sorted(run.status.value for run in instance.get_runs()))
"""


@pytest.mark.parametrize("tags", ["RUN_TAGS", "HOST_TAGS"], ids=["of sbp run", "of a daemon that is gone"])
def test_a_run_killed_inside_a_pool_does_not_hold_up_the_next(tmp_path: Path, tags: str):
    (tmp_path / "dagster.yaml").write_text(
        "concurrency: {pools: {default_limit: 1}}\n"
        "run_launcher: {module: sbp_assets.orchestration.run_launcher, class: LocalRunLauncher}\n"
    )
    (tmp_path / "script.py").write_text(KILLED)
    environ = {**os.environ, "DAGSTER_HOME": str(tmp_path)}
    command = [sys.executable, str(tmp_path / "script.py")]
    killed = subprocess.Popen([*command, "hang", tags], env=environ, stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "inside\n"
    killed.kill()
    killed.wait()
    done = subprocess.run([*command, "work", tags], env=environ, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "['FAILURE', 'SUCCESS']", done.stderr
