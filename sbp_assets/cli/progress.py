"""The progress bar of commands that go through many things."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def tracked(things: Sequence[T], what: str) -> Iterable[T]:
    """Yield `things` one by one, showing on stderr how far it is and how long it will take."""
    from rich.console import Console
    from rich.progress import track

    return track(things, what, console=Console(stderr=True))
