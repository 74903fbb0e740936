"""Turn one row of a source, whatever its format, into a document or a reject that says why it is none."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from uuid import UUID

from sbp_assets.settings import FilesSource, HubSource

EXCERPT_CHARS = 200
MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Document:
    """A row that is a document. `line` is the line of a JSONL file or the row of a Parquet file, from 1; else 1."""

    id: str
    text: str
    url: str | None
    source: str
    file: str
    line: int


@dataclass(frozen=True, slots=True)
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

    @classmethod
    def of(cls, source: FilesSource | HubSource) -> Fields:
        """Return the fields that the settings of a source name."""
        return cls(source.text_field, source.id_field, source.url_field)


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a row of a table, as far as they could be decoded."""

    text: Any
    id: Any
    url: Any
    source: Any


@dataclass(frozen=True, slots=True)
class TooLong:
    """A row of more bytes than are kept, and its beginning."""

    size: int
    head: bytes


@dataclass(frozen=True, slots=True)
class BadBytes:
    """What should be text and is not UTF-8; `where` says the place: a column, or a byte of a file."""

    raw: bytes
    where: str


@dataclass(frozen=True, slots=True)
class Undecoded:
    """A cell of a type that holds neither text nor an id; it is not decoded, which may fail or take long."""

    kind: str


Row = bytes | str | dict[str, Any] | Parts | TooLong
"""A row as a reader finds it: a line of JSON as bytes, decoded text, an object, cells of a table, or none of them."""


class RowMaker:
    """Turns rows into Documents and Rejects.

    `file` and `source` are their columns of that name. `generated` counts the ids that were made from file and line
    though an id_field is set, by the type that was found in their place.
    """

    def __init__(self, file: str, source: str, fields: Fields, max_bytes: int, generated: Counter[str]) -> None:
        self.file, self.source, self.fields, self.max_bytes = file, source, fields, max_bytes
        self.generated = generated
        stem = file.rpartition("/")[2].partition(".")[0]
        # Files of one name in two directories must not get the same id.
        self.prefix = f"{stem}-{hashlib.sha256(file.encode()).hexdigest()[:8]}"

    def make(self, row: Row, line: int) -> Document | Reject:
        """Return the document that a row is, or its reject."""
        match row:
            case bytes():
                return self._from_json(row, line)
            case str():
                return self._from_parts(Parts(row, None, None, None), line, row)
            case dict():
                return self._from_object(row, line, str(row.get(self.fields.text)))
            case Parts():
                for value in (row.text, row.id, row.url, row.source):
                    if isinstance(value, BadBytes):
                        return self._reject(line, f"invalid UTF-8 {value.where}", value.raw)
                return self._from_parts(row, line, str(row.text))
            case TooLong():
                return self._too_long(row.size, line, row.head)

    def _reject(self, line: int, reason: str, raw: bytes | str) -> Reject:
        return Reject(self.file, line, reason, excerpt(raw))

    def _too_long(self, size: int, line: int, raw: bytes | str) -> Reject:
        return self._reject(line, f"longer than corpus.max_row_bytes ({self.max_bytes:,}): {size:,} bytes", raw)

    def _from_json(self, raw: bytes, line: int) -> Document | Reject:
        try:
            row = json.loads(raw.decode())
        except UnicodeDecodeError as error:
            return self._reject(line, f"invalid UTF-8 at byte {error.start}", raw)
        except (ValueError, RecursionError) as error:
            return self._reject(line, f"malformed JSON: {error}", raw)
        if not isinstance(row, dict):
            return self._reject(line, f"not an object but {type(row).__name__}", raw)
        return self._from_object(row, line, raw)

    def _from_object(self, row: dict[str, Any], line: int, raw: bytes | str) -> Document | Reject:
        fields = self.fields
        key = lookup(row, fields.id) if fields.id else None
        url = lookup(row, fields.url) if fields.url else None
        return self._from_parts(Parts(lookup(row, fields.text), key, url, row.get("source")), line, raw)

    def _from_parts(self, row: Parts, line: int, raw: bytes | str) -> Document | Reject:
        text = row.text
        if text is None:
            return self._reject(line, f"no text: field {self.fields.text!r} is missing or null", raw)
        if isinstance(text, bytes):
            return self._reject(line, f"invalid UTF-8 in column {self.fields.text!r}", text)
        if not isinstance(text, str):
            return self._reject(line, f"text is not a string but {type_name(text)}", raw)
        if not text.strip():
            return self._reject(line, "empty text", raw)
        given = None if self.fields.id is None else usable_id(row.id)
        name = given or f"{self.prefix}-{line}"
        url = row.url if isinstance(row.url, str) and row.url else None
        source = row.source if isinstance(row.source, str) and row.source else self.source
        try:
            size = sum(len(value.encode()) for value in (text, given or "", url or ""))
            size += len(source.encode()) if source is not self.source else 0
        except UnicodeEncodeError:
            return self._reject(line, "invalid Unicode: a lone surrogate escape", raw)
        if size > self.max_bytes:
            return self._too_long(size, line, raw)
        if given is None and self.fields.id is not None:
            self.generated[type_name(row.id)] += 1
        return Document(name, text, url, source, self.file, line)


def usable_id(value: Any) -> str | None:
    """Return an id as text, and None for a value that cannot be one.

    A float is an id where it stands for a whole number, as columns of numbers with gaps are written; from 2**53 on,
    different numbers become one float. Bytes that are not UTF-8 are written as hexadecimal digits.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, bool):
        return None
    if isinstance(value, Decimal):
        return f"{value:f}" if value.is_finite() else None
    if isinstance(value, bytes):
        return value.hex() or None
    return str(value) if isinstance(value, int | UUID) else None


def type_name(value: Any) -> str:
    """Return what a value is, for people: the name of its type, 'missing' for null."""
    if isinstance(value, Undecoded):
        return value.kind
    return MISSING if value is None else type(value).__name__


def lookup(row: dict[str, Any], field: str) -> Any:
    """Return the value of a field; a dotted name reaches into nested objects where there is no field of the whole name.

    None where there is none.
    """
    if field in row or "." not in field:
        return row.get(field)
    parts = field.split(".")
    for end in range(len(parts) - 1, 0, -1):
        inner = row.get(".".join(parts[:end]))
        if isinstance(inner, dict):
            return lookup(inner, ".".join(parts[end:]))
    return None


def excerpt(raw: bytes | str) -> str:
    """Return the beginning of a row as text that every file format can hold."""
    text = raw[: 4 * EXCERPT_CHARS].decode("utf-8", "replace") if isinstance(raw, bytes) else raw[:EXCERPT_CHARS]
    return text[:EXCERPT_CHARS].encode("utf-8", "backslashreplace").decode()


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
