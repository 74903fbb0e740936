"""Parquet files as other programs write them, through the same door as the asset."""

from __future__ import annotations

import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sbp_assets.corpus.errors import CorpusError
from sbp_assets.settings import FilesSource
from sbp_assets_tests.corpus.test_readers import read

UUIDS = [uuid.UUID(int=place) for place in range(3)]


def damaged(values: list[bytes | None], kind: pa.DataType | None = None) -> pa.Array:
    """Text that is not checked to be UTF-8, as a program in another language may write it."""
    raw = pa.array(values, pa.binary())
    return pa.Array.from_buffers(kind or pa.string(), len(raw), raw.buffers(), null_count=raw.null_count)


def ids(tmp_path: Path, column: pa.Array, field: str = "id", **fields: Any):
    table = pa.table({"text": [f"text {place}" for place in range(len(column))], field.partition(".")[0]: column})
    pq.write_table(table, tmp_path / "a.parquet")
    return read(FilesSource(path=str(tmp_path), id_field=field, **fields))


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1, 2, None], pa.int32()), ["1", "2", None]),
        (pa.array([1.0, 2.5, float("nan")]), ["1", None, None]),
        (pa.array([2.0**53, 0.0, None]), [None, "0", None]),
        (pa.array([Decimal("12.50"), Decimal("7.00"), None], pa.decimal128(10, 2)), ["12.50", "7.00", None]),
        (pa.array([u.bytes for u in UUIDS], pa.uuid()), [str(u) for u in UUIDS]),
        (pa.array([u.bytes for u in UUIDS], pa.binary(16)), [u.hex for u in UUIDS]),
        (pa.array([b"plain", b"\xff\x00", b""], pa.binary()), ["plain", "ff00", None]),
        (pa.array(["a", "b", "a2"]).dictionary_encode(), ["a", "b", "a2"]),
        (pa.array(["a", "b", " "], pa.string_view()), ["a", "b", None]),
        (pa.array(["a", "b", None], pa.large_string()), ["a", "b", None]),
        (pa.array(['"a"', "2", None], pa.json_()), ['"a"', "2", None]),
        (pa.array([1, 2**62 + 1, None], pa.timestamp("ns")), [None, None, None]),
        (pa.array([True, False, None]), [None, None, None]),
        (pa.array([["a"], [], None]), [None, None, None]),
        (pa.nulls(3), [None, None, None]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_ids_of_any_type_are_used_or_made_and_counted(
    tmp_path: Path, column: pa.Array, expected: list[str | None]
) -> None:
    documents, rejects, counts = ids(tmp_path, column)
    found = documents["id"].to_list()
    assert [name if want else None for name, want in zip(found, expected, strict=True)] == expected
    assert [name.startswith("a-") for name in found] == [want is None for want in expected]
    assert counts.generated_ids.total() == expected.count(None)
    assert not len(rejects)


def test_fields_are_found_flat_with_dots_or_nested(tmp_path: Path) -> None:
    inner = pa.array([{"id": "n1", "rec.id": "r1"}, None, {"id": None, "rec.id": "r3"}])
    table = pa.table({"meta.id": ["k1", "k2", "k3"], "meta": inner, "body.text": ["a b", "c d", "e f"]})
    pq.write_table(table, tmp_path / "a.parquet")

    def found(field: str) -> list[str]:
        return read(FilesSource(path=str(tmp_path), text_field="body.text", id_field=field))[0]["id"].to_list()

    assert found("meta.id") == ["k1", "k2", "k3"]
    assert found("meta.rec.id")[::2] == ["r1", "r3"]
    pq.write_table(table.drop_columns("meta.id"), tmp_path / "a.parquet")
    assert found("meta.id")[0] == "n1" and all(name.startswith("a-") for name in found("meta.id")[1:])
    assert all(name.startswith("a-") for name in found("meta"))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("field", ["id", "url", "source", "text"])
def test_a_byte_that_is_not_utf8_costs_one_row_wherever_it_is(tmp_path: Path, field: str, nested: bool) -> None:
    if nested and field == "source":
        pytest.skip("only a column of its own is the source")
    columns: dict[str, Any] = {name: pa.array([f"{name}1", f"{name}2", f"{name}3"]) for name in ("id", "url", "text")}
    columns[field] = damaged([b"one", b"caf\xe9", b"three"])
    if nested:
        columns["m"] = pa.StructArray.from_arrays([columns.pop(field)], [field])
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    fields = {f"{field}_field": f"m.{field}"} if nested else {}
    documents, rejects, _ = read(FilesSource(path=str(tmp_path), **fields))
    assert documents["line"].to_list() == [1, 3]
    name = f"m.{field}" if nested else field
    assert rejects.select("line", "reason").rows() == [(2, f"invalid UTF-8 in column {name!r}")]


def test_text_that_is_marked_as_bytes_is_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([b"caf\xc3\xa9", b"caf\xe9"])}), tmp_path / "a.parquet")
    documents, rejects, _ = read(FilesSource(path=str(tmp_path)))
    assert documents["text"].to_list() == ["café"]
    assert rejects["reason"].to_list() == ["invalid UTF-8 in column 'text'"]


