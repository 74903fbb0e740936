"""The interface of the engines that execute tasks, and the default one: a loop in this process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, TypeVar

from sbp_assets.fan_out.task import TaskError, execute, prepared, result_of
from sbp_assets.settings import Settings
from sbp_assets.storage.progress import Progress

Result = TypeVar("Result")


class Engine(ABC):
    """Executes independent tasks. Whoever opens one closes it."""

    @abstractmethod
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
        """Yield (key, `function(*arguments)`) of each (key, arguments) of `tasks`, as they end, in any order.

        In the place of the result of a task that has raised stands a TaskError; the others go on.

        `function` is at the top of a module; arguments and results are small (LARGEST_ARGUMENTS, LARGEST_RESULT) and
        pickled. What a task makes it publishes itself, whole, in a store that all nodes see, and it skips what is there
        already (PublishedFiles): a task may be executed again, even while a lost node still executes it. A task
        computes on `cpus` threads (None: as many as this process has, and on a node one) and on `gpus` GPUs, and takes
        about `memory` bytes. `tasks` are asked for as they are needed. `progress`, in tasks, is advanced while tasks
        run. Once the iterator is closed, no task is at work any more.

        Raises TypeError or ValueError where a task cannot be sent to a node.
        """

    def run(
        self,
        function: Callable[..., Result],
        tasks: Iterable[tuple[str, tuple[Any, ...]]],
        *,
        cpus: int | None = 1,
        gpus: int = 0,
        memory: int = 0,
        progress: Progress | None = None,
    ) -> Iterator[tuple[str, Result]]:
        """Yield what `outcomes` yields, but raise the TaskError of the first task that raises: the others end."""
        found = self.outcomes(function, tasks, cpus=cpus, gpus=gpus, memory=memory, progress=progress)
        with closing(found):
            for key, outcome in found:
                if isinstance(outcome, TaskError):
                    raise outcome
                yield key, outcome

    @abstractmethod
    def close(self) -> None:
        """Give back what the engine holds; the next task opens it again."""


class InProcess(Engine):
    """Executes one task after another in this process, in their order; of what a task needs it looks at `cpus`."""

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
        """Yield (key, result) of each task, as Engine.outcomes says."""
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
