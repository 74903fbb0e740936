"""The files of a corpus: their location, their names, and the digest that pins their content."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import BinaryIO

import pyarrow as pa
import zstandard
from fsspec.core import url_to_fs

from sbp_assets.corpus.errors import CorpusError

CHUNK = 1 << 20
# JSON lines are also published as .json.gz and .json.zst (C4, Dolma); a bare .json is usually one object: not read.
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
TEXT_SUFFIXES = (".txt", ".txt.gz", ".txt.zst")
SUFFIXES = (*ROW_SUFFIXES, *TEXT_SUFFIXES, ".parquet")


class Root:
    """The location of a corpus: a file, a directory (read recursively), or a glob, on any fsspec file system."""

    def __init__(self, path: str) -> None:
        try:
            self.fs, location = url_to_fs(path)
        except (ImportError, ValueError) as error:
            raise CorpusError(f"corpus.source.path {path!r}: {error}") from error
        self.path, self._location = path, location.rstrip("/") or "/"
        if any(character in location for character in "*?["):
            parts = PurePosixPath(location).parts
            fixed = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
            self.base = str(PurePosixPath(*parts[:fixed])) if fixed else ""
        else:
            self.base = self._location.rpartition("/")[0] if self.fs.isfile(location) else self._location

    @property
    def name(self) -> str:
        """Return the name of the corpus, for rows that do not name their source."""
        return PurePosixPath(self.base).name or "files"

    def files(self) -> tuple[list[str], list[str]]:
        """Return paths relative to the root, sorted: (readable files, files of other types); hidden files are neither.

        Raises CorpusError where the root does not exist or has no readable file.
        """
        if any(character in self._location for character in "*?["):
            found = [path for path in self.fs.glob(self._location) if self.fs.isfile(path)]
        elif self.fs.isfile(self._location):
            found = [self._location]
        elif self.fs.isdir(self._location):
            found = self.fs.find(self._location)
        else:
            raise CorpusError(f"corpus.source.path {self.path!r} does not exist; give a file, directory, glob or URL")
        relative = sorted(path.removeprefix(self.base).lstrip("/") for path in found)
        visible = [path for path in relative if not any(part.startswith((".", "_")) for part in path.split("/"))]
        readable = [path for path in visible if path.endswith(SUFFIXES)]
        if not readable:
            raise CorpusError(
                f"corpus.source.path {self.path!r} holds no file to read ({len(visible)} of other types); "
                f"known types: {', '.join(SUFFIXES)}"
            )
        return readable, [path for path in visible if not path.endswith(SUFFIXES)]

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
        try:
            return self.fs.modified(self.full(file)).isoformat()
        except (NotImplementedError, AttributeError, KeyError, FileNotFoundError):
            return None


@contextmanager
def naming(file: str) -> Iterator[None]:
    """Raise CorpusError, which names `file`, for every error of the file system or the decompressor."""
    try:
        yield
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, pa.ArrowException) as error:
        raise CorpusError(
            f"file {file} cannot be read: {type(error).__name__}: {error}. Replace it, or remove it from the corpus, "
            "and re-materialise corpus/source_manifest"
        ) from error
