"""Read the rows of a Parquet file, of which only the columns that are asked for are decoded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sbp_assets.corpus.errors import CorpusError
from sbp_assets.corpus.rows import BadBytes, Fields, Parts, Undecoded

# Rows that are in memory together: of text of 16 MB each, not more than four.
BATCH_ROWS, BATCH_BYTES = 128, 2**26
SOURCE = "source"
Path = tuple[str, ...]


def parquet_rows(stream: BinaryIO, file: str, fields: Fields) -> Iterator[tuple[int, Parts]]:
    """Yield the rows with their numbers, from 1. Raises CorpusError where there is no such column, or two of them."""
    table = pq.ParquetFile(stream)
    schema = table.schema_arrow
    if find(schema, fields.text, file) is None:
        raise CorpusError(
            f"file {file} has no column {fields.text!r}, only {', '.join(schema.names)}; set corpus.source.text_field"
        )
    asked = {name: find(schema, name, file) for name in (fields.text, fields.id, fields.url) if name}
    # A column of this name may be of any type, or there may be two: it is nothing that anybody asked for.
    if SOURCE not in asked and schema.names.count(SOURCE) == 1 and _is_text(schema.field(SOURCE).type):
        asked[SOURCE] = (SOURCE,)
    columns = {name: path for name, path in asked.items() if path and _holds_values(_type_at(schema, path))}
    fixed = {
        name: Undecoded(str(_type_at(schema, path))) for name, path in asked.items() if path and name not in columns
    }
    line = 0
    for batch in table.iter_batches(batch_size=_rows_at_once(table, columns), columns=list(columns), use_threads=False):
        cells = {name: _cells(_leaf(batch, path), name) for name, path in columns.items()}
        absent = [None] * batch.num_rows
        wanted = [
            cells.get(name or "", [fixed.get(name or "")] * batch.num_rows if name in fixed else absent)
            for name in (fields.text, fields.id, fields.url, SOURCE)
        ]
        for parts in zip(*wanted, strict=True):
            line += 1
            yield line, Parts(*parts)


def find(schema: pa.Schema, field: str, file: str) -> Path | None:
    """Return the names that lead to a field: one of the whole name, or a struct's; None where there is none.

    Raises CorpusError where the name is that of two columns.
    """
    parts = field.split(".")
    for end in range(len(parts), 0, -1):
        name, rest = ".".join(parts[:end]), parts[end:]
        names = schema.names
        if names.count(name) > 1:
            raise CorpusError(
                f"file {file} has {names.count(name)} columns named {name!r}: which is meant? Rename one, or set "
                "corpus.source.text_field, id_field or url_field to another column; id_field and url_field also to null"
            )
        if name in names:
            if not rest:
                return (name,)
            inner = schema.field(name).type
            if pa.types.is_struct(inner) and (below := find(pa.schema(list(inner)), ".".join(rest), file)):
                return (name, *below)
    return None


def _type_at(schema: pa.Schema, path: Path) -> pa.DataType:
    kind = schema.field(path[0]).type
    for name in path[1:]:
        kind = kind.field(name).type
    return kind


def _storage(kind: pa.DataType) -> pa.DataType:
    """Return the type that the values are of, behind dictionaries and extensions."""
    if pa.types.is_dictionary(kind):
        return _storage(kind.value_type)
    return _storage(kind.storage_type) if isinstance(kind, pa.BaseExtensionType) else kind


def _is_text(kind: pa.DataType) -> bool:
    kind = _storage(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _holds_values(kind: pa.DataType) -> bool:
    """Whether a value can be a text or an id. Others may not even convert: a timestamp in nanoseconds, say."""
    kind = _storage(kind)
    tests = (pa.types.is_fixed_size_binary, pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return _is_text(kind) or _is_bytes(kind) or any(test(kind) for test in tests)


def _rows_at_once(table: pq.ParquetFile, columns: dict[str, Path]) -> int:
    """Return how many rows fit BATCH_BYTES, by the largest mean of a column and row group."""
    paths = {".".join(path) for path in columns.values()}
    largest = 1
    for number in range(table.metadata.num_row_groups):
        group = table.metadata.row_group(number)
        for place in range(group.num_columns):
            column = group.column(place)
            if column.path_in_schema in paths:
                largest = max(largest, column.total_uncompressed_size // max(group.num_rows, 1))
    return max(1, min(BATCH_ROWS, BATCH_BYTES // largest))


def _leaf(batch: pa.RecordBatch, path: Path) -> pa.Array:
    # A name with a dot selects the column of that name and the nested one.
    array = batch.column(batch.schema.names.index(path[0]))
    for name in path[1:]:
        array = pc.struct_field(array, [name])
    return array


def _cells(column: pa.Array, name: str) -> list[Any]:
    """Return the values as Python's; text is decoded cell by cell: one invalid byte must not cost the batch."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if isinstance(column.type, pa.BaseExtensionType) and not pa.types.is_fixed_size_binary(column.type.storage_type):
        column = column.storage
    if _is_text(column.type):
        return [_decode(raw, name) for raw in column.cast(pa.large_binary()).to_pylist()]
    values = column.to_pylist()
    # Text without a note that it is text, as older writers have it.
    return [_text_or_bytes(raw) for raw in values] if _is_bytes(column.type) else values


def _decode(raw: bytes | None, name: str) -> str | BadBytes | None:
    try:
        return None if raw is None else raw.decode()
    except UnicodeDecodeError:
        return BadBytes(raw or b"", f"in column {name!r}")


def _text_or_bytes(raw: bytes | None) -> str | bytes | None:
    try:
        return None if raw is None else raw.decode()
    except UnicodeDecodeError:
        return raw