def test_columns_that_nobody_asks_for_may_be_anything(tmp_path: Path) -> None:
    others = {
        "bytes": damaged([b"\xff"]),
        "when": pa.array([2**62 + 1], pa.timestamp("ns")),
        "map": pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())),
        "source": pa.StructArray.from_arrays([damaged([b"\xff"])], ["x"]),
        "m": pa.StructArray.from_arrays([pa.array(["i"]), damaged([b"\xff"])], ["id", "bad"]),
        "wide": pa.array([Decimal(1)], pa.decimal256(76, 0)),
    }
    names = ["text", *others, "twice", "twice"]
    columns = [pa.array(["words"]), *others.values(), damaged([b"\xff"]), pa.array([1])]
    pq.write_table(pa.table(columns, names=names), tmp_path / "a.parquet")
    documents, rejects, _ = read(FilesSource(path=str(tmp_path), id_field="m.id"))
    assert documents.select("id", "text", "source").rows() == [("i", "words", tmp_path.name)]
    assert not len(rejects)


@pytest.mark.parametrize("field", ["text_field", "id_field", "url_field"])
def test_a_column_that_is_asked_for_and_there_twice_is_refused(tmp_path: Path, field: str) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["words"])], names=["x", "x", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"file a\.parquet has 2 columns named 'x'"):
        read(FilesSource(path=str(tmp_path), **{field: "x"}))


def test_a_text_column_of_another_type_rejects_its_rows_without_decoding_them(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([["a"], None])}), tmp_path / "a.parquet")
    documents, rejects, _ = read(FilesSource(path=str(tmp_path)))
    assert not len(documents)
    assert all("text is not a string but list" in reason for reason in rejects["reason"])


def test_a_url_column_that_is_there_twice_is_no_matter_where_no_url_is_read(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["words"])], names=["url", "url", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"2 columns named 'url'.*to null"):
        read(FilesSource(path=str(tmp_path)))
    documents, _, _ = read(FilesSource(path=str(tmp_path), url_field=None))
    assert documents.select("text", "url").rows() == [("words", None)]


@pytest.mark.parametrize("field", ["id", "url", "source"])
def test_what_a_row_holds_beside_its_text_counts_too(tmp_path: Path, field: str) -> None:
    pq.write_table(pa.table({"text": ["x" * 500] * 2, field: ["y" * 500, "z" * 501]}), tmp_path / "a.parquet")
    documents, rejects, _ = read(FilesSource(path=str(tmp_path)), max_row_bytes=1000)
    assert documents["line"].to_list() == [1]
    assert rejects["reason"].to_list() == ["longer than corpus.max_row_bytes (1,000): 1,001 bytes"]


def test_a_text_that_is_too_long_is_rejected(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x" * 2000, "short", "y" * 999]}), tmp_path / "a.parquet")
    documents, rejects, _ = read(FilesSource(path=str(tmp_path)), max_row_bytes=1000)
    assert documents["line"].to_list() == [2, 3]
    assert rejects["reason"].to_list() == ["longer than corpus.max_row_bytes (1,000): 2,000 bytes"]


def test_row_numbers_go_on_over_row_groups_and_batches(tmp_path: Path) -> None:
    texts = [f"text {place}" for place in range(700)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=150)
    documents, _, _ = read(FilesSource(path=str(tmp_path)))
    assert documents["text"].to_list() == texts
    assert documents["line"].to_list() == list(range(1, 701))
