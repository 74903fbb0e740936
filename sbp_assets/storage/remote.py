"""Artifacts under an fsspec URL: published whole, read through a bounded local cache. Plain code: no dagster.

An object store replaces one object in one step, and nothing larger. So a directory's files go under a prefix of their
own, `name.VERSION-ID/`, and then the object `name.json` is put, which lists them: whoever reads follows that object
and sees all of the old files or all of the new ones, and an upload that died is never followed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

from upath import UPath

from sbp_assets.storage.artifacts import ABANDONED, bytes_on_disk

logger = logging.getLogger("sbp_assets.storage")

T = TypeVar("T")

_PREFIX = r"{name}\.[^./]+-[0-9a-f]{{8}}"  # of a directory's files, beside its listing
# Failures that trying again does not mend. Libraries of object stores raise these names of their own.
_PERMANENT = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ValueError, TypeError)
_PERMANENT_NAMES = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ParamValidationError")


class StorageError(RuntimeError):
    """The store cannot be used; the message names the URL, what failed and what to do."""


class DamagedError(StorageError):
    """What lies in the store is not what was put there; it has to be made again."""


def is_local(path: UPath) -> bool:
    return path.protocol in ("", "file", "local")


def root(url: str) -> UPath:
    """`url` as a path whose listings are never remembered: those would hide what other processes write."""
    path = UPath(url)
    return path if is_local(path) else UPath(url, use_listings_cache=False)


def url(directory: UPath) -> str:
    """URL or path below which the files of a directory artifact are now; FileNotFoundError where it is not there."""
    if is_local(directory):
        return directory.path
    listing = json.loads(directory.with_name(f"{directory.name}.json").read_bytes())
    return str(directory.with_name(listing["prefix"]))


class RemoteStore:
    """Artifacts below the URL `base`. Credentials are the file system's own business (for S3: the AWS variables).

    `cache` is a local directory for copies of what is read, kept to about `cache_bytes`. A transfer that fails for want
    of a connection is tried again for `patience` seconds.
    """

    def __init__(self, base: UPath, cache: Path, cache_bytes: float, patience: float) -> None:
        self.base, self.fs = base, base.fs
        self.cache = Cache(cache, cache_bytes)
        self._patience = patience

    def put(self, local: Path, path: str, version: str) -> str:
        """Publish the file or directory `local`, whose content version is `version`, as `path`; returns its URL."""
        return self.put_directory(local, path, version) if local.is_dir() else self.put_file(local, path)

    def put_file(self, local: Path, path: str) -> str:
        """Put the file `local` at `path` (without protocol), replacing what is there in one step; returns its URL."""
        self._try("write", path, lambda: self.fs.put_file(str(local), path))
        return self._url(path)

    def put_directory(self, local: Path, path: str, version: str) -> str:
        """Publish the directory `local`, whose content version is `version`, as `path`; returns the files' URL.

        Until the last step readers see what was there before; then that is removed.
        """
        files = {p.relative_to(local).as_posix(): p.stat().st_size for p in sorted(local.rglob("*")) if p.is_file()}
        before = self._listing(path)
        prefix = f"{path}.{version}-{uuid.uuid4().hex[:8]}"
        sources, targets = [str(local / name) for name in files], [f"{prefix}/{name}" for name in files]
        self._try("write", prefix, lambda: self.fs.put(sources, targets))
        arrived = self._try("read", prefix, lambda: self._found(prefix))
        if {name: info["size"] for name, info in arrived.items()} != files:
            raise StorageError(f"{self._url(prefix)} differs from what was uploaded ({local}); materialise it again")
        listing = json.dumps({"prefix": prefix.rpartition("/")[2], "files": files}).encode()
        self._try("write", f"{path}.json", lambda: self.fs.pipe_file(f"{path}.json", listing))
        self._remove_unlisted(path, keep=prefix, replaced=before and before[0])
        return self._url(prefix)

    def get(self, path: str, directory: bool) -> Path:
        """Local copy of the artifact `path`; FileNotFoundError where it is not in the store.

        It stays until `release`, and beyond it for as long as there is room in the cache.
        """
        if not directory:
            # ukey tells contents apart: for S3 by entity tag, size and time.
            state = self._try("read", path, lambda: self.fs.ukey(path))
            return self._copy(path, state, lambda target: self.fs.get_file(path, str(target)))
        # Twice: it may be replaced while it is looked at.
        return self._get_directory(path) or self._get_directory(path) or self._damaged(path)

    def _get_directory(self, path: str) -> Path | None:
        """Local copy of the directory `path`; None where its files are not those that it lists."""
        listing = self._listing(path)
        if listing is None:
            raise FileNotFoundError(self._url(path))
        prefix, files = listing
        found = self._try("read", prefix, lambda: self._found(prefix))
        if {name: info["size"] for name, info in found.items()} != files:
            return None
        try:
            return self._copy(path, str(sorted(found.items())), lambda target: self._fill(target, prefix, files))
        except FileNotFoundError:
            return None

    def _damaged(self, path: str) -> Path:
        raise DamagedError(f"{self._url(path)} is not what was uploaded; materialise it again")

    def mark(self, path: str, directory: bool) -> str | None:
        """What is another when `path` is replaced, asked of the store without reading it; None where it is not."""
        if directory:
            listing = self._listing(path)
            return listing and listing[0]
        try:
            return self._try("read", path, lambda: self.fs.ukey(path))
        except FileNotFoundError:
            return None

    def release(self) -> None:
        """Allow the copies that this process has asked for to be removed from the cache."""
        self.cache.release()

    def _copy(self, path: str, state: str, fill: Callable[[Path], None]) -> Path:
        key = hashlib.sha256(f"{self._url(path)} {state}".encode()).hexdigest()[:32]
        name = path.rpartition("/")[2]
        return self.cache.get(key, name, lambda target: self._try("read", path, lambda: fill(target)))

    def _fill(self, target: Path, prefix: str, files: dict[str, int]) -> None:
        targets = [target / file for file in files]
        for folder in {target, *(file.parent for file in targets)}:
            folder.mkdir(parents=True, exist_ok=True)
        self.fs.get([f"{prefix}/{file}" for file in files], [str(file) for file in targets])

    def _listing(self, path: str) -> tuple[str, dict[str, int]] | None:
        """Prefix of the directory's files, and their sizes by name; None where it is not in the store."""
        try:
            text = self._try("read", f"{path}.json", lambda: self.fs.cat_file(f"{path}.json"))
        except FileNotFoundError:
            return None
        parent, _, name = path.rpartition("/")
        try:
            listing = json.loads(text)
            prefix, files = listing["prefix"], listing["files"]
            # Copied to this machine by these names: one from elsewhere must not lead out of the cache.
            inside = all(not PurePosixPath(file).is_absolute() and ".." not in file.split("/") for file in files)
            if not inside or not re.fullmatch(_PREFIX.format(name=re.escape(name)), prefix):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise DamagedError(f"{self._url(path)}.json is no list of files; materialise it again") from None
        return f"{parent}/{prefix}", files

    def _found(self, prefix: str) -> dict[str, dict[str, Any]]:
        found = self.fs.find(prefix, detail=True)
        return {name.removeprefix(prefix).lstrip("/"): info for name, info in found.items()}

    def _remove_unlisted(self, path: str, keep: str, replaced: str | None) -> None:
        """Remove the files that `path` was until now, and uploads of it that died long ago."""
        parent, _, name = path.rpartition("/")
        try:
            for found in self.fs.ls(parent, detail=False):
                found = found.rstrip("/")
                other = found.rpartition("/")[2]
                if found == keep or not re.fullmatch(_PREFIX.format(name=re.escape(name)), other):
                    continue
                if found == replaced or self._abandoned(found):
                    self.fs.rm(found, recursive=True)
        except OSError as error:
            # The artifact is published; what is left over costs room and is looked for again at the next write.
            logger.warning("%s: what it replaces could not be removed: %s", self._url(path), error)

    def _abandoned(self, prefix: str) -> bool:
        written = [self.fs.modified(file) for file in self.fs.find(prefix)]
        latest = max((moment.replace(tzinfo=moment.tzinfo or UTC) for moment in written), default=datetime.now(UTC))
        return datetime.now(UTC) - latest > timedelta(seconds=ABANDONED)

    def _url(self, path: str) -> str:
        return self.fs.unstrip_protocol(path)

    def _try(self, do: str, path: str, action: Callable[[], T]) -> T:
        """`action`, again and again while there is no connection; FileNotFoundError only ever from reading."""
        deadline, pause = time.monotonic() + self._patience, 0.5
        while True:
            try:
                return action()
            except Exception as error:  # every file system has errors of its own
                if isinstance(error, FileNotFoundError) and do == "read":
                    raise
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise
                lasting = isinstance(error, _PERMANENT) or type(error).__name__ in _PERMANENT_NAMES
                if lasting or time.monotonic() + pause > deadline:
                    reason = (str(error) or type(error).__name__).rstrip(".")
                    raise StorageError(f"cannot {do} {self._url(path)}: {reason}. {self._advice(error)}") from error
                logger.warning("%s: %s; trying again in %.1f s", self._url(path), error, pause)
            time.sleep(pause)
            pause = min(2 * pause, 15)

    def _advice(self, error: Exception) -> str:
        if isinstance(error, FileNotFoundError):
            return f"Create the bucket, or set deployment.data_dir ({self.base}) to one that exists."
        if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            return "Give credentials that may, in the environment (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)."
        if isinstance(error, _PERMANENT):
            return f"See deployment.data_dir ({self.base})."
        return f"Tried for {self._patience:g} s (deployment.storage_patience); run it again when the store answers."


