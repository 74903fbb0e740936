"""Materialise the whole pipeline in one process, step by step, leaving out what is fresh.

One process means each engine is loaded once for all shards. Every materialisation is a run of the Dagster instance,
so the UI shows it like any other.
"""

from __future__ import annotations

import logging
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import dagster as dg
from dagster._core.launcher import WorkerStatus
from dagster._core.loader import LoadingContext
from dagster._core.storage.dagster_run import FINISHED_STATUSES, NOT_FINISHED_STATUSES
from dagster._utils.error import SerializableErrorInfo
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sbp_assets.dagster_support.preview import printable
from sbp_assets.orchestration.pipeline import DISPLAY_LOGGER, PIPELINE, Step
from sbp_assets.orchestration.run_launcher import HOST_TAG
from sbp_assets.orchestration.staleness import Staleness, is_unchecked

ERROR = dg.AssetCheckSeverity.ERROR
RUN_TAGS = {"sbp/command": "run"}
HOST_TAGS = {HOST_TAG: platform.node()}
# What is killed goes on with the next `sbp run`; a daemon on the same instance shall not start it again.
NOT_RETRIED = {"dagster/max_retries": "0"}
RUN_CONFIG: dict[str, Any] = {"loggers": {"display": {}}}


class PipelineError(RuntimeError):
    """A step failed; the message names the partitions, the reason and how to go on."""


@dataclass
class StepState:
    """What the display shows of a step, and what it took."""

    step: Step
    partitions: list[str | None]
    status: str = "waiting"  # waiting, running, done, fresh, failed
    finished: int = 0
    seconds: float = 0.0
    line: str = ""
    own_seconds: float = 0.0
    failures: dict[str | None, str] = field(default_factory=dict)


class Loading(LoadingContext):
    """What Dagster's resolvers load through."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self._instance = instance
        self._loaders: dict = {}

    @property
    def instance(self) -> dg.DagsterInstance:
        return self._instance

    @property
    def loaders(self) -> dict:
        return self._loaders


def pending_partitions(defs: dg.Definitions, instance: dg.DagsterInstance, step: Step) -> list[str | None]:
    """Partitions of `step` (None: unpartitioned) with an asset missing or stale, or a check that does not hold."""
    return list(_standing(defs, instance, step))


def _standing(defs: dg.Definitions, instance: dg.DagsterInstance, step: Step) -> dict[str | None, str]:
    """'stale' per pending partition, or 'unchecked' where all that is missing is that a blocking check has been run."""
    staleness = Staleness(defs.resolve_asset_graph(), instance)
    reasons: dict[str | None, set[str]] = {}
    for key in step.keys:
        for partition, reason in staleness.pending(key).items():
            reasons.setdefault(partition, set()).add("unchecked" if is_unchecked(reason) else "stale")
    return {p: "stale" if "stale" in reasons[p] else "unchecked" for p in step_partitions(defs, step) if p in reasons}


class Verdict(NamedTuple):
    """Checks, by name, that failed as errors, and those that could not be evaluated because they crashed."""

    failed: list[str]
    crashed: list[str]
    reasons: dict[str, str]  # of those that failed, in Markdown


def verify(defs: dg.Definitions, instance: dg.DagsterInstance, step: Step, partition: str | None) -> Verdict:
    """Run the checks of `step` alone on the artifacts as they lie in the store.

    Makes nothing anew. The evaluations are recorded: what failed stops the nightly automation, and `sbp run` makes the
    partition again before anything that reads it.
    """
    checks = {key for key in defs.resolve_asset_graph().asset_check_keys if key.asset_key in step.keys}
    if not checks:
        return Verdict([], [], {})
    job = defs.resolve_job_def(step.name).get_subset(asset_check_selection=checks)
    result = _execute(job, instance, partition)
    evaluations = {evaluation.asset_check_key: evaluation for evaluation in result.get_asset_check_evaluations()}
    reasons = {
        key.to_user_string(): found.description or ""
        for key, found in evaluations.items()
        if not found.passed and found.severity == ERROR
    }
    crashed = sorted(key.to_user_string() for key in checks - evaluations.keys())
    return Verdict(sorted(reasons), crashed, reasons)


def step_partitions(defs: dg.Definitions, step: Step) -> list[str | None]:
    """All partition keys of the step's assets; [None] where they are unpartitioned."""
    partitions = defs.resolve_asset_graph().get(step.keys[0]).partitions_def
    return list(partitions.get_partition_keys()) if partitions else [None]


