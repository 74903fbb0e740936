"""How a training process's messages reach Dagster: line by line through a temporary file."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import dagster as dg
from dagster_pipes import PipesParams

from sbp_assets.dagster_support.internals import tail_file


class _WholeLines(dg.PipesFileMessageReader):
    """Waits for the rest of a line of which only the beginning is written.

    Dagster 1.13's own reader parses whatever readline() returns. Seen once in an hour of training on a busy machine:
    half a line, a JSONDecodeError in the reading thread, and no more progress for the rest of the run.
    """

    def _reader_thread(self, handler: dg.PipesMessageHandler, is_resource_complete: Event) -> None:
        line = ""
        try:
            for part in tail_file(self._path, is_resource_complete.is_set):
                line += part
                if line.endswith("\n"):
                    handler.handle_message(json.loads(line))
                    line = ""
        except BaseException:
            handler.report_pipes_framework_exception(f"{type(self).__name__} reader thread", sys.exc_info())
            raise


class WholeLinesMessageReader(dg.PipesTempFileMessageReader):
    """Dagster's message reader for local processes, safe against lines that are read while they are written."""

    @contextmanager
    def read_messages(self, handler: dg.PipesMessageHandler) -> Iterator[PipesParams]:
        """Read messages in a thread for as long as the block runs, and yield what the process needs, as in Dagster."""
        with tempfile.TemporaryDirectory() as folder:
            reader = _WholeLines(str(Path(folder) / "messages"), self._include_stdio_in_messages)
            with reader.read_messages(handler) as params:
                yield params