class Cache:
    """Local copies by key, kept to about `limit` bytes; what a living process has asked for is never removed."""

    def __init__(self, folder: Path, limit: float) -> None:
        self._folder, self._limit = folder, limit
        self._claims: IO[str] | None = None  # names the keys in use; locked for as long as this process lives
        self._added = 0

    def get(self, key: str, name: str, fill: Callable[[Path], None]) -> Path:
        """Path called `name` with the content that belongs to `key`, written by `fill` unless it is there."""
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
                    temporary.rename(self._made("copies") / key)
                    self._added += bytes_on_disk(entry)
        if self._added > self._limit / 20:
            self._evict()
        return entry / name

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """Empty folder for the block; what a killed process left in one is removed after a day."""
        with tempfile.TemporaryDirectory(dir=self._made("partial"), ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    def release(self) -> None:
        """Give up all claims of this process."""
        if self._claims:
            self._claims.truncate(0)
            self._evict()

    def _claim(self, key: str) -> None:
        if not self._claims:
            self._claims = (self._made("in-use") / uuid.uuid4().hex).open("a+")
            fcntl.flock(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._claims.write(f"{key}\n")
        self._claims.flush()

    def _evict(self) -> None:
        self._added = 0
        with self._locked():
            kept = self._in_use()
            entries = sorted(((p.stat().st_mtime, p) for p in self._made("copies").iterdir()), reverse=True)
            total = 0
            for _, entry in entries:
                total += bytes_on_disk(entry)
                if total > self._limit and entry.name not in kept:
                    total -= bytes_on_disk(entry)
                    shutil.rmtree(entry, ignore_errors=True)
            for partial in self._made("partial").iterdir():
                if time.time() - partial.stat().st_mtime > ABANDONED:
                    shutil.rmtree(partial, ignore_errors=True)

    def _in_use(self) -> set[str]:
        keys: set[str] = set()
        for path in self._made("in-use").iterdir():
            with path.open() as claims:
                if self._claims and os.path.sameopenfile(claims.fileno(), self._claims.fileno()):
                    keys.update(claims.read().split())
                    continue
                try:
                    fcntl.flock(claims, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()  # whoever claimed is gone
                except BlockingIOError:
                    keys.update(claims.read().split())
        return keys

    def _made(self, name: str) -> Path:
        (self._folder / name).mkdir(parents=True, exist_ok=True)
        return self._folder / name

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._made(".") / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
