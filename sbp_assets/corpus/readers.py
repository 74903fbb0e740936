"""Read documents from files under any fsspec URL, row by row, and account for every row that is not a document.

Rows are bytes until they are known to be UTF-8, so one bad byte costs one row. What cannot be read to its end (a
truncated .zst, say) raises CorpusError naming the file: a part of a file is never ingested as the whole.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from sbp_assets.corpus.errors import CorpusError
from sbp_assets.corpus.source_files import CHUNK, TEXT_SUFFIXES, Root, naming

EXCERPT_CHARS = 200


@dataclass(frozen=True)
class Document:
    """A row that is a document. `line` is the line of a JSONL file or the row of a Parquet file, from 1; else 1."""

    id: str
    text: str
    url: str | None
    source: str
    file: str
    line: int


@dataclass(frozen=True)
class Reject:
    """A row that is not a document, and why. `excerpt` is its beginning as printable text."""

    file: str
    line: int | None
    reason: str
    excerpt: str


@dataclass(frozen=True)
class Fields:
    """Where a row holds its parts. A dotted name reaches into nested objects ('metadata.id')."""

    text: str
    id: str | None
    url: str | None


def read_rows(root: Root, file: str, fields: Fields, sha256: str | None) -> Iterator[Document | Reject]:
    """Yield the documents and rejects of one file, in order.

    Raises CorpusError at the end of a file whose content is not `sha256`, and wherever it cannot be read. The caller
    must therefore publish nothing before the iterator is exhausted.
    """
    make = RowMaker(file, root.name, fields)
    if file.endswith(".parquet"):
        yield from _parquet(root, file, make, sha256)
        return
    with naming(file), root.open(file) as stream:
        hashing = _Hashing(stream)
        chunks = _decompressed(hashing, file)
        if file.endswith(TEXT_SUFFIXES):
            yield make.from_bytes(b"".join(chunks), 1)
        else:
            for line, raw in enumerate(_lines(chunks), start=1):
                if raw.strip():
                    yield make.from_json(raw, line)
        hashing.exhaust()
    _check_digest(file, hashing.digest.hexdigest(), sha256)


def cut_at_word(text: str, max_chars: int | None) -> str:
    """Return `text`, cut to at most `max_chars` characters, at white space where there is any."""
    if max_chars is None or len(text) <= max_chars:
        return text
    text = text.lstrip()
    if len(text) <= max_chars:
        return text
    head = text[:max_chars]
    if not text[max_chars].isspace():
        whole = head.rstrip().rsplit(None, 1)
        # Scripts without spaces, and single huge words, have no boundary: those are cut where they are.
        head = head[: len(head) - len(whole[-1])] if len(whole) == 2 and not head[-1].isspace() else head
    return head.rstrip()


def excerpt(raw: bytes | str) -> str:
    """Return the beginning of a row as text that every file format can hold."""
    text = raw[: 4 * EXCERPT_CHARS].decode("utf-8", "replace") if isinstance(raw, bytes) else raw[:EXCERPT_CHARS]
    return text[:EXCERPT_CHARS].encode("utf-8", "backslashreplace").decode()


class RowMaker:
    """Turns the parts of a row into a Document or a Reject."""

    def __init__(self, file: str, source: str, fields: Fields) -> None:
        self.file, self.source, self.fields = file, source, fields
        stem = file.rpartition("/")[2].partition(".")[0]
        # Files of one name in two directories must not get the same id.
        self.prefix = f"{stem}-{hashlib.sha256(file.encode()).hexdigest()[:8]}"

    def reject(self, line: int, reason: str, raw: bytes | str) -> Reject:
        """Return the reject of a row with its `reason`; `raw` gives the excerpt."""
        return Reject(self.file, line, reason, excerpt(raw))

    def from_bytes(self, raw: bytes, line: int) -> Document | Reject:
        """Return the document that the whole of a text file is, or its reject."""
        try:
            text = raw.removeprefix(b"\xef\xbb\xbf").decode()
        except UnicodeDecodeError as error:
            return self.reject(line, f"invalid UTF-8 at byte {error.start}", raw)
        return self.from_parts(line, text, None, None, None, raw)

    def from_json(self, raw: bytes, line: int) -> Document | Reject:
        """Return the document of one line of a JSONL file, or its reject."""
        raw = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
        try:
            row = json.loads(raw.decode())
        except UnicodeDecodeError as error:
            return self.reject(line, f"invalid UTF-8 at byte {error.start}", raw)
        except (ValueError, RecursionError) as error:
            return self.reject(line, f"malformed JSON: {error}", raw)
        if not isinstance(row, dict):
            return self.reject(line, f"not an object but {type(row).__name__}", raw)
        return self.from_row(row, line, raw)

    def from_row(self, row: dict[str, Any], line: int, raw: bytes | str) -> Document | Reject:
        """Return the document of a row's fields, or its reject; `raw` gives the excerpt."""
        fields = self.fields
        if _get(row, fields.text) is None:
            return self.reject(line, f"no text: field {fields.text!r} is missing or null", raw)
        key = _get(row, fields.id) if fields.id else None
        url = _get(row, fields.url) if fields.url else None
        return self.from_parts(line, _get(row, fields.text), key, url, row.get("source"), raw)

    def from_parts(self, line: int, text: Any, key: Any, url: Any, source: Any, raw: bytes | str) -> Document | Reject:
        """Return the document of the parts of a row, or its reject. A row without id is named by file and line."""
        if not isinstance(text, str):
            return self.reject(line, f"text is not a string but {type(text).__name__}", raw)
        if not text.strip():
            return self.reject(line, "empty text", raw)
        valid_key = (isinstance(key, str) and key.strip()) or (isinstance(key, int) and not isinstance(key, bool))
        name = str(key) if valid_key else f"{self.prefix}-{line}"
        url = url if isinstance(url, str) and url else None
        source = source if isinstance(source, str) and source else self.source
        try:
            for value in (text, name, url or "", source):
                value.encode()
        except UnicodeEncodeError:
            return self.reject(line, "invalid Unicode: a lone surrogate escape", raw)
        return Document(name, text, url, source, self.file, line)


