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

CHUNK = 1 << 20
COMPRESSED = (".gz", ".zst", ".zstd")
# JSON lines are also published as .json.gz and .json.zst (C4, Dolma); a bare .json is usually one object: not read.
ROW_SUFFIXES = (".jsonl", ".ndjson", *(kind + end for kind in (".jsonl", ".ndjson", ".json") for end in COMPRESSED))
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

    What exists under the name itself is that, and no glob, whatever characters its name has.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with naming_path(path):
            self._open(path)

    def _open(self, path: str) -> None:
        if os.path.exists(path):
            self.fs, location = fsspec.filesystem("file"), os.path.abspath(path)
        else:
            self.fs, location = url_to_fs(path)
        self._location = location.rstrip("/") or "/"
        self._local = isinstance(self.fs, LocalFileSystem)
        self._is_glob = any(c in location for c in "*?[") and not self.fs.exists(self._location)
        if self._is_glob:
            parts = PurePosixPath(location).parts
            fixed = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
            self.base = str(PurePosixPath(*parts[:fixed])) if fixed else ""
        else:
            self.base = self._location.rpartition("/")[0] if self.fs.isfile(self._location) else self._location

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
        if self._is_glob and self._local:
            return list_glob(self.base, self._location, _is_readable)
        if self._is_glob:
            paths = [path for path in self.fs.glob(self._location) if self.fs.isfile(path)]
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
