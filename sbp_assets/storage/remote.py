"""Artifacts under an fsspec URL: published whole, read through a bounded local cache. Plain code: no dagster.

An object store replaces one object in one step, and nothing larger. So a directory's files go under a prefix of their
own, `name.VERSION-ID/`, and then the object `name.json` is put, which lists them: whoever reads follows that object
and sees all of the old files or all of the new ones, and an interrupted upload is never followed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_before_delay, wait_exponential
from upath import UPath

from sbp_assets.storage.artifacts import ABANDONED
from sbp_assets.storage.cache import Cache
from sbp_assets.storage.paths import as_pattern

logger = logging.getLogger("sbp_assets.storage")

T = TypeVar("T")

_PREFIX = r"{name}\.[^./]+-[0-9a-f]{{8}}"  # of a directory's files, beside its listing
_UPLOAD = re.compile(r"(?P<name>.+)\.(?P<version>[^./]+)-[0-9a-f]{8}")

_LASTING: tuple[type[Exception], ...] = (
    FileNotFoundError,
    PermissionError,
    NotADirectoryError,
    IsADirectoryError,
    ValueError,
    TypeError,
)
_CREDENTIALS: tuple[type[Exception], ...] = ()
try:
    # s3fs turns what the server answers into OSErrors, and raises as it is what botocore finds before or instead.
    from botocore.exceptions import NoCredentialsError, ParamValidationError, PartialCredentialsError, ProfileNotFound

    _LASTING += (ParamValidationError,)
    _CREDENTIALS += (NoCredentialsError, PartialCredentialsError, ProfileNotFound)
except ImportError:
    pass
try:
    from google.auth.exceptions import DefaultCredentialsError  # of gcsfs

    _CREDENTIALS += (DefaultCredentialsError,)
except ImportError:
    pass


def _may_pass(error: BaseException) -> bool:
    """Whether another try may succeed.

    Every store has errors of its own (a server out of reach is botocore's EndpointConnectionError, ReadTimeoutError,
    …), so an unknown one is tried again: a wait in vain costs `patience`, a lost connection would cost the run.
    """
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return False
    return isinstance(error, Exception) and not isinstance(error, (*_LASTING, *_CREDENTIALS))


class StorageError(RuntimeError):
    """The store cannot be used; the message names the URL, what failed and what to do."""


class CorruptedArtifactError(StorageError):
    """The artifact in the store is not what was uploaded; it has to be re-materialised."""


def is_local(path: UPath) -> bool:
    """Return whether `path` is on a file system of this machine."""
    return path.protocol in ("", "file", "local")


def root(url: str) -> UPath:
    """Return `url` as a path whose listings are never cached: those would hide what other processes write.

    Raises StorageError where its file system cannot be opened: its package is not installed, say, or the URL lacks what
    it needs.
    """
    try:
        path = UPath(url)
        if not is_local(path):
            path = UPath(url, use_listings_cache=False)
            _ = path.fs  # made, and its package imported, when it is first asked for
    except Exception as error:  # of the file system's own kind
        raise StorageError(f"deployment.data_dir {url} cannot be opened: {type(error).__name__}: {error}") from error
    return path


def url(directory: UPath) -> str:
    """Return the URL or path below which the files of a directory artifact are; FileNotFoundError if it is absent."""
    if is_local(directory):
        return directory.path
    listing = json.loads(directory.with_name(f"{directory.name}.json").read_bytes())
    return str(directory.with_name(listing["prefix"]))


class Upload(NamedTuple):
    """The files of a directory artifact as they were uploaded: the artifact's path, its version, the files' prefix."""

    name: str
    version: str
    prefix: str


def uploads_of(path: str) -> Iterator[Upload]:
    """Yield the uploads that the object `path` may be a file of, by its name alone."""
    for folder in PurePosixPath(path).parents:
        if match := _UPLOAD.fullmatch(folder.as_posix()):
            yield Upload(match["name"], match["version"], folder.as_posix())


class RemoteStore:
    """Artifacts below the URL `base`. Credentials are the file system's own business (for S3: the AWS variables).

    `cache` is a local directory for copies of what is read, kept to about `cache_bytes`. A transfer that fails while
    the store is out of reach is retried for `patience` seconds.
    """

    def __init__(self, base: UPath, cache: Path, cache_bytes: float, patience: float) -> None:
        self.base, self.fs = base, base.fs
        self.cache = Cache(cache, cache_bytes)
        self._patience = patience

    def put(self, local: Path, path: str, version: str) -> str:
        """Publish the file or directory `local`, whose content version is `version`, as `path`; return its URL."""
        return self.put_directory(local, path, version) if local.is_dir() else self.put_file(local, path)

    def put_file(self, local: Path, path: str) -> str:
        """Put the file `local` at `path` (without protocol), replacing what is there in one step; return its URL."""
        self._retry("write", path, lambda: self.fs.put_file(str(local), path))
        return self._url(path)

    def put_directory(self, local: Path, path: str, version: str) -> str:
        """Publish the directory `local`, whose content version is `version`, as `path`; return the files' URL.

        Until the last step readers see what was there before; then that is removed. Raises StorageError when what
        arrived differs from what was uploaded.
        """
        files = {p.relative_to(local).as_posix(): p.stat().st_size for p in sorted(local.rglob("*")) if p.is_file()}
        before = self._listing(path)
        prefix = f"{path}.{version}-{uuid.uuid4().hex[:8]}"
        sources, targets = [str(local / name) for name in files], [f"{prefix}/{name}" for name in files]
        self._retry("write", prefix, lambda: self.fs.put(sources, targets))
        arrived = self._retry("read", prefix, lambda: self._found(prefix))
        if {name: info["size"] for name, info in arrived.items()} != files:
            raise StorageError(f"{self._url(prefix)} differs from what was uploaded ({local}); re-materialise it")
        listing = json.dumps({"prefix": prefix.rpartition("/")[2], "files": files}).encode()
        self._retry("write", f"{path}.json", lambda: self.fs.pipe_file(f"{path}.json", listing))
        self._remove_unlisted(path, keep=prefix, replaced=before and before[0])
        return self._url(prefix)

    def get(self, path: str, directory: bool) -> Path:
        """Return a local copy of the artifact `path`, which stays until `release`, or longer while there is room.

        Raises FileNotFoundError when it is not in the store, and CorruptedArtifactError when it is not what was
        uploaded.
        """
        if not directory:
            # ukey tells contents apart: for S3 by ETag, size and time.
            etag = self._retry("read", path, lambda: self.fs.ukey(path))
            return self._copy(path, etag, lambda target: self.fs.get_file(path, str(target)))
        # Twice: it may be replaced while it is looked at.
        copy = self._get_directory(path) or self._get_directory(path)
        if copy is None:
            raise CorruptedArtifactError(f"{self._url(path)} is not what was uploaded; re-materialise it")
        return copy

    def _get_directory(self, path: str) -> Path | None:
        """Return a local copy of the directory `path`; None when its files are not those that it lists."""
        listing = self._listing(path)
        if listing is None:
            raise FileNotFoundError(self._url(path))
        prefix, files = listing
        found = self._retry("read", prefix, lambda: self._found(prefix))
        if {name: info["size"] for name, info in found.items()} != files:
            return None
        try:
            return self._copy(path, str(sorted(found.items())), lambda target: self._fill(target, prefix, files))
        except FileNotFoundError:
            return None

    def read_file(self, path: str, name: str) -> bytes:
        """Return the content of the file `name` of the directory `path`; raise FileNotFoundError without it."""
        for _ in range(2):  # it may be replaced while it is looked at
            if listing := self._listing(path):
                read = partial(self.fs.cat_file, file := f"{listing[0]}/{name}")
                with suppress(FileNotFoundError):
                    content: bytes = self._retry("read", file, read)
                    return content
        raise FileNotFoundError(f"{self._url(path)}: {name}")

    def etag(self, path: str, directory: bool) -> str | None:
        """Return a tag that changes when `path` is replaced, found without reading it; None when it is absent.

        For a file it is fsspec's ukey (on S3 made of the object's ETag), for a directory the prefix of its files.
        """
        if directory:
            listing = self._listing(path)
            return listing and listing[0]
        try:
            return self._retry("read", path, lambda: self.fs.ukey(path))
        except FileNotFoundError:
            return None

    def path_of(self, place: str) -> str:
        """Return the path (without protocol) of what is at `place` below `base`."""
        return f"{self.base.path.rstrip('/')}/{place}"

    def objects(self) -> dict[str, int]:
        """Return the size in bytes of every object of the store, by its place below `base`."""
        top = self.path_of("")
        found = self._retry("read", top, lambda: self.fs.find(top, detail=True))
        return {name.removeprefix(top): info["size"] for name, info in found.items()}

    def remove(self, path: str) -> None:
        """Remove the object `path` (without protocol), if it is there."""

        def action() -> None:
            with suppress(FileNotFoundError):
                self.fs.rm_file(path)  # `rm` would take it for a pattern

        self._retry("remove", path, action)

    def release(self) -> None:
        """Allow the cache to evict the copies that this process has asked for."""
        self.cache.release()

    def _copy(self, path: str, etag: str, fill: Callable[[Path], None]) -> Path:
        key = hashlib.sha256(f"{self._url(path)} {etag}".encode()).hexdigest()[:32]
        name = path.rpartition("/")[2]
        return self.cache.get(key, name, lambda target: self._retry("read", path, lambda: fill(target)))

    def _fill(self, target: Path, prefix: str, files: dict[str, int]) -> None:
        targets = [target / file for file in files]
        for folder in {target, *(file.parent for file in targets)}:
            folder.mkdir(parents=True, exist_ok=True)
        self.fs.get([f"{prefix}/{file}" for file in files], [str(file) for file in targets])

    def _listing(self, path: str) -> tuple[str, dict[str, int]] | None:
        """Return the prefix of the directory's files, and their sizes by name; None when it is not in the store."""
        try:
            text = self._retry("read", f"{path}.json", lambda: self.fs.cat_file(f"{path}.json"))
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
            raise CorruptedArtifactError(f"{self._url(path)}.json is no list of files; re-materialise it") from None
        return f"{parent}/{prefix}", files

    def _found(self, prefix: str) -> dict[str, dict[str, Any]]:
        found = self.fs.find(prefix, detail=True)
        return {name.removeprefix(prefix).lstrip("/"): info for name, info in found.items()}

    def _remove_unlisted(self, path: str, keep: str, replaced: str | None) -> None:
        """Remove the files that `path` was until now, and interrupted uploads of it, once they are abandoned."""
        parent, _, name = path.rpartition("/")
        try:
            for found in self.fs.ls(parent, detail=False):
                found = found.rstrip("/")
                other = found.rpartition("/")[2]
                if found == keep or not re.fullmatch(_PREFIX.format(name=re.escape(name)), other):
                    continue
                if found == replaced or self.abandoned(found):
                    # fsspec takes the path for a pattern, and would remove what else matches it.
                    self.fs.rm(as_pattern(found), recursive=True)
        except OSError as error:
            # The artifact is published; what is left over costs room, and the next write tries again to remove it.
            logger.warning("%s: what it replaces could not be removed: %s", self._url(path), error)

    def abandoned(self, prefix: str) -> bool:
        """Return whether the files at `prefix` were all written over a day ago."""
        written = [self.fs.modified(file) for file in self.fs.find(prefix)]
        latest = max((moment.replace(tzinfo=moment.tzinfo or UTC) for moment in written), default=datetime.now(UTC))
        return datetime.now(UTC) - latest > timedelta(seconds=ABANDONED)

    def _url(self, path: str) -> str:
        return self.fs.unstrip_protocol(path)

    def _retry(self, verb: str, path: str, action: Callable[[], T]) -> T:
        """Return `action()`, which is to `verb` `path`, retried while the store is out of reach.

        `verb` is "read", "write" or "remove".
        FileNotFoundError is raised by reading alone, and OSError (ENOSPC) for a full local disk; StorageError else.
        """

        def announce(state: RetryCallState) -> None:
            error = state.outcome and state.outcome.exception()
            logger.warning("%s: %s; trying again in %.1f s", self._url(path), error, state.upcoming_sleep)

        retrying = Retrying(
            retry=retry_if_exception(_may_pass),
            wait=wait_exponential(multiplier=0.5, max=15),
            stop=stop_before_delay(self._patience),
            before_sleep=announce,
            reraise=True,
        )
        try:
            return retrying(action)
        except Exception as error:
            if isinstance(error, FileNotFoundError) and verb == "read":
                raise
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            reason = (str(error) or type(error).__name__).rstrip(".")
            raise StorageError(f"cannot {verb} {self._url(path)}: {reason}. {self._advice(error)}") from error

    def _advice(self, error: Exception) -> str:
        if isinstance(error, FileNotFoundError):
            return f"Create the bucket, or set deployment.data_dir ({self.base}) to one that exists."
        if isinstance(error, (PermissionError, *_CREDENTIALS)):
            return (
                "Set credentials that grant access in the environment "
                "(for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)."
            )
        if isinstance(error, _LASTING):
            return f"See deployment.data_dir ({self.base})."
        return f"Tried for {self._patience:g} s (deployment.storage_patience); run it again when the store answers."
