"""Runs in this process, of one partition or of a range: those of `sbp run` and `sbp verify`."""

import platform
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import dagster as dg

from sbp_assets.orchestration.materialisations import Partition
from sbp_assets.orchestration.ranges import range_tags
from sbp_assets.orchestration.run_launcher import HOST_TAG

RUN_TAGS = {"sbp/command": "run"}
HOST_TAGS = {HOST_TAG: platform.node()}
# What is killed resumes with the next `sbp run`; a daemon on the same instance shall not start it again.
NOT_RETRIED = {"dagster/max_retries": "0"}
RUN_CONFIG: dict[str, Any] = {"loggers": {"display": {}}}


def execute(
    job: dg.JobDefinition,
    instance: dg.DagsterInstance,
    partitions: Sequence[Partition],
    config: Mapping[str, Any] | None = None,
) -> dg.ExecuteInProcessResult:
    """Run `job` for a range of partitions in this process, as a run of `sbp run` that the daemon leaves alone.

    `config` is the configuration of its ops.

    Raises KeyboardInterrupt on Ctrl-C and SIGTERM: Dagster takes them for a failure of the asset, or ignores them
    outside of one, after which the next partition would begin.
    """
    with _signals() as seen:
        result = job.execute_in_process(
            instance=instance,
            partition_key=partitions[0] if len(partitions) == 1 else None,
            raise_on_error=False,
            run_config={**RUN_CONFIG, **(config or {})},
            tags=RUN_TAGS | HOST_TAGS | NOT_RETRIED | (range_tags(partitions) if len(partitions) > 1 else {}),
        )
        if seen() & {signal.SIGINT, signal.SIGTERM}:
            raise KeyboardInterrupt
    return result


@contextmanager
def _signals() -> Iterator[Callable[[], set[int]]]:
    """Yield a function that returns the signals this process has received during the block, handled or not."""
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

        def seen() -> set[int]:
            with suppress(BlockingIOError):
                return set(reader.recv(4096))
            return set()

        try:
            yield seen
        finally:
            signal.set_wakeup_fd(before)
