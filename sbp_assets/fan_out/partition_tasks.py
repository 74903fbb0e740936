"""The tasks of the partitions that one run materialises: at work together, recorded one after another."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, closing
from typing import Any, TypeVar

from sbp_assets.fan_out.engine import Engine
from sbp_assets.fan_out.task import TaskError
from sbp_assets.storage.progress import Progress

logger = logging.getLogger("sbp_assets.fan_out")

Result = TypeVar("Result")


class PartitionTasks:
    """The tasks of a run's `partitions`, one each, whose results are asked for one partition at a time.

    The first that is asked for submits them all. So every node of a cluster has work while partitions are recorded one
    by one, and in one process each task is executed when it is asked for.
    """

    def __init__(self, partitions: Sequence[str]) -> None:
        self._left = list(partitions)
        self._running: Generator[tuple[str, Any], None, None] | None = None
        self._ended: dict[str, Any] = {}
        self._clean_up: dict[str, Callable[[], None]] = {}
        self._stack = ExitStack()

    def result(
        self,
        partition: str,
        engine: Engine,
        function: Callable[..., Result],
        tasks: Callable[[Sequence[str]], Iterable[tuple[str, tuple[Any, ...]]]],
        *,
        what: str,
        cpus: int | None = 1,
        gpus: int = 0,
        memory: int = 0,
    ) -> Result:
        """Return what the task of `partition` returns; raise TaskError where that task raises.

        `tasks` returns (partition, arguments) of each of the partitions that it is given; it is asked once. `what`
        names them in lines of progress; the rest is as for Engine.outcomes, which may raise, too.
        """
        if partition not in self._ended:
            if self._running is None:
                self._submit(partition, engine, function, tasks, what, {"cpus": cpus, "gpus": gpus, "memory": memory})
            try:
                self._wait_for(partition)
            except BaseException:
                self.close()  # another partition begins again, with what has not ended
                raise
        outcome = self._ended.pop(partition)
        if partition in self._left:
            self._left.remove(partition)
        if isinstance(outcome, TaskError):
            raise outcome
        return outcome  # type: ignore[no-any-return]

    def when_recorded(self, partition: str, clean_up: Callable[[], None]) -> None:
        """Have `clean_up` called once the artifact of `partition` is recorded: what its task published is done with."""
        self._clean_up[partition] = clean_up

    def recorded(self, partition: str) -> None:
        """Clean up after `partition`, whose artifact is recorded; what fails is a warning."""
        if clean_up := self._clean_up.pop(partition, None):
            try:
                clean_up()
            except Exception as error:  # of whichever store
                logger.warning(
                    "partition %s: files of its task are left (%s); `sbp prune` finds them", partition, error
                )

    def close(self) -> None:
        """End what is at work."""
        self._running = None
        self._stack.close()

    def _submit(
        self,
        partition: str,
        engine: Engine,
        function: Callable[..., Any],
        tasks: Callable[[Sequence[str]], Iterable[tuple[str, tuple[Any, ...]]]],
        what: str,
        need: dict[str, Any],
    ) -> None:
        wanted = [one for one in self._left if one not in self._ended]
        if partition not in wanted:
            wanted.insert(0, partition)
        progress = self._stack.enter_context(Progress(what, "tasks", len(wanted)))
        found = engine.outcomes(function, tasks(wanted), **need, progress=progress)
        self._running = self._stack.enter_context(closing(found))

    def _wait_for(self, partition: str) -> None:
        assert self._running is not None
        for ended, outcome in self._running:
            self._ended[ended] = outcome
            if ended == partition:
                return
        raise RuntimeError(f"no task of partition {partition} was submitted")


def tasks_of(context: Any) -> PartitionTasks:
    """Return the tasks of the run that `context`, Dagster's of an asset, belongs to; else of its own partition."""
    found = getattr(context, "tasks", None)
    return found if isinstance(found, PartitionTasks) else PartitionTasks([context.partition_key])