def end_killed_runs(instance: dg.DagsterInstance) -> None:
    """Mark killed runs as failed and free what they and ended ones hold: those of `sbp run`, and of this host's daemon.

    Dagster frees the pool slots of a run when it ends; a killed one never ends, and the next would wait for ever. To be
    called by the one process that may run the pipeline (see `exclusive`), so that whatever is unfinished of `sbp run`
    is dead.
    """
    for run in instance.get_runs(dg.RunsFilter(statuses=NOT_FINISHED_STATUSES, tags=RUN_TAGS)):
        instance.report_run_failed(run, message="The process of `sbp run` was killed.")
    if instance.run_launcher.supports_check_run_worker_health:
        for run in instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED], tags=HOST_TAGS)):
            health = instance.run_launcher.check_run_worker_health(run)
            ended = instance.get_run_by_id(run.run_id)  # well, perhaps, since it was listed
            if health.status == WorkerStatus.FAILED and ended and not ended.is_finished:
                instance.report_run_failed(run, message=f"Found by `sbp run`: {health.msg}.")
    # The daemon frees slots too, but may not be running.
    if holders := instance.event_log_storage.get_concurrency_run_ids():
        for run in instance.get_runs(dg.RunsFilter(run_ids=list(holders), statuses=FINISHED_STATUSES)):
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)


def run_pipeline(
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    after_step: dict[str, Callable[[], None]],
    until: str | None = None,
    refresh: bool = False,
    pipeline: Sequence[Step] = PIPELINE,
) -> list[StepState]:
    """Run every step in order for its pending partitions; returns what each took.

    A failing partition does not stop the others of its step; it does stop the steps after it with a PipelineError.
    `after_step` maps step names to functions called when a step ends, to release its engine. `refresh` runs the first
    step even if it is fresh: nothing Dagster knows tells that files at the source have changed.
    """
    states = [StepState(step, step_partitions(defs, step)) for step in pipeline]
    with _display(states) as listen:
        for state in states:
            _run_step(defs, instance, state, listen, force=refresh and state is states[0])
            if release := after_step.get(state.step.name):
                release()
            if state.failures or until == state.step.name:
                break
    for state in states:
        if state.failures:
            reasons = "\n".join(f"  {p or state.step.name}: {reason}" for p, reason in state.failures.items())
            raise PipelineError(
                f"{state.step.title} failed for {len(state.failures)} of {len(state.partitions)}:\n{reasons}\n"
                "What was made is kept. Mend the cause and run the same command again; `sbp ui` shows the failed runs."
            )
    return states


def _run_step(
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    state: StepState,
    listen: Callable[[StepState], None],
    force: bool,
) -> None:
    listen(state)
    standing = dict.fromkeys(state.partitions, "stale") if force else _standing(defs, instance, state.step)
    pending = list(standing)
    state.finished = len(state.partitions) - len(pending)
    if not pending:
        state.status = "fresh"
        listen(state)
        return
    state.status, started = "running", time.monotonic()
    listen(state)
    job = defs.resolve_job_def(state.step.name)
    for partition in pending:
        # A check that is newer than the artifact: a model need not be trained again to be looked at.
        if standing[partition] == "unchecked":
            verdict = verify(defs, instance, state.step, partition)
            if verdict.crashed and not verdict.failed:
                # No word against the artifact: the store may be away, or the check wrong.
                state.failures[partition] = f"check crashed: {', '.join(verdict.crashed)}; its run's log says why"
                continue
            if not verdict.failed:
                state.finished += 1
                continue
        result = _execute(job, instance, partition)
        if result.success:
            state.finished += 1
        else:
            state.failures[partition] = _failure(result)
        state.own_seconds += sum(_wall_seconds(result))
        state.seconds = time.monotonic() - started
        listen(state)
    state.status = "failed" if state.failures else "done"
    listen(state)


