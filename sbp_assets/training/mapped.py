"""Arrays in files that are mapped into memory: their pages are the system's to take back, and processes share them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sbp_assets.storage.artifacts import exclusive, named_when_full

PIECE = 1 << 16  # Numbers in memory at a time.
_WAIT = 24 * 3600.0  # Seconds for another process's array; one that dies gives up its lock at once.


class MappedArrays:
    """Arrays of a folder by name, each written by the first process that asks for it, whole or not at all.

    Without a folder, each is `temporary`: in `scratch`, or else in the system's folder for temporary files.
    """

    def __init__(self, folder: Path | None = None, scratch: Path | None = None) -> None:
        self._folder, self._scratch = folder, folder or scratch

    def array(
        self,
        name: str,
        dtype: type[np.signedinteger],
        pieces: Callable[[], Iterable[np.ndarray]],
        change: Callable[[np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Return the array `name`, (numbers,) of `dtype`: the numbers of `pieces` one after another.

        Where it is not there yet, `pieces` is called for them, and then `change` with all of them, to change them in
        place. Raises ValueError for a number that `dtype` does not hold, and OSError when the disk is full.
        """
        if self._folder is None:
            return self.temporary(dtype, pieces(), change)
        path, partial = self._folder / name, self._folder / f"{name}.partial"
        with exclusive(self._folder, f"writing {name}", seconds=_WAIT):
            if not path.exists():
                with named_when_full(path), partial.open("w+b") as file:
                    _written(file, dtype, pieces(), change)
                    os.fsync(file.fileno())  # After a crash of the machine it would be there with zeros.
                partial.rename(path)
            with path.open("rb") as file:
                return _mapped(file, dtype, "r")

    def temporary(
        self,
        dtype: type[np.signedinteger],
        pieces: Iterable[np.ndarray],
        change: Callable[[np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Return an array like `array` does, in a file without a name that goes with it; it may be changed."""
        if self._scratch:
            self._scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(prefix="sbp-", dir=self._scratch) as file:
            return _written(file, dtype, pieces, change)

    def remove(self, *names: str) -> None:
        """Remove the arrays `names` where they are; who has mapped one keeps it."""
        for name in names if self._folder else ():
            (self._folder / name).unlink(missing_ok=True)  # type: ignore[operator]


def in_pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of start:stop in pieces of PIECE numbers."""
    for first in range(start, stop, PIECE):
        yield first, min(first + PIECE, stop)


def _written(
    file: BinaryIO,
    dtype: type[np.signedinteger],
    pieces: Iterable[np.ndarray],
    change: Callable[[np.ndarray], None] | None,
) -> np.ndarray:
    # Written before it is mapped: a page that the disk has no room for would end the process.
    for numbers in pieces:
        if len(numbers) and numbers.max() > np.iinfo(dtype).max:
            raise ValueError(f"{numbers.max():,} is too large a number for an index of {np.dtype(dtype).name}")
        file.write(np.ascontiguousarray(numbers, dtype).data)
    file.flush()
    mapped = _mapped(file, dtype, "r+")
    if change is not None:
        change(mapped)
    return mapped


def _mapped(file: BinaryIO, dtype: type[np.signedinteger], mode: str) -> np.ndarray:
    if not os.fstat(file.fileno()).st_size:
        return np.zeros(0, dtype)  # Nothing cannot be mapped.
    # A plain array of the same memory: numpy shuffles no other kind in place at full speed.
    return np.memmap(file, dtype, mode).view(np.ndarray)  # type: ignore[call-overload,no-any-return]
