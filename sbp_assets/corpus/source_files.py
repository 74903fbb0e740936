"""The files of a corpus: their location, their names, and the digest that pins their content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import BinaryIO

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from sbp_assets.corpus.errors import CorpusError
from sbp_assets.corpus.listing import HIDDEN, Listing, hidden, list_glob, list_tree
from sbp_assets.settings.formats import is_url
from sbp_assets.storage.paths import as_pattern

CHUNK = 1 << 20
COMPRESSED = (".gz", ".zst", ".zstd")
LINE_SUFFIXES = tuple(kind + end for kind in (".jsonl", ".ndjson") for end in ("", *COMPRESSED))
# JSON lines are also published as .json.gz and .json.zst (C4, Dolma); a bare .json is usually one object: not read.
ROW_SUFFIXES = (*LINE_SUFFIXES, *(".json" + end for end in COMPRESSED))
TEXT_SUFFIXES = (".txt", *(".txt" + end for end in COMPRESSED))
SUFFIXES = (*ROW_SUFFIXES, *TEXT_SUFFIXES, ".parquet")
SHOWN = 5


def has_suffix(file: str, suffixes: str | tuple[str, ...]) -> bool:
    """Whether the name of a file ends in one of `suffixes`, in upper or lower case."""
    return file.lower().endswith(suffixes)


def _is_readable(file: str) -> bool:
    return has_suffix(file, SUFFIXES)


class Root:
    """The location of a corpus: a file, a directory (read recursively), or a glob, on any fsspec file system.

    The longest leading part of a path that exists under that very name is a folder, whatever characters it has; only
    what follows it can be a pattern.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with naming_path(path):
            self._open(path)

    def _open(self, path: str) -> None:
        if is_url(path) and not os.path.exists(path):
            self.fs, location = url_to_fs(path)
        else:
            self.fs, location = fsspec.filesystem("file"), path
        self._local = isinstance(self.fs, LocalFileSystem)
        self._location = _absolute(location) if self._local else location.rstrip("/") or "/"
        self._pattern = ""  # of paths below the base; '' where the location is no glob
        self.base = self._location
        if self._local or (_is_pattern(location) and not self.fs.exists(self._location)):
            self._split()
        if not self._pattern and self.fs.isfile(self._location):
            self.base = self._folder(self._location.rpartition("/")[0])

    def _split(self) -> None:
        """Take the rest of the location after what exists for a pattern, where it begins with one."""
        parts = self._location.split("/")
        # Of a remote path only these are looked up: each is a request.
        places = range(1, len(parts)) if self._local else [at for at, part in enumerate(parts) if _is_pattern(part)]
        exists = os.path.lexists if self._local else self.fs.exists
        first = next((at for at in places if not exists("/".join(parts[: at + 1]))), None)
        if first is not None and _is_pattern(parts[first]):
            self._pattern = "/".join(parts[first:])
            self.base = self._folder("/".join(parts[:first]))

    def _folder(self, path: str) -> str:
        return path or "/" * self._location.startswith("/")

    @property
    def name(self) -> str:
        """Return the name of the corpus, for rows that do not name their source."""
        return PurePosixPath(self.base).name or "files"

    def files(self) -> tuple[list[str], dict[str, str]]:
        """Return the files to read and what is left out: paths relative to the root, sorted, and {path: reason}.

        Both together are all that is there. On a local file system links are followed, and what is reached twice is
        read once. A folder that is left out whole (hidden, say) is one entry, which ends in "/". Raises CorpusError
        where the root does not exist, cannot be listed or has no file to read.
        """
        with naming_path(self.path):
            found, left_out = self._listing()
        readable = sorted(file for file in found if _is_readable(file))
        left_out |= {file: "unknown ending" for file in found if not _is_readable(file)}
        if not readable:
            some = ", ".join(f"{name!r} ({reason})" for name, reason in sorted(left_out.items())[:SHOWN])
            raise CorpusError(
                f"corpus.source.path {self.path!r} holds no file to read; {len(left_out)} are left out"
                + (f": {some}{', …' if len(left_out) > SHOWN else ''}" if some else "")
                + f". Endings that are read: {', '.join(SUFFIXES)}"
            )
        return readable, dict(sorted(left_out.items()))

    def _listing(self) -> Listing:
        if self._pattern and self._local:
            return list_glob(self.base, self._pattern, _is_readable)
        if self._pattern:
            pattern = f"{as_pattern(self.base).rstrip('/')}/{self._pattern}" if self.base else self._pattern
            paths = [path for path in self.fs.glob(pattern) if self.fs.isfile(path)]
        elif self.fs.isfile(self._location):
            return [self._location.removeprefix(self.base).lstrip("/")], {}  # named by hand: read, hidden or not
        elif self.fs.isdir(self._location):
            if self._local:
                return list_tree(self.base, _is_readable)
            paths = self.fs.find(self._location)
        else:
            raise CorpusError(f"corpus.source.path {self.path!r} does not exist; give a file, directory, glob or URL")
        files, left_out = [], {}
        for file in (path.removeprefix(self.base).lstrip("/") for path in paths):
            parts = file.split("/")
            first = next((place for place, part in enumerate(parts) if hidden(part)), None)
            if first is None:
                files.append(file)
            else:
                left_out["/".join(parts[: first + 1]) + "/" * (first + 1 < len(parts))] = HIDDEN
        return files, left_out

    def full(self, file: str) -> str:
        """Return the path of a relative `file` in the file system."""
        return f"{self.base.rstrip('/')}/{file}" if self.base else file

    def open(self, file: str) -> BinaryIO:
        """Open a relative `file` for reading its bytes."""
        # Caching readers of remote file systems read ahead in blocks; the file is read once from end to end.
        return self.fs.open(self.full(file), "rb")

    def describe(self, file: str) -> tuple[int, str, str | None]:
        """Return bytes, sha256 and modification time (ISO; None where the file system keeps none) of a file."""
        digest, size = hashlib.sha256(), 0
        with naming(file), self.open(file) as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
        return size, digest.hexdigest(), self._modified(file)

    def stamps(self) -> dict[str, tuple[int | None, str | None]]:
        """Return the present bytes and modification time, as `describe` does, of every readable file.

        Both are None for a file that disappeared in the meantime.
        """
        self.fs.invalidate_cache()  # fsspec keeps listings for as long as the process lives
        found: dict[str, tuple[int | None, str | None]] = {}
        for file in self.files()[0]:
            try:
                found[file] = (self.fs.size(self.full(file)), self._modified(file))
            except FileNotFoundError:
                found[file] = (None, None)
        return found

    def _modified(self, file: str) -> str | None:
        path = self.full(file)
        if self._local and os.path.islink(path):
            path = os.path.realpath(path)  # fsspec would tell the time of the link
        try:
            return self.fs.modified(path).isoformat()
        except (NotImplementedError, AttributeError, KeyError, FileNotFoundError):
            return None


