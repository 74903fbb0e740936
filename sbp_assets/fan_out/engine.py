"""The interface of the engines that execute tasks, and the default one: a loop in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from sbp_assets.fan_out.task import execute, prepared, result_of
from sbp_assets.settings import Settings
from sbp_assets.storage.progress import Progress

Result = TypeVar("Result")


class Engine(Protocol):
    """Executes independent tasks. Whoever opens one closes it."""

    def run(
        self,
        function: Callable[..., Result],
        tasks: Iterable[tuple[str, tuple[Any, ...]]],
        *,
        cpus: int = 1,
        memory: int = 0,
        progress: Progress | None = None,
    ) -> Iterator[tuple[str, Result]]:
        """Yield (key, `function(*arguments)`) of each (key, arguments) of `tasks`, as they end, in any order.

        `function` is at the top of a module; arguments and results are small (LARGEST_ARGUMENTS, LARGEST_RESULT) and
        pickled. What a task makes it publishes itself, whole, in a store that all nodes see, and it skips what is there
        already (PublishedFiles): a task may be executed again, even while a lost node still executes it. A task
        computes on `cpus` threads and takes about `memory` bytes. `tasks` are asked for as they are needed. `progress`,
        in tasks, is advanced while tasks run. Once the iterator is closed, no task is at work any more.

        Raises TaskError when a task raises: the others are cancelled. Raises TypeError or ValueError where a task
        cannot be sent to a node.
        """
        ...

    def close(self) -> None:
        """Give back what the engine holds; the next `run` opens it again."""
        ...


class InProcess:
    """Executes one task after another in this process, in their order; `memory` is not looked at."""

    def run(
        self,
        function: Callable[..., Result],
        tasks: Iterable[tuple[str, tuple[Any, ...]]],
        *,
        cpus: int = 1,
        memory: int = 0,
        progress: Progress | None = None,
    ) -> Iterator[tuple[str, Result]]:
        """Yield (key, result) of each task, as Engine.run says."""
        for key, arguments in tasks:
            # Through bytes as on a cluster, so that what fails there fails here.
            result = result_of(key, execute(prepared(key, function, arguments, cpus)))
            if progress:
                progress.advance()
            yield key, result

    def close(self) -> None:
        """Do nothing: the process is the caller's own."""


def open_engine(settings: Settings) -> Engine:
    """Return the engine of `deployment.ray_address`: the loop in this process where it is null, else the cluster.

    Nothing is started or connected before the first task.
    """
    if settings.deployment.ray_address is None:
        return InProcess()
    from sbp_assets.fan_out.ray_cluster import RayCluster

    return RayCluster(settings)
