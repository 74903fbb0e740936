"""An end to a benchmark that shares a machine for a fixed time."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def ending_after(minutes: float, end: Callable[[], None]) -> Iterator[None]:
    """End the process, after calling `end`, when the block is still running after `minutes`.

    From a thread, as a kernel or a compiler may hold the main one for as long as it likes.
    """

    def leave() -> None:
        try:
            end()
        finally:
            sys.stdout.flush()
            os._exit(0)

    watch = threading.Timer(60 * minutes, leave)
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()
