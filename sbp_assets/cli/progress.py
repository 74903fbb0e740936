"""The progress bar of commands that go through many things."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def tracked(things: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """Yield `things` one by one, showing on stderr how far it is and how long it will take.

    `total` is their number, which is to be given where they have no length.
    """
    from rich.console import Console
    from rich.progress import track

    return track(things, what, total, console=Console(stderr=True))