def _execute(job: dg.JobDefinition, instance: dg.DagsterInstance, partition: str | None) -> dg.ExecuteInProcessResult:
    """Run `job` in this process, as a run of `sbp run` that the daemon leaves alone.

    KeyboardInterrupt for Ctrl-C and SIGTERM: Dagster takes them for a failure of the asset, or outside of one for
    nothing at all, after which the next partition would begin.
    """
    with _signals() as seen:
        result = job.execute_in_process(
            instance=instance,
            partition_key=partition,
            raise_on_error=False,
            run_config=RUN_CONFIG,
            tags=RUN_TAGS | HOST_TAGS | NOT_RETRIED,
        )
        if seen() & {signal.SIGINT, signal.SIGTERM}:
            raise KeyboardInterrupt
    return result


@contextmanager
def _signals() -> Iterator[Callable[[], set[int]]]:
    """Signals that have come to this process during the block, whoever handles them: asked for by calling."""
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


def _wall_seconds(result: dg.ExecuteInProcessResult) -> Iterator[float]:
    for event in result.get_asset_materialization_events():
        value = event.materialization.metadata.get("wall_seconds")
        if value is not None:
            yield float(str(value.value))


def _failure(result: dg.ExecuteInProcessResult) -> str:
    for event in result.all_events:
        if event.is_step_failure and (error := event.step_failure_data.error):
            # A file's name in it is as untrusted as its text.
            return f"{event.step_key}: " + "\n".join(map(printable, raised(error).message.strip().splitlines()))
    checks = [e.check_name for e in result.get_asset_check_evaluations() if not e.passed]
    return f"check failed: {', '.join(checks)}" if checks else "the run failed; see its log in the UI"


def raised(error: SerializableErrorInfo) -> SerializableErrorInfo:
    """What the asset raised, which Dagster wraps; what that was raised from is a library's word, not ours."""
    while error.cause is not None and (error.cls_name or "").startswith("Dagster"):
        error = error.cause
    return error


@contextmanager
def _display(states: list[StepState]) -> Iterator[Callable[[StepState], None]]:
    """Live table on a terminal; plain lines, at most one each 10 s per step, elsewhere."""
    # Bound to the stream and asked once: while Live runs, sys.stderr is a proxy of its own and no terminal.
    console = Console(file=sys.stderr)
    live = console.is_terminal
    logger = logging.getLogger(DISPLAY_LOGGER)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    current: list[StepState] = []
    started = time.monotonic()
    last_printed = [0.0]

    def render() -> Group:
        table = Table(box=None, pad_edge=False)
        for column in ("step", "shards", "time", "progress"):
            table.add_column(column, justify="right" if column in ("shards", "time") else "left", overflow="ellipsis")
        styles = {"waiting": "dim", "running": "bold cyan", "done": "green", "fresh": "dim green", "failed": "bold red"}
        for state in states:
            note = state.line if state.status == "running" else {"fresh": "up to date"}.get(state.status, "")
            count = f"{state.finished}/{len(state.partitions)}"
            clock = f"{state.seconds:.0f} s" if state.seconds else ""
            table.add_row(Text(state.step.title, styles[state.status]), count, clock, Text(note, no_wrap=True))
        return Group(table, Text(f"{time.monotonic() - started:.0f} s", "dim"))

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            meta: dict[str, Any] = getattr(record, "dagster_meta", {})
            message = str(meta.get("orig_message", ""))
            if record.levelno == logging.WARNING:  # errors are told once, by PipelineError
                console.print(f"[yellow]{record.levelname.lower()}[/] ", Text(printable(message)))
            if " · " not in message or not current:
                return
            current[-1].line = message
            if not live and time.monotonic() - last_printed[0] >= 10:
                last_printed[0] = time.monotonic()
                print(f"  {message}", file=sys.stderr, flush=True)

    handler = Lines()
    logger.addHandler(handler)

    def listen(state: StepState) -> None:
        if not current or current[-1] is not state:
            current.append(state)
        if not live and state.status in ("done", "fresh", "failed", "running"):
            note = f"{state.seconds:.1f} s" if state.seconds else ""
            count = f"{state.finished}/{len(state.partitions)}"
            print(f"[{state.status:>7}] {state.step.title} {count} {note}".rstrip(), file=sys.stderr, flush=True)

    try:
        if live:
            with Live(get_renderable=render, console=console, refresh_per_second=4, redirect_stdout=False):
                yield listen
        else:
            yield listen
    finally:
        logger.removeHandler(handler)
