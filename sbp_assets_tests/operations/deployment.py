"""A deployment of the project for tests: own folders, real webserver, real daemon, and what a user does with them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg
import psutil
from dagster._core.instance.ref import InstanceRef

from sbp_assets.instance.home import dagster_environment
from sbp_assets.instance.storage import POSTGRES_URL, with_driver
from sbp_assets.settings import load_settings
from sbp_assets.storage.artifacts import content_version
from sbp_assets_tests import warm

CHECKOUT = Path(__file__).resolve().parents[2]
FOLDERS = {"data_dir": "artifacts", "work_dir": "work", "instance_dir": "instance"}
FINISHED = ("SUCCESS", "FAILURE", "CANCELED")
BACKFILL_FINISHED = ("COMPLETED_SUCCESS", "COMPLETED_FAILED", "COMPLETED", "CANCELED", "FAILED")
# The tests wait for conditions, never for a time; this only ends a test that hangs, also on a busy machine.
PATIENCE = 300.0

# Secrets, by the variable that holds them, in the environment of the run that finishes the store; what is written is
# searched for them.
PLANTED = {
    name: f"planted{hashlib.sha256(name.encode()).hexdigest()[:24]}"
    for name in (
        "SBP_JUDGE_API_KEY",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "HF_TOKEN",
        "OPENAI_API_KEY",
        "PGPASSWORD",
        "FSSPEC_S3_SECRET",
    )
}

Found = TypeVar("Found")


def wait_for(condition: Callable[[], Found], what: str, seconds: float = PATIENCE, every: float = 0.25) -> Found:
    """First true value of `condition`; AssertionError naming `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        if found := condition():
            return found
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(every)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def end_tree(process: subprocess.Popen[Any], how: signal.Signals = signal.SIGTERM) -> None:
    """Signal `process`, wait for it, and kill what it has left behind."""
    children = []
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:
        process.send_signal(how)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


class Deployment:
    """Profile tiny with artifacts, work and instance under `home`; a context manager that ends what it started.

    `overrides` are further environment variables, e.g. {"SBP_EXPERIMENT__CORPUS__SHARDS": "3"}; they may be changed
    (`.overrides[...] = ...`) before a process is started, which is what a user does who changes a setting.
    """

    def __init__(self, home: Path, overrides: dict[str, str] | None = None, finished: Path | None = None) -> None:
        self.home = home
        self.overrides = dict(overrides or {})
        self.port = 0
        self._processes: list[subprocess.Popen[bytes]] = []
        self._left_behind: list[psutil.Process] = []
        home.mkdir(parents=True, exist_ok=True)
        if finished:
            for folder in FOLDERS.values():
                shutil.copytree(finished / folder, home / folder, dirs_exist_ok=True)
        for folder in FOLDERS.values():
            (home / folder).mkdir(exist_ok=True)

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            end_tree(process)
        for orphan in self._left_behind:
            with contextlib.suppress(psutil.NoSuchProcess):
                orphan.kill()

    @property
    def environ(self) -> dict[str, str]:
        """Of every process of this deployment: the settings, and what `sbp env` would export."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SBP_", "DAGSTER_"))}
        environ = {
            **clean,
            "SBP_PROFILE": "tiny",
            **{f"SBP_DEPLOYMENT__{name.upper()}": str(self.home / folder) for name, folder in FOLDERS.items()},
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "DAGSTER_DISABLE_TELEMETRY": "1",
            # A run that takes longer to start is taken for failed: on a busy machine Dagster's 60 s are soon over.
            "DAGSTER_GRPC_TIMEOUT_SECONDS": str(int(PATIENCE)),
            "DAGSTER_HOME": str(CHECKOUT),
            "SBP_INSTANCE_DIR": str(self.home / FOLDERS["instance_dir"]),
            **self.overrides,
        }
        if url := environ.get(POSTGRES_URL):
            environ |= dagster_environment(load_settings(environ=environ), environ)
            environ[POSTGRES_URL] = with_driver(url)
        return environ

    @property
    def artifacts(self) -> Path:
        return self.home / FOLDERS["data_dir"]

    def versions(self, *prefixes: str) -> dict[str, str]:
        """Content version per artifact below `prefixes` (`stage/name`; default: all), by path in the store.

        The report, whose page states times, is left out.
        """
        found = {}
        for stage in sorted(self.artifacts.iterdir()):
            for asset in sorted(stage.iterdir()):
                parts = sorted(asset.iterdir()) if asset.is_dir() and _is_partitioned(asset) else [asset]
                for part in parts:
                    name = part.relative_to(self.artifacts).as_posix()
                    if part.name.startswith(".") or name.startswith("evaluation/report"):
                        continue
                    if not prefixes or name.startswith(prefixes):
                        found[name] = content_version(part)
        return found

    def start(self, *command: str, log: str, environ: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """`command` in the background, its output in home/`log`; `environ` in place of the deployment's own."""
        with (self.home / log).open("ab") as out:
            process = subprocess.Popen(command, env=environ or self.environ, stdout=out, stderr=out, cwd=self.home)
        self._processes.append(process)
        return process

    def start_daemon(self, reload_seconds: float = 600) -> subprocess.Popen[bytes]:
        """dagster-daemon: queue, backfills, sensors, schedules, run monitoring. Returns when its heart beats.

        It looks for work every second, and loads the code again after `reload_seconds` (prompt_daemon.py).
        """
        known = time.time()
        program = (sys.executable, "-m", "sbp_assets_tests.operations.prompt_daemon", str(reload_seconds))
        process = self.start(*program, "run", "-w", str(CHECKOUT / "workspace.yaml"), log="daemon.log")

        def beats(instance: dg.DagsterInstance) -> bool:
            assert process.poll() is None, self.log("daemon.log")
            status = instance.get_daemon_statuses()["QUEUED_RUN_COORDINATOR"]
            return bool(status.last_heartbeat and status.last_heartbeat.timestamp >= known)

        self.wait(beats, "the daemon's first heartbeat")
        return process

    def start_webserver(self) -> subprocess.Popen[bytes]:
        """dagster-webserver on a free port of loopback (`.url`). Returns when it serves and has loaded the code."""
        self.port = self.port or free_port()
        process = self.start(
            sys.executable,
            "-m",
            "dagster_webserver",
            "-w",
            str(CHECKOUT / "workspace.yaml"),
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
            log="webserver.log",
        )

        self.wait_served(process, "webserver.log")
        return process

    def wait_served(self, process: subprocess.Popen[bytes], log: str) -> None:
        """Return when the webserver on `.port`, which `process` is or has started, serves and has loaded the code."""

        def serves() -> bool:
            assert process.poll() is None, self.log(log)
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                return bool(self.graphql("{ assetNodes { assetKey { path } } }")["assetNodes"])
            return False

        wait_for(serves, "the webserver")

    def stop(self, process: subprocess.Popen[bytes], how: signal.Signals = signal.SIGTERM, alone: bool = False) -> None:
        """End a process started here, politely or, with SIGKILL, not; `alone`: what it has started lives on."""
        if alone:
            self._left_behind += psutil.Process(process.pid).children(recursive=True)
            process.send_signal(how)
            process.wait(PATIENCE)
        else:
            end_tree(process, how)
        self._processes.remove(process)

    def log(self, name: str) -> str:
        path = self.home / name
        return path.read_text(errors="replace")[-5000:] if path.is_file() else ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def graphql(self, query: str, **variables: Any) -> dict[str, Any]:
        """`data` of the webserver's answer; AssertionError with its errors."""
        request = urllib.request.Request(
            f"{self.url}/graphql",
            data=json.dumps({"query": query, "variables": variables}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)
        assert not answer.get("errors"), answer["errors"]
        return answer["data"]

    @contextlib.contextmanager
    def instance(self) -> Iterator[dg.DagsterInstance]:
        """The Dagster instance as another process of this deployment opens it, to look into and assert on."""
        environ, before = self.environ, dict(os.environ)
        try:
            os.environ.update(environ)
            with dg.DagsterInstance.from_ref(InstanceRef.from_dir(environ["DAGSTER_HOME"])) as instance:
                yield instance
        finally:
            os.environ.clear()
            os.environ.update(before)

    def wait(
        self, look: Callable[[dg.DagsterInstance], Found], what: str, seconds: float = PATIENCE, every: float = 0.25
    ) -> Found:
        """As `wait_for`, of the instance: opened once, which takes 58 ms of the processor, where to ask it takes 3."""
        with self.instance() as instance:
            return wait_for(lambda: look(instance), what, seconds, every)

    def sbp(
        self, *arguments: str, check: bool = True, seconds: float = 900, fresh: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """`sbp ARGUMENTS` with this deployment's settings; with `check` its failure is an AssertionError.

        Its process has the modules of the commands imported already, unless `fresh`.
        """
        if fresh:
            command = [sys.executable, "-m", "sbp_assets.cli", *arguments]
            done = subprocess.run(
                command, env=self.environ, capture_output=True, text=True, timeout=seconds, cwd=self.home
            )
        else:
            done = warm.call(arguments, self.environ, self.home, seconds)
        assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done

    def launch(self, job: str, partition: str | None = None, retried: bool = False) -> str:
        """Launch a job as the UI's button does (needs the webserver); returns the run's id.

        Unless `retried`, the daemon does not start it again when it crashes, as it otherwise would.
        """
        tags = {"dagster/partition": partition} if partition else {}
        if not retried:
            tags["dagster/max_retries"] = "0"
        answer = self.graphql(
            """mutation ($params: ExecutionParams!) { launchRun(executionParams: $params) {
                 __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }""",
            params={
                "selector": {
                    "repositoryLocationName": "sbp_assets",
                    "repositoryName": "__repository__",
                    "jobName": job,
                },
                "executionMetadata": {"tags": [{"key": key, "value": value} for key, value in tags.items()]},
            },
        )["launchRun"]
        assert answer["__typename"] == "LaunchRunSuccess", answer
        return answer["run"]["runId"]

    def backfill(self, assets: list[str], partitions: list[str]) -> str:
        """Launch a backfill of `assets` (`stage/name`) over `partitions` as the UI does; returns its id."""
        answer = self.graphql(
            """mutation ($params: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $params) {
                 __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }""",
            params={"assetSelection": [{"path": name.split("/")} for name in assets], "partitionNames": partitions},
        )["launchPartitionBackfill"]
        assert answer["__typename"] == "LaunchBackfillSuccess", answer
        return answer["backfillId"]

    def terminate(self, run_id: str) -> None:
        """Cancel a run as the UI's button does."""
        answer = self.graphql(
            """mutation ($ids: [String!]!) { terminateRuns(runIds: $ids, terminatePolicy: SAFE_TERMINATE) {
                 __typename ... on TerminateRunsResult { terminateRunResults { __typename } } } }""",
            ids=[run_id],
        )["terminateRuns"]
        assert answer == {
            "__typename": "TerminateRunsResult",
            "terminateRunResults": [{"__typename": "TerminateRunSuccess"}],
        }

    def wait_step(self, run_id: str) -> psutil.Process:
        """The process that executes the run, once its first asset is being materialised."""

        def begun(instance: dg.DagsterInstance) -> bool:
            if instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_START):
                return True
            run = instance.get_run_by_id(run_id)
            assert run and run.status.value not in FINISHED, f"run {run_id} ended before its first step"
            return False

        self.wait(begun, f"the first step of run {run_id}", every=0.05)
        with self.instance() as instance:
            events = instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)
        pids = [event.get_dagster_event().engine_event_data.metadata.get("pid") for event in events]
        return psutil.Process(int(next(str(pid.value) for pid in pids if pid)))

    def slot_holders(self) -> set[str]:
        """Runs that hold a place in a pool."""
        with self.instance() as instance:
            return set(instance.event_log_storage.get_concurrency_run_ids())

    def wait_run(self, run_id: str, seconds: float = PATIENCE) -> str:
        """Status in which the run ended."""

        def ended(instance: dg.DagsterInstance) -> str:
            run = instance.get_run_by_id(run_id)
            return run.status.value if run and run.status.value in FINISHED else ""

        return self.wait(ended, f"run {run_id}", seconds)

    def wait_backfill(self, backfill_id: str, seconds: float = PATIENCE) -> str:
        """Status in which the backfill ended."""

        def ended(instance: dg.DagsterInstance) -> str:
            backfill = instance.get_backfill(backfill_id)
            return backfill.status.value if backfill and backfill.status.value in BACKFILL_FINISHED else ""

        return self.wait(ended, f"backfill {backfill_id}", seconds)


def _is_partitioned(asset: Path) -> bool:
    """Whether a folder of the store holds one artifact per partition: its entries are named by shard or seed."""
    names = [entry.name.removesuffix(".parquet") for entry in asset.iterdir() if not entry.name.startswith(".")]
    return all(name.isdigit() for name in names)  # and a folder without any holds no artifact
