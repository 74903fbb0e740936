"""Atomic writes and content versions of artifacts. Plain code: no dagster."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# How an artifact was made (timings, host) is kept beside it but is not part of what it is.
RUN_RECORD = "run.json"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`, renamed onto it when the block ends well and removed when it does not.

    Works for a file or a directory; an existing `path` is replaced. A file is exchanged in one step. A directory takes
    two renames: killed between them, `path` is absent (never half-written) and is made again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    try:
        yield temporary
        _sync(temporary)
        if path.is_dir() or temporary.is_dir():
            replaced = path.parent / f".{path.name}.{uuid.uuid4().hex}.replaced"
            if path.exists():
                path.rename(replaced)
            try:
                temporary.rename(path)
            except OSError:
                replaced.rename(path)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            temporary.replace(path)
    finally:
        _remove(temporary)


@contextmanager
def exclusive(folder: Path, what: str, seconds: float = 0) -> Iterator[None]:
    """Hold `folder`'s lock for the block, doing `what`; RuntimeError if another process has it for `seconds` more.

    The error says what the other does.

    The lock goes with the process that holds it, killed or not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as lock:
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


def staging(work_dir: str, asset: str, partition: str = "") -> Path:
    """Empty local directory to build a directory artifact in; what an earlier, failed attempt left is removed."""
    directory = Path(work_dir) / "staging" / asset / partition
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def content_version(path: Path) -> str:
    """SHA-256 over the names and bytes of a file or of a directory's files, run records left out (16 hex digits)."""
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
    """Size of a file, or of all files of a directory, in bytes."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def _sync(path: Path) -> None:
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
