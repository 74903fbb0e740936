"""Atomic writes and content versions of artifacts. Plain code: no dagster."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# How an artifact was produced (timings, host) is kept beside it but is not part of its content.
RUN_RECORD = "run.json"
# Seconds after which an unfinished write counts as one whose process died: none goes so long without a byte.
ABANDONED = 24 * 3600
# Bytes; a disk with less free space has failed a write because it is full.
FULL = 2**20


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`, renamed onto it when the block succeeds and removed when it raises.

    Works for a file or a directory. An existing `path` is replaced in one step (where a file system cannot exchange two
    directories, in two: killed between them, `path` is absent, never half-written, and is re-materialised). What a
    killed process left of an earlier write is removed after a day. Raises OSError (ENOSPC) that names the disk when it
    is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if is_abandoned(abandoned):
            _remove(abandoned)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    try:
        with named_when_full(path):
            yield temporary
            _sync(temporary)
        if not _moved(temporary, path) and not _exchange(temporary, path):
            replaced = path.parent / f".{path.name}.{uuid.uuid4().hex}.replaced.partial"
            path.rename(replaced)
            try:
                temporary.rename(path)
            except OSError:
                replaced.rename(path)
                raise
            _remove(replaced)
        _sync_folder(path.parent)
    finally:
        _remove(temporary)


def _moved(temporary: Path, path: Path) -> bool:
    """Rename in one step; return False where a directory is in the way, perhaps since a moment ago."""
    if path.exists() and not (path.is_file() and temporary.is_file()):
        return False
    try:
        temporary.replace(path)
    except OSError:
        if not path.is_dir():
            raise
        return False
    return True


@contextmanager
def named_when_full(path: Path) -> Iterator[None]:
    """Raise OSError (ENOSPC) that names `path` when the block, which writes it, fails because its disk is full.

    Few libraries say so: torch then speaks of an unexpected position, numpy of items requested and written.
    """
    try:
        yield
    except Exception as error:
        if shutil.disk_usage(path.parent).free < FULL:
            message = f"{path}: its disk is full ({error}). Free some space there and run this again"
            raise OSError(errno.ENOSPC, message) from error
        raise


@contextmanager
def exclusive(folder: Path, what: str, seconds: float = 0) -> Iterator[None]:
    """Hold the lock of `folder` for the block, which does `what` ("training x").

    Raises RuntimeError, which says what the other process does, when that still holds the lock after `seconds`. The
    lock goes with the process that holds it, killed or not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+", encoding="utf-8") as lock:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    lock.seek(0)
                    holder = lock.read() or what  # not written yet: both are at the same
                    raise RuntimeError(f"another process is {holder} in {folder}; wait for it or stop it") from None
                time.sleep(0.2)
        lock.truncate(0)
        lock.write(what)
        lock.flush()
        yield


_staged: dict[Path, int] = {}  # this process's directories, and the descriptors that keep them locked


def staging(work_dir: str, asset: str, partition: str = "") -> Path:
    """Return an empty local directory to build a directory artifact in, for the calling process alone.

    Removes what this process and dead ones have left of earlier attempts; another run that materialises the same
    artifact at the same time keeps its own. Raises RuntimeError when another process stages it for over a minute.
    """
    attempts = Path(work_dir) / "staging" / asset / partition
    with exclusive(attempts, f"staging {asset} {partition}".strip(), seconds=60):
        for earlier in (path for path in attempts.iterdir() if path.is_dir()):
            lock = _staged.pop(earlier) if earlier in _staged else _lock(earlier)
            if lock is not None:
                shutil.rmtree(earlier, ignore_errors=True)
                os.close(lock)
        attempt = attempts / uuid.uuid4().hex
        attempt.mkdir()
        lock = _lock(attempt)
        assert lock is not None  # no other process knows of it yet
        _staged[attempt] = lock
    (directory := attempt / "staged").mkdir()
    return directory


def release_staging(directory: Path) -> None:
    """Remove a directory that `staging` has returned, which is no longer needed, and let go of its lock.

    Without it both stay until the process ends or stages the same again: of thousands of partitions in one process
    too many descriptors, and a second copy of every artifact. What is no such directory is left alone.
    """
    if (lock := _staged.pop(directory.parent, None)) is not None:
        shutil.rmtree(directory.parent, ignore_errors=True)
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """Return a descriptor that holds the lock of `folder` until it is closed; None when another process holds it."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def in_use(attempt: Path) -> bool:
    """Return whether a living process holds the directory `attempt`, which `staging` has made."""
    if attempt in _staged:
        return True
    lock = _lock(attempt)
    if lock is not None:
        os.close(lock)
    return lock is None


def content_version(path: Path) -> str:
    """Return the SHA-256 (16 hex digits) of a file, or of the names and bytes in a directory, without run records."""
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if file.name == RUN_RECORD:
            continue
        digest.update(file.relative_to(path).as_posix().encode() if path.is_dir() else b"")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def bytes_on_disk(path: Path) -> int:
    """Return the size of a file, or of all files of a directory, in bytes."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; return False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux; Python has no name for it
    at_working_directory, exchange = -100, 2
    paths = os.fsencode(one.absolute()), os.fsencode(other.absolute())
    if renameat2 is None:
        return False
    return bool(renameat2(at_working_directory, paths[0], at_working_directory, paths[1], exchange) == 0)


def _sync(path: Path) -> None:
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    """Make renames in `folder` last: Dagster's record of an artifact must not outlive it in a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_abandoned(partial: Path) -> bool:
    """Return whether an unfinished write counts as one whose process died: for a day nothing of it has changed."""
    return time.time() - last_written(partial) > ABANDONED


def last_written(path: Path) -> float:
    """Return when the file or directory, or anything in it, was last changed, in seconds since the epoch."""
    latest = 0.0
    for entry in [path, *path.rglob("*")]:
        with suppress(FileNotFoundError):  # its writer is still at work
            latest = max(latest, entry.stat().st_mtime)
    return latest or time.time()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