class _Hashing:
    """A stream that digests what is read through it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.digest = stream, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        chunk = self.stream.read(size)
        self.digest.update(chunk)
        return chunk

    def exhaust(self) -> None:
        while self.read(CHUNK):
            pass


def _check_digest(file: str, found: str, expected: str | None) -> None:
    if found != expected:
        then = f"{expected[:12]}…" if expected else "unreadable"
        raise CorpusError(
            f"file {file} changed since the manifest was written (sha256 {found[:12]}…, then {then}); "
            "re-materialise corpus/source_manifest"
        )


def _decompressed(stream: _Hashing, file: str) -> Iterator[bytes]:
    if file.endswith(".zst"):
        yield from _zstd(stream)
    elif file.endswith(".gz"):
        with gzip.GzipFile(fileobj=stream) as unzipped:  # type: ignore[call-overload]  # Needs read() only.
            while chunk := unzipped.read(CHUNK):
                yield chunk
    else:
        while chunk := stream.read(CHUNK):
            yield chunk


def _zstd(stream: _Hashing) -> Iterator[bytes]:
    """Yield all frames of a .zst file: zstandard's own stream_reader ends silently inside a truncated frame."""
    # Files compressed with --long need the larger window.
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame, inside = decompressor.decompressobj(), False
    while chunk := stream.read(CHUNK):
        while chunk:
            yield frame.decompress(chunk)
            inside, chunk = not frame.eof, b""
            if frame.eof:
                chunk, frame = frame.unused_data, decompressor.decompressobj()
    if inside:
        raise EOFError("the file is truncated: its last zstd frame is not complete")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield lines without their line feed; only b'\\n' ends a line, as JSON Lines has it."""
    pending: list[bytes] = []
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        pending.append(first)
        for part in rest:
            yield b"".join(pending)
            pending = [part]
    if any(pending):
        yield b"".join(pending)


def _get(row: dict[str, Any], field: str) -> Any:
    if field in row or "." not in field:
        return row.get(field)
    value: Any = row
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _parquet(root: Root, file: str, make: RowMaker, sha256: str | None) -> Iterator[Document | Reject]:
    # Parquet is read from its end, so its digest takes a reading of its own.
    _check_digest(file, root.describe(file)[1], sha256)
    with naming(file), root.open(file) as stream:
        table = pq.ParquetFile(stream)
        names = table.schema_arrow.names
        parts = [field.partition(".")[0] for field in (make.fields.text, make.fields.id, make.fields.url) if field]
        if make.fields.text not in names and parts[0] not in names:
            raise CorpusError(
                f"file {file} has no column {make.fields.text!r}, only {', '.join(names)}; set corpus.source.text_field"
            )
        columns = [name for name in dict.fromkeys([make.fields.text, *parts, "source"]) if name in names]
        line = 0
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            values = {name: _cells(batch.column(name)) for name in batch.schema.names}
            for index in range(batch.num_rows):
                line += 1
                row = {name: column[index] for name, column in values.items()}
                bad = next((name for name, value in row.items() if isinstance(value, _BadBytes)), None)
                if bad is not None:
                    yield make.reject(line, f"invalid UTF-8 in column {bad!r}", row[bad].raw)
                else:
                    yield make.from_row(row, line, str(row.get(make.fields.text)))


@dataclass(frozen=True)
class _BadBytes:
    raw: bytes


def _cells(column: pa.Array) -> list[Any]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column.to_pylist()
    # One invalid byte must not cost the batch.
    return [_decode(raw) for raw in column.cast(pa.large_binary()).to_pylist()]


def _decode(raw: bytes | None) -> str | _BadBytes | None:
    try:
        return None if raw is None else raw.decode()
    except UnicodeDecodeError:
        return _BadBytes(raw or b"")
