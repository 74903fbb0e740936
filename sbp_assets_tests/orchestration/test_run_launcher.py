"""Which runs are taken for dead, on real processes and a real instance."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.events import EngineEventData
from dagster._core.instance.ref import InstanceRef
from dagster._core.launcher import WorkerStatus

from sbp_assets.orchestration.run_launcher import HOST_TAG, LocalRunLauncher

HERE = {HOST_TAG: platform.node()}


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    (tmp_path / "dagster.yaml").write_text(
        "run_launcher: {module: sbp_assets.orchestration.run_launcher, class: LocalRunLauncher}"
    )
    with dg.DagsterInstance.from_ref(InstanceRef.from_dir(str(tmp_path))) as instance:
        yield instance


def health(instance: dg.DagsterInstance, tags: dict[str, str], pid: int | None) -> WorkerStatus:
    """Of a started run that `pid` has said it executes."""
    run = instance.create_run_for_job(dg.GraphDefinition(name="job").to_job(), tags=tags)
    if pid is not None:
        data = EngineEventData.in_process(pid)
        instance.report_engine_event(f"Started process for run (pid: {pid}).", run, data)
    launcher = instance.run_launcher
    assert isinstance(launcher, LocalRunLauncher) and launcher.supports_check_run_worker_health
    return launcher.check_run_worker_health(run).status


def test_a_living_process_is_running(instance: dg.DagsterInstance):
    assert health(instance, HERE, os.getpid()) == WorkerStatus.RUNNING


def test_a_process_that_is_gone_has_failed(instance: dg.DagsterInstance):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert health(instance, HERE, process.pid) == WorkerStatus.FAILED


def test_a_process_that_nobody_has_waited_for_has_failed(instance: dg.DagsterInstance):
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.read() == b""
    deadline = time.monotonic() + 60
    while health(instance, HERE, process.pid) != WorkerStatus.FAILED:
        assert time.monotonic() < deadline
    process.wait()


def test_a_number_given_to_another_process_since_has_failed(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
):
    # As if this process, which began long before the event, had begun after it.
    monkeypatch.setattr("sbp_assets.orchestration.run_launcher.CLOCK_SECONDS", -1e6)
    assert health(instance, HERE, os.getpid()) == WorkerStatus.FAILED


@pytest.mark.parametrize(("tags", "pid"), [({HOST_TAG: "elsewhere"}, 2**22), ({}, 2**22), (HERE, None)])
def test_what_is_not_known_is_left_alone(instance: dg.DagsterInstance, tags: dict[str, str], pid: int | None):
    assert health(instance, tags, pid) == WorkerStatus.RUNNING
