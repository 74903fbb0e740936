"""What `sbp run` shows while it runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import dagster as dg
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sbp_assets.dagster_support.preview import printable
from sbp_assets.orchestration.pipeline import DISPLAY_LOGGER, Step

SECONDS_BETWEEN_LINES = 10


class StepStatus(StrEnum):
    """How far `sbp run` is with a step."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FRESH = "fresh"
    FAILED = "failed"


STYLES = {
    StepStatus.WAITING: "dim",
    StepStatus.RUNNING: "bold cyan",
    StepStatus.DONE: "green",
    StepStatus.FRESH: "dim green",
    StepStatus.FAILED: "bold red",
}


@dataclass
class StepState:
    """What the display shows of a step, and what the step took."""

    step: Step
    partitions: list[str | None]
    status: StepStatus = StepStatus.WAITING
    finished: int = 0  # partitions
    materialised: int = 0  # partitions of the run that goes on
    seconds: float = 0.0
    line: str = ""
    own_seconds: float = 0.0  # of `seconds`, in the assets themselves
    failures: dict[str | None, str] = field(default_factory=dict)

    @property
    def count(self) -> str:
        """Return the finished partitions of all, as in '3/8'; of a run of many, those that it has materialised."""
        return f"{self.finished + self.materialised}/{len(self.partitions)}"


@contextmanager
def display(states: Sequence[StepState]) -> Iterator[Callable[[StepState], None]]:
    """Show `states` for as long as the block runs; yields the function to call when one of them has changed.

    Where there is no terminal, a step's progress is printed at most once in 10 s.
    """
    # Bound to the stream and asked once: while Live runs, sys.stderr is a proxy of its own and no terminal.
    console = Console(file=sys.stderr)
    live = console.is_terminal
    handler = _ProgressHandler(console, live)
    started = time.monotonic()

    def listen(state: StepState) -> None:
        handler.state = state
        if not live and state.status is not StepStatus.WAITING:
            note = f"{state.seconds:.1f} s" if state.seconds else ""
            print(f"[{state.status:>7}] {state.step.title} {state.count} {note}".rstrip(), file=sys.stderr, flush=True)

    logger = logging.getLogger(DISPLAY_LOGGER)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        if live:
            with Live(
                get_renderable=lambda: _table(states, time.monotonic() - started),
                console=console,
                refresh_per_second=4,
                redirect_stdout=False,
            ):
                yield listen
        else:
            yield listen
    finally:
        logger.removeHandler(handler)


def _table(states: Sequence[StepState], seconds: float) -> Group:
    table = Table(box=None, pad_edge=False)
    for column in ("step", "shards", "time", "progress"):
        table.add_column(column, justify="right" if column in ("shards", "time") else "left", overflow="ellipsis")
    for state in states:
        note = {StepStatus.RUNNING: state.line, StepStatus.FRESH: "up to date"}.get(state.status, "")
        clock = f"{state.seconds:.0f} s" if state.seconds else ""
        table.add_row(Text(state.step.title, STYLES[state.status]), state.count, clock, Text(note, no_wrap=True))
    return Group(table, Text(f"{seconds:.0f} s", "dim"))


class _ProgressHandler(logging.Handler):
    """Prints warnings; of messages that report progress (they hold ' · '), shows the last one beside its step."""

    def __init__(self, console: Console, live: bool) -> None:
        super().__init__()
        self._console, self._live = console, live
        self.state: StepState | None = None  # of the step that runs
        self._last_printed = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        meta: dict[str, Any] = getattr(record, "dagster_meta", {})
        message = str(meta.get("orig_message", ""))
        if record.levelno == logging.WARNING:  # errors are reported once, by PipelineError
            self._console.print(f"[yellow]{record.levelname.lower()}[/] ", Text(printable(message)))
        if self.state is None:
            return
        event: dg.DagsterEvent | None = meta.get("dagster_event")
        if event and event.is_step_materialization and event.partition and event.asset_key == self.state.step.keys[-1]:
            self.state.materialised += 1
        if " · " not in message:
            return
        self.state.line = message
        if not self._live and time.monotonic() - self._last_printed >= SECONDS_BETWEEN_LINES:
            self._last_printed = time.monotonic()
            print(f"  {message}", file=sys.stderr, flush=True)
