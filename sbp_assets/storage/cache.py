"""Local copies of remote artifacts, bounded in size and shared by all processes of a machine. Plain code: no dagster.

fsspec's own caches (simplecache, filecache, blockcache) fit less; docs/design.md has the comparison.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sbp_assets.storage.artifacts import ABANDONED, bytes_on_disk


class Cache:
    """Local copies by key, kept to about `limit` bytes; what a living process has asked for is never evicted."""

    def __init__(self, folder: Path, limit: float) -> None:
        self._folder, self._limit = folder, limit
        self._claims: IO[str] | None = None  # names the keys in use; locked for as long as this process lives
        self._added = 0

    def get(self, key: str, name: str, fill: Callable[[Path], None]) -> Path:
        """Return a path called `name` with the content that belongs to `key`, written by `fill` unless it is there."""
        entry = self._folder / "copies" / key
        with self._locked():
            self._claim(key)
            if entry.exists():
                os.utime(entry)  # the least recently used go first
                return entry / name
        with self.temporary() as temporary:
            fill(temporary / name)
            with self._locked():
                if not entry.exists():
                    temporary.rename(self._subfolder("copies") / key)
                    self._added += bytes_on_disk(entry)
        if self._added > self._limit / 20:
            self._evict()
        return entry / name

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """Yield an empty folder for the block; what a killed process left in one is removed after a day."""
        with tempfile.TemporaryDirectory(dir=self._subfolder("partial"), ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    def unused(self, seconds: float) -> list[Path]:
        """Return the copies that no living process holds and none has asked for in the last `seconds`."""
        if not self._folder.is_dir():
            return []
        with self._locked():
            kept = self._in_use()
            copies = sorted(self._subfolder("copies").iterdir())
            return [path for path in copies if path.name not in kept and time.time() - path.stat().st_mtime >= seconds]

    def remove(self, copy: Path) -> None:
        """Remove `copy`, one of `unused`, unless a process has asked for it since."""
        with self._locked():
            if copy.name not in self._in_use():
                shutil.rmtree(copy, ignore_errors=True)

    def release(self) -> None:
        """Give up all claims of this process and evict what no longer fits."""
        if self._claims:
            self._claims.truncate(0)
            self._evict()

    def _claim(self, key: str) -> None:
        if not self._claims:
            self._claims = (self._subfolder("in-use") / uuid.uuid4().hex).open("a+", encoding="utf-8")
            fcntl.flock(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._claims.write(f"{key}\n")
        self._claims.flush()

    def _evict(self) -> None:
        self._added = 0
        with self._locked():
            kept = self._in_use()
            entries = sorted(((p.stat().st_mtime, p) for p in self._subfolder("copies").iterdir()), reverse=True)
            total = 0
            for _, entry in entries:
                total += bytes_on_disk(entry)
                if total > self._limit and entry.name not in kept:
                    total -= bytes_on_disk(entry)
                    shutil.rmtree(entry, ignore_errors=True)
            for partial in self._subfolder("partial").iterdir():
                if time.time() - partial.stat().st_mtime > ABANDONED:
                    shutil.rmtree(partial, ignore_errors=True)

    def _in_use(self) -> set[str]:
        keys: set[str] = set()
        for path in self._subfolder("in-use").iterdir():
            with path.open(encoding="utf-8") as claims:
                if self._claims and os.path.sameopenfile(claims.fileno(), self._claims.fileno()):
                    keys.update(claims.read().split())
                    continue
                try:
                    fcntl.flock(claims, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()  # the process that claimed is gone
                except BlockingIOError:
                    keys.update(claims.read().split())
        return keys

    def _subfolder(self, name: str) -> Path:
        """Return a folder of the cache, which is created where it is missing."""
        (self._folder / name).mkdir(parents=True, exist_ok=True)
        return self._folder / name

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._subfolder(".") / "lock").open("a", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
