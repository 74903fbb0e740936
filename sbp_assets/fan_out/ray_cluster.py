"""Tasks on the nodes of a Ray cluster (Ray Core).

Nothing that lasts is in Ray's object store: arguments and results travel with the messages about a task, and files go
through the artifact store. So a node may be lost at any time, and with the driver only the work in flight is lost.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sbp_assets.fan_out.engine import Engine
from sbp_assets.fan_out.identity import Identity, versions
from sbp_assets.fan_out.task import Failure, Task, TaskError, execute, prepared, result_of
from sbp_assets.settings import Settings
from sbp_assets.storage.progress import Progress
from sbp_assets.storage.remote import is_local, root

logger = logging.getLogger("sbp_assets.fan_out")

Result = TypeVar("Result")

LOCAL = "local"
# Tasks submitted for each one that the cluster can execute at a time: the next one is there when a core is free.
_SUBMITTED_PER_SLOT = 2
# How often a task's worker or node may be lost. A task that takes more memory than its node has loses it each time.
_ATTEMPTS = 5
# Seconds between two looks at the nodes, for which a cancelled task may clean up after itself, and for which a node may
# take to start a process and say what it is.
_LOOK, _CLEAN_UP, _ANSWER = 5.0, 5.0, 120.0
# Bytes; Ray's least but a little. Nothing of a task goes through the object store.
_OBJECT_STORE = 100 * 2**20


class ClusterError(RuntimeError):
    """The cluster cannot execute the tasks: the message says which node is to blame, or what is missing."""


@dataclass(frozen=True)
class _Need:
    """What a task takes of a node: cores, GPUs, and bytes of memory."""

    cpus: int
    gpus: int
    memory: int

    def __str__(self) -> str:
        gpus = f", {self.gpus} GPUs" if self.gpus else ""
        return f"{self.cpus} CPUs{gpus} and {self.memory / 1e9:.1f} GB"

    def times(self, resources: dict[str, float]) -> int:
        """Return how many such tasks a node with `resources` executes at a time."""
        needed = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}
        return int(min(resources.get(name, 0) // count for name, count in needed.items() if count))


@dataclass(frozen=True)
class _Outcome:
    node: str
    result: bytes | Failure
    differences: list[str]


def _on_node(task: Task | None, identity: Identity) -> _Outcome:
    """Execute `task` on a node, unless that differs from the driver; None: only say how it differs."""
    import ray

    node = ray.util.get_node_ip_address()
    if differences := identity.differences():
        return _Outcome(node, b"", differences)
    return _Outcome(node, execute(task) if task else b"", [])


class RayCluster(Engine):
    """Executes tasks on the cluster at `deployment.ray_address`; "local": on one that it starts on this machine."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ray: Any = None
        self._started = False
        self._looked = -_LOOK
        self._nodes: list[dict[str, Any]] = []

    def outcomes(
        self,
        function: Callable[..., Result],
        tasks: Iterable[tuple[str, tuple[Any, ...]]],
        *,
        cpus: int | None = 1,
        gpus: int = 0,
        memory: int = 0,
        progress: Progress | None = None,
    ) -> Generator[tuple[str, Result | TaskError], None, None]:
        """Yield (key, result) of each task as it ends, as Engine.outcomes says.

        A task whose worker or node is lost is submitted again, several times; one that raises is not. Raises
        ClusterError where the cluster cannot be reached, where no node has what a task needs, and where a node differs
        from this process in its packages or settings, or does not see the artifact store.
        """
        ray = self._connect()
        need = _Need(cpus or 1, gpus, memory)
        waiting = (prepared(key, function, arguments, need.cpus) for key, arguments in tasks)
        running: dict[Any, Task] = {}
        lost: deque[Task] = deque()
        losses: Counter[str] = Counter()
        with self._shared_file() as token:
            identity = Identity(versions(), self._settings, token)
            self._require_room(need)
            self._require_equal_nodes(identity)
            remote = ray.remote(_on_node).options(
                name=function.__name__,
                num_cpus=need.cpus,
                num_gpus=need.gpus,
                memory=need.memory,
                max_retries=0,
                scheduling_strategy="SPREAD",
            )
            try:
                while True:
                    while len(running) < _SUBMITTED_PER_SLOT * max(1, self._slots(need)):
                        task = lost.popleft() if lost else next(waiting, None)
                        if task is None:
                            break
                        running[remote.remote(task, identity)] = task
                    if not running:
                        return
                    for reference in ray.wait(list(running), num_returns=1, timeout=1)[0]:
                        task = running.pop(reference)
                        try:
                            outcome: _Outcome = ray.get(reference)
                        except ray.exceptions.RayError as error:
                            losses[task.key] += 1
                            result = self._lost(task, error, losses[task.key])
                            if result is None:
                                lost.append(task)
                                continue
                        else:
                            if outcome.differences:
                                raise _refusal({outcome.node: outcome.differences})
                            result = result_of(task.key, outcome.result, outcome.node)
                        del losses[task.key]
                        if progress:
                            progress.advance()
                        yield task.key, result
                    if self._look() and not self._slots(need):
                        logger.warning("%s any more; waiting for one", self._too_small(need))
                    if progress:
                        progress.advance(0, f"{len(running)} submitted to {len(self._workers())} nodes")
            finally:
                self._cancel(list(running))

    def close(self) -> None:
        """Disconnect, which ends what is at work; a cluster that was started here ends."""
        if self._started:
            self._ray.shutdown()
        self._ray, self._started = None, False

    def _connect(self) -> Any:
        if self._ray:
            return self._ray
        try:
            import ray
        except ImportError as error:
            raise ClusterError(
                "deployment.ray_address is set, and Ray is not installed: pip install -r requirements/ray.lock, or "
                "set it to null to work in this process"
            ) from error
        address = self._settings.deployment.ray_address
        # Ray sends its makers what runs on a cluster, unless told not to.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        own: dict[str, Any] = (
            {"include_dashboard": False, "object_store_memory": _OBJECT_STORE} if address == LOCAL else {}
        )
        try:
            _require_answer(address)
            if not ray.is_initialized():
                with _own_signal_handler():
                    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **own)
                self._started = True
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            # The cause says more, that a token is missing, say, at the end of Ray's own traceback.
            reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")
            raise ClusterError(
                f"no Ray cluster can be used at deployment.ray_address {address}: {reason}. This machine has to be one "
                "of its nodes: see docs/cluster.md"
            ) from error
        self._ray = ray
        return ray

    def _look(self) -> bool:
        """Look at the nodes, if that is a while ago; return whether there are others than before."""
        if time.monotonic() - self._looked < _LOOK:
            return False
        before = {node["NodeID"] for node in self._nodes}
        self._nodes = [node for node in self._ray.nodes() if node["Alive"]]
        self._looked = time.monotonic()
        return before != {node["NodeID"] for node in self._nodes}

    def _require_room(self, need: _Need) -> None:
        """Raise ClusterError where no node is large enough for a task."""
        self._looked = -_LOOK
        self._look()
        if not self._slots(need):
            raise ClusterError(f"{self._too_small(need)}: add a larger one, or make the tasks smaller")

    def _too_small(self, need: _Need) -> str:
        nodes = [(node["NodeManagerAddress"], node["Resources"]) for node in self._nodes]
        sizes = [
            f"{name}: {has.get('CPU', 0):g}, {has.get('GPU', 0):g} GPUs, {has.get('memory', 0) / 1e9:.1f} GB"
            if need.gpus
            else f"{name}: {has.get('CPU', 0):g}, {has.get('memory', 0) / 1e9:.1f} GB"
            for name, has in nodes
        ]
        return f"no node has the {need} of a task ({'; '.join(sizes)})"

    def _slots(self, need: _Need) -> int:
        """Return how many tasks the cluster can execute at a time."""
        return sum(need.times(node["Resources"]) for node in self._nodes)

    def _workers(self) -> list[dict[str, Any]]:
        """Return the nodes that can execute something: the head often has no cores for tasks."""
        return [node for node in self._nodes if node["Resources"].get("CPU", 0)]

    def _require_equal_nodes(self, identity: Identity) -> None:
        """Raise ClusterError that names every node that differs from this process, before a task is submitted."""
        ray = self._ray
        remote = ray.remote(_on_node)
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        asked = {
            remote.options(num_cpus=0, max_retries=0, scheduling_strategy=strategy(node["NodeID"], soft=False)).remote(
                None, identity
            ): node["NodeManagerAddress"]
            for node in self._workers()
        }
        ended, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER)
        differing: dict[str, list[str]] = {}
        for reference in ended:
            try:
                found = ray.get(reference).differences
            except ray.exceptions.RayTaskError as error:
                found = [_no_import(error)]
            except ray.exceptions.RayError:
                continue  # gone since: what is not there executes nothing
            if found:
                differing[asked[reference]] = found
        for reference in silent:
            differing[asked[reference]] = [f"it has not started a process in {_ANSWER:.0f} s"]
            ray.cancel(reference, force=True)
        if differing:
            raise _refusal(differing)

    def _lost(self, task: Task, error: Exception, times: int) -> TaskError | None:
        """Log that the worker of `task` was lost, for the `times`-th time; return a TaskError where that is too often.

        Raises ClusterError where `error` says that the worker could not begin.
        """
        if isinstance(error, self._ray.exceptions.RayTaskError):
            raise _refusal({error.ip: [_no_import(error)]}) from error
        self._looked = -_LOOK
        reason = (str(error).strip().splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {reason}"
        if times >= _ATTEMPTS:
            failure = TaskError(f"task {task.key}: its worker was lost {times} times, the last time by {reason}")
            failure.__cause__ = error
            return failure
        logger.warning("task %s: its worker was lost (%s); submitting it again", task.key, reason)
        return None

    def _cancel(self, running: list[Any]) -> None:
        """End these tasks, at work or not: first as Ctrl-C does, so that they remove what is half-written."""
        if not running or not self._ray or not self._ray.is_initialized():
            return
        for force in (False, True):
            for reference in running:
                self._ray.cancel(reference, force=force)
            running = self._ray.wait(running, num_returns=len(running), timeout=_CLEAN_UP)[1]
            if not running:
                return

    @contextmanager
    def _shared_file(self) -> Iterator[Path | None]:
        """Yield a new file in the artifact store by which nodes show that they see it; None where it is no folder."""
        store = root(self._settings.deployment.data_dir)
        if not is_local(store):
            yield None
            return
        # Named as an unfinished write, so that `sbp prune` removes what a killed driver leaves.
        file = Path(store.path) / f".fan-out.{uuid.uuid4().hex}.partial"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        try:
            yield file
        finally:
            file.unlink(missing_ok=True)


def _require_answer(address: str | None) -> None:
    """Raise OSError where nothing listens at host:port: Ray would try for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if colon:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _refusal(differing: dict[str, list[str]]) -> ClusterError:
    lines = [f"node {node}: {'; '.join(differences)}" for node, differences in sorted(differing.items())]
    return ClusterError("\n  ".join(["these nodes cannot execute tasks beside this process:", *lines]))


def _no_import(error: Any) -> str:
    lines = str(error.cause or error).strip().splitlines()
    return f"it cannot import sbp_assets as it is here ({lines[-1] if lines else type(error).__name__})"


@contextmanager
def _own_signal_handler() -> Iterator[None]:
    """Keep the process's handler of SIGTERM in the block: Ray puts one of its own in the place of Dagster's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
