"""Read the rows of files under any fsspec URL, one by one, and lose none.

Rows are bytes until they are known to be UTF-8, so one bad byte costs one row. What cannot be read to its end (a
truncated .zst, say) raises CorpusError naming the file: a part of a file is never ingested as the whole. Memory holds a
row of at most `max_bytes`, and ZSTD_WINDOW of a .zst, whatever the file expands to.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import zstandard

from sbp_assets.corpus.errors import CorpusError
from sbp_assets.corpus.parquet import parquet_rows
from sbp_assets.corpus.rows import EXCERPT_CHARS, BadBytes, Document, Fields, Parts, Reject, Row, RowMaker, TooLong
from sbp_assets.corpus.source_files import CHUNK, TEXT_SUFFIXES, Root, has_suffix, naming

# A byte of zstd expands to at most 32 kB (a block of 128 kB in 4 bytes), so pieces of this size to at most 16 MB; in
# one call for each megabyte, a file of ratio 5,000 took 1.3 GB. Calls of this size cost nothing measurable.
ZSTD_PIECE = 512
# What a frame may make its reader hold, zstd's own limit: a file of 139 kB with a window of 2 GiB took 1.5 GB.
ZSTD_WINDOW = 2**27

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAGIC = {
    b"\x1f\x8b": "gzip data (.gz)",
    b"\x28\xb5\x2f\xfd": "zstd data (.zst)",
    b"PAR1": "Parquet (.parquet)",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
    b"PK\x03\x04": "a zip archive",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}


def read_rows(root: Root, file: str, make: RowMaker, sha256: str | None) -> Iterator[Document | Reject]:
    """Yield the documents and rejects of one file, in order, numbered as in the file.

    Raises as `raw_rows` does. The caller must therefore publish nothing before the iterator is exhausted.
    """
    for line, row in raw_rows(root, file, make.fields, make.max_bytes, sha256):
        yield make.make(row, line)


def raw_rows(
    root: Root, file: str, fields: Fields, max_bytes: int, sha256: str | None, pinned: bool = True
) -> Iterator[tuple[int, Row]]:
    """Yield the rows of one file with their numbers, from 1; lines that are blank are counted and left out.

    Raises CorpusError, which names the file, at the end of one whose content is not `sha256`, and wherever it cannot be
    read. With `pinned` false the content is not compared.
    """
    if has_suffix(file, ".parquet"):
        if pinned:  # Parquet is read from its end, so its digest takes a reading of its own.
            _check_digest(file, root.describe(file)[1], sha256)
        with naming(file), root.open(file) as stream:
            yield from parquet_rows(stream, file, fields)
        return
    with naming(file), root.open(file) as stream:
        hashing = _Hashing(stream)
        chunks = _decompressed(hashing, file)
        if has_suffix(file, TEXT_SUFFIXES):
            yield 1, _text(chunks, max_bytes)
        else:
            for line, raw in enumerate(_lines(_recognised(chunks), max_bytes), start=1):
                if isinstance(raw, TooLong) or raw.strip():
                    yield line, raw.removeprefix(BYTE_ORDER_MARK) if line == 1 and isinstance(raw, bytes) else raw
        hashing.exhaust()
    if pinned:
        _check_digest(file, hashing.digest.hexdigest(), sha256)


class _Hashing:
    """A stream that digests and counts what is read through it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.digest, self.size = stream, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        chunk = self.stream.read(size)
        self.digest.update(chunk)
        self.size += len(chunk)
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
    if has_suffix(file, (".zst", ".zstd")):
        yield from _zstd(stream)
    elif has_suffix(file, ".gz"):
        with gzip.GzipFile(fileobj=stream) as unzipped:  # type: ignore[call-overload]  # Needs read() only.
            while chunk := unzipped.read(CHUNK):
                yield chunk
    else:
        while chunk := stream.read(CHUNK):
            yield chunk
        return
    if stream.size == 0:
        raise EOFError("it has 0 bytes, and so it is truncated: an archive of nothing has some")


def _zstd(stream: _Hashing) -> Iterator[bytes]:
    """Yield all frames of a .zst file: zstandard's own stream_reader ends silently inside a truncated frame."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
    frame, inside = decompressor.decompressobj(), False
    while chunk := stream.read(CHUNK):
        for start in range(0, len(chunk), ZSTD_PIECE):
            piece = chunk[start : start + ZSTD_PIECE]
            while piece:
                try:
                    expanded = frame.decompress(piece)
                except zstandard.ZstdError as error:
                    if "too much memory" not in str(error):
                        raise
                    raise ValueError(
                        f"its zstd window is larger than {ZSTD_WINDOW // 2**20} MiB; compress it again: zstd -d "
                        "--long=31 --stdout OLD | zstd -o NEW"
                    ) from error
                yield expanded
                inside, piece = not frame.eof, b""
                if frame.eof:
                    piece, frame = frame.unused_data, decompressor.decompressobj()
    if inside:
        raise EOFError("the file is truncated: its last zstd frame is not complete")


def _recognised(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield `chunks`; raises CorpusError where they begin like a format that is not lines of text.

    Otherwise each such file would come down to a few rejected rows.
    """
    head = b""
    for chunk in chunks:
        if len(head) < 8:
            head += chunk[:8]
            if found := next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None):
                raise ValueError(f"it holds {found}, which its name does not say")
        yield chunk


def _lines(chunks: Iterable[bytes], max_bytes: int) -> Iterator[bytes | TooLong]:
    """Yield lines without their line feed; only b'\\n' ends a line, as JSON Lines has it."""
    kept: list[bytes] = []  # of the line that has not ended, at most max_bytes and a chunk
    size = 0
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        if size <= max_bytes:
            kept.append(first)
        size += len(first)
        for other in others:
            yield _bounded(kept, size, max_bytes)
            kept, size = [other], len(other)
    if size:
        yield _bounded(kept, size, max_bytes)


def _bounded(kept: list[bytes], size: int, max_bytes: int) -> bytes | TooLong:
    return b"".join(kept) if size <= max_bytes else TooLong(size, b"".join(kept)[: 4 * EXCERPT_CHARS])


def _text(chunks: Iterable[bytes], max_bytes: int) -> Row:
    """Return the one row of a text file."""
    kept: list[bytes] = []
    size = 0
    for chunk in chunks:
        if size <= max_bytes:
            kept.append(chunk)
        size += len(chunk)
    raw = _bounded(kept, size, max_bytes)
    if isinstance(raw, TooLong):
        return raw
    try:
        return raw.removeprefix(BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        return Parts(BadBytes(raw, f"at byte {error.start}"), None, None, None)