def _is_pattern(text: str) -> bool:
    return any(c in text for c in "*?[")


def _absolute(path: str) -> str:
    """Return an absolute path in one spelling: `..` is the folder above the one that is entered, links followed."""
    written = path if os.path.lexists(path) else os.path.expanduser(path)
    parts = (written if os.path.isabs(written) else os.path.join(os.getcwd(), written)).split("/")
    if ".." in parts:
        end = len(parts) - parts[::-1].index("..")
        parts = [os.path.realpath("/".join(parts[:end])), *parts[end:]]
    return "/" + "/".join(part for part in parts if part not in ("", "."))


@contextmanager
def naming_path(path: str) -> Iterator[None]:
    """Raise CorpusError, which names the setting and `path`, for every error in the block.

    Every file system has errors of its own: a package or credentials that are missing, a server that does not answer.
    """
    try:
        yield
    except CorpusError:
        raise
    except Exception as error:
        raise CorpusError(f"corpus.source.path {path!r} cannot be opened: {type(error).__name__}: {error}") from error


@contextmanager
def naming(file: str) -> Iterator[None]:
    """Raise CorpusError, which names `file`, for every error in the block.

    Decompressors, Parquet readers and file systems raise errors of many types, and none knows which file it read.
    """
    try:
        yield
    except CorpusError:
        raise
    except Exception as error:
        raise CorpusError(
            f"file {file} cannot be read: {type(error).__name__}: {error}. Replace it, or remove it from the corpus, "
            "and re-materialise corpus/source_manifest"
        ) from error
