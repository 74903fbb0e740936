"""Real files, good and bad, through the same door as the asset: manifest, then shard."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from sbp_assets.corpus import hub
from sbp_assets.corpus.errors import CorpusError
from sbp_assets.corpus.ingest import read_shard, require_distinct_ids, source_manifest
from sbp_assets.corpus.readers import read_rows
from sbp_assets.corpus.rows import Fields, RowMaker, cut_at_word
from sbp_assets.corpus.source_files import Root
from sbp_assets.settings import FilesSource, HubSource
from sbp_assets.storage.progress import Progress


def row(text: object, **more: object) -> bytes:
    return json.dumps({"text": text, **more}, ensure_ascii=False).encode() + b"\n"


def read(source: FilesSource | HubSource, shard: int = 0, shards: int = 1, max_row_bytes: int = 2**24):
    with Progress("test", "docs") as progress:
        manifest, _ = source_manifest(source, shards, progress)
        return read_shard(source, manifest, shard, shards, None, progress, max_row_bytes)


def write(directory: Path, name: str, content: bytes) -> FilesSource:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return FilesSource(path=str(directory))


GOOD = row("good", id="g")

BAD_ROWS = {
    "malformed": (b'{"text": "cut of\n', "malformed JSON"),
    "nested beyond reason": (b'{"text": ' + b"[" * 100_000 + b"\n", "malformed JSON"),
    "array": (b'["text"]\n', "not an object but list"),
    "null text": (row(None), "missing or null"),
    "no text": (b'{"body": "x"}\n', "missing or null"),
    "number": (row(7), "not a string but int"),
    "empty": (row(""), "empty text"),
    "blank": (row(" \t\u3000"), "empty text"),
    "invalid UTF-8": (b'{"text": "caf\xe9"}\n', "invalid UTF-8 at byte 13"),
    "lone surrogate": (b'{"text": "\\ud83d"}\n', "lone surrogate"),
    "duplicate id": (row("other", id="g"), "duplicate id in this shard: 'g'"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_is_rejected_alone_with_its_place_and_reason(tmp_path: Path, name: str) -> None:
    bad, reason = BAD_ROWS[name]
    documents, rejects, counts = read(write(tmp_path, "in/a.jsonl", GOOD + bad + row("after", id="h")))
    assert documents["id"].to_list() == ["g", "h"]
    assert documents["line"].to_list() == [1, 3]
    assert rejects["file"].to_list() == ["in/a.jsonl"]
    assert rejects["line"].to_list() == [2]
    assert reason in rejects["reason"][0]
    assert 0 < len(rejects["excerpt"][0]) <= 200 or name == "empty"
    assert counts.rows_read == 3


UNREADABLE = {
    "truncated.jsonl.zst": zstandard.compress(b"".join(row(f"text {i} {i * 7919}", id=i) for i in range(5000)))[:-7],
    "header_only.jsonl.zst": zstandard.compress(GOOD)[:5],
    "not_zstd.jsonl.zst": b"plain text",
    "truncated.jsonl.gz": gzip.compress(b"".join(row(f"text {i} {i * 7919}", id=i) for i in range(5000)))[:-9],
    "not_gzip.jsonl.gz": b"plain text",
    "not_parquet.parquet": b"PAR1 but not really",
    "zero.jsonl.gz": b"",
    "zero.jsonl.zst": b"",
    "zero.txt.zstd": b"",
    "zero.parquet": b"",
    "gzip_without_its_ending.jsonl": gzip.compress(GOOD),
    "zstd_without_its_ending.ndjson": zstandard.compress(GOOD),
    "packed_twice.jsonl.gz": gzip.compress(gzip.compress(GOOD)),
    "utf16.jsonl": GOOD.decode().encode("utf-16"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_file_fails_its_shard_alone_and_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path, "a.jsonl", GOOD)
    source = write(tmp_path, name, UNREADABLE[name])
    assert len(read(source, 0, 2)[0]) == 1
    with pytest.raises(CorpusError, match=name):
        read(source, 1, 2)


def test_file_changed_since_the_manifest_fails_and_is_named(tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl.gz", gzip.compress(GOOD))
    with Progress("test", "files") as progress:
        manifest, _ = source_manifest(source, 1, progress)
        write(tmp_path, "a.jsonl.gz", gzip.compress(GOOD + row("more")))
        with pytest.raises(CorpusError, match=r"a\.jsonl\.gz changed since the manifest"):
            read_shard(source, manifest, 0, 1, None, progress, 2**24)


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("x/deep/er/a.jsonl", lambda b: b),
        ("x/deep/er/a.jsonl.gz", lambda b: gzip.compress(b[:40]) + gzip.compress(b[40:])),
        ("x/deep/er/a.jsonl.zst", lambda b: b"".join(zstandard.compress(b[i : i + 40]) for i in range(0, len(b), 40))),
        ("x/deep/er/a.json.zst", zstandard.compress),
    ],
)
def test_every_member_of_a_compressed_file_is_read(tmp_path: Path, name: str, pack) -> None:
    texts = [
        "plain",
        "日本語の文",
        "🦊 emoji 👩‍👩‍👧",
        "ligne\u2028séparée",
        "huge " * 300_000,
        "no line feed at the end",
    ]
    content = b"\xef\xbb\xbf" + b"".join(row(text) for text in texts).rstrip(b"\n")
    documents, rejects, _ = read(write(tmp_path, name, pack(content)))
    assert documents["text"].to_list() == texts
    assert not len(rejects)


def test_empty_files_and_archives_of_nothing_have_no_rows(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", b"")
    write(tmp_path, "b.jsonl.gz", gzip.compress(b""))
    documents, rejects, counts = read(write(tmp_path, "c.jsonl.zst", zstandard.compress(b"")))
    assert (len(documents), len(rejects), counts.rows_read) == (0, 0, 0)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gz", "zst"])
def test_a_line_that_is_too_long_is_one_rejected_row(tmp_path: Path, pack) -> None:
    ending = {bytes: "", gzip.compress: ".gz", zstandard.compress: ".zst"}[pack]
    content = GOOD + row("x" * 3_000_000) + row("after", id="h") + row("y" * 5000).rstrip()
    source = write(tmp_path, f"a.jsonl{ending}", pack(content))
    write(tmp_path, f"b.txt{ending}", pack(b"z" * 3_000_000))
    documents, rejects, counts = read(source, max_row_bytes=4000)
    assert documents["id"].to_list() == ["g", "h"]
    assert rejects.select("file", "line").rows() == [
        (f"a.jsonl{ending}", 2),
        (f"a.jsonl{ending}", 4),
        (f"b.txt{ending}", 1),
    ]
    assert all(reason.startswith("longer than corpus.max_row_bytes (4,000): ") for reason in rejects["reason"])
    assert rejects["excerpt"][0].startswith('{"text": "xxx') and counts.rows_read == 5


def test_a_file_that_expands_without_end_is_read_in_bounded_memory(tmp_path: Path) -> None:
    compressor, line = zstandard.ZstdCompressor().compressobj(), row("the same words again and again " * 30)
    packed = b"".join(compressor.compress(line * 1000) for _ in range(150)) + compressor.flush()
    write(tmp_path, "a.jsonl.zst", packed)
    root = Root(str(tmp_path))
    make = RowMaker("a.jsonl.zst", "test", Fields("text", "id", "url"), 2**20, Counter())
    tracemalloc.start()
    rows = sum(1 for _ in read_rows(root, "a.jsonl.zst", make, root.describe("a.jsonl.zst")[1]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 150_000
    assert len(packed) * 1000 < 150_000 * len(line)
    assert peak < 40 * 2**20  # 145 MB in one piece


@pytest.mark.parametrize("log", [27, 28, 31])
def test_a_zstd_window_above_128_mib_is_refused_by_name(tmp_path: Path, log: int) -> None:
    stream = zstandard.ZstdCompressor().compressobj()
    frame = bytearray(stream.compress(GOOD) + stream.flush())
    frame[5] = (log - 10) << 3  # the window of a frame that does not say how much it holds
    source = write(tmp_path, "a.jsonl.zst", bytes(frame))
    if log == 27:
        assert read(source)[0]["id"].to_list() == ["g"]
        return
    with pytest.raises(CorpusError, match=r"file a\.jsonl\.zst cannot be read: .*window is larger than 128 MiB"):
        read(source)


def test_ids_that_repeat_are_told_from_rows_that_repeat(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", row("one", id=1) + row("two", id=2) + row("three", id=3))
    source = write(tmp_path, "b.jsonl", row("another", id=1) + row(" TWO ", id=2) + row("a third", id=3))
    documents, rejects, counts = read(source)
    assert len(documents) == 3
    assert rejects["reason"].to_list() == [
        "duplicate id in this shard: '1'",
        "duplicate id in this shard, and the same text: '2'",
        "duplicate id in this shard: '3'",
    ]
    assert (counts.repeated_ids, counts.first_repeated_id) == (2, "'1' in b.jsonl:1 and a.jsonl:1")
    require_distinct_ids(2, 5, 0.4, "shard 0", "")
    require_distinct_ids(1, 99, 0.01, "a few of a small shard are told by a check", "")
    for repeated, documents in [(10, 999), (2, 19)]:
        with pytest.raises(CorpusError, match=rf"{repeated} of {documents} .*more than corpus.max_repeated_ids \(1%\)"):
            require_distinct_ids(repeated, documents, 0.01, "shard 0", "")
    with pytest.raises(CorpusError, match=r"\(1\.001%\).*max_repeated_ids \(1%\)"):
        require_distinct_ids(1001, 100_000, 0.01, "shard 0", "")
    with pytest.raises(CorpusError, match=r"2 of 5 documents \(40%\).*for example '1' in b.jsonl:1 .*id_field to null"):
        require_distinct_ids(2, 5, 0.39, "shard 0", counts.first_repeated_id)


def test_ids_that_are_made_are_counted_by_what_was_there(tmp_path: Path) -> None:
    values = [None, 1.5, True, [1], {"a": 1}, 7.0, "x", "", 1e300]
    source = write(tmp_path, "a.jsonl", b"".join(row(f"text {i}", id=value) for i, value in enumerate(values)))
    write(tmp_path, "b.jsonl", row("no id at all"))
    documents, _, counts = read(source)
    assert counts.generated_ids == {"missing": 2, "float": 2, "bool": 1, "list": 1, "dict": 1, "str": 1}
    assert documents["id"].to_list()[5:7] == ["7", "x"]
    assert not read(FilesSource(path=str(tmp_path), id_field=None))[2].generated_ids


def test_ids_come_from_the_row_or_from_file_and_line(tmp_path: Path) -> None:
    write(tmp_path, "one/part.jsonl", row("a", id="mine") + row("b", id=12) + row("c", id="") + row("d", id=True))
    documents, _, _ = read(write(tmp_path, "two/part.jsonl", b"\n" * 2 + row("e") + b"\r\n" + row("f", id=None)))
    ids = documents["id"].to_list()
    assert ids[:2] == ["mine", "12"]
    assert [name.split("-")[0] + name[-2:] for name in ids[2:]] == ["part-3", "part-4", "part-3", "part-5"]
    assert len(set(ids)) == 6


def test_nested_id_field_url_and_source(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", row("t", url="http://x", source="web", metadata={"record": "r1"}))
    documents, _, _ = read(FilesSource(path=str(tmp_path / "a.jsonl"), id_field="metadata.record"))
    assert documents.row(0) == ("r1", "t", "http://x", "web", "a.jsonl", 1)


def test_parquet_without_the_text_column_is_named(tmp_path: Path) -> None:
    pl.DataFrame({"id": ["a"], "text": ["t"]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a\.parquet has no column 'body', only id, text"):
        read(FilesSource(path=str(tmp_path), text_field="body"))


def test_text_files_globs_and_urls(tmp_path: Path) -> None:
    write(tmp_path, "one/a.txt", b"first\nsecond")
    write(tmp_path, "two/b.txt", b"\xff\xfe")
    write(tmp_path, "two/_SUCCESS", b"")
    documents, rejects, _ = read(FilesSource(path=f"file://{tmp_path}"))
    assert documents["text"].to_list() == ["first\nsecond"]
    assert rejects["file"].to_list() == ["two/b.txt"]
    documents, rejects, _ = read(FilesSource(path=f"{tmp_path}/*/a.txt"))
    assert documents["file"].to_list() == ["one/a.txt"]


def test_files_go_to_shards_by_path_and_excess_is_unassigned(tmp_path: Path) -> None:
    for i in range(5):
        write(tmp_path, f"{i}.jsonl", row(str(i)))
    with Progress("test", "files") as progress:
        dealt, _ = source_manifest(FilesSource(path=str(tmp_path)), 2, progress)
        packed, _ = source_manifest(FilesSource(path=str(tmp_path), files_per_shard=2), 2, progress)
    assert dealt["shard"].to_list() == [0, 1, 0, 1, 0]
    assert packed["shard"].to_list() == [0, 0, 1, 1, None]


def test_shard_without_files_or_rows_is_empty_with_its_columns(tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", b"")
    for shard in (0, 1):
        documents, rejects, counts = read(source, shard, 2)
        assert documents.schema["line"] == pl.Int64
        assert (len(documents), len(rejects), counts.rows_read) == (0, 0, 0)


@pytest.mark.parametrize(
    ("path", "message"),
    [("{}/nothing", "does not exist"), ("{}", "holds no file to read")],
)
def test_unusable_path_is_refused(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "readme.md").write_text("x")
    with pytest.raises(CorpusError, match=message):
        read(FilesSource(path=path.format(tmp_path)))


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_local_hub_data_set_is_read_once_whatever_the_shards(tmp_path: Path, shards: int) -> None:
    for part in range(2):
        write(tmp_path, f"train-{part}.jsonl", b"".join(row(f"t{part}{i}", id=f"{part}{i}") for i in range(3)))
    source = HubSource(name=str(tmp_path))
    ids = [name for shard in range(shards) for name in read(source, shard, shards)[0]["id"]]
    assert sorted(ids) == ["00", "01", "02", "10", "11", "12"]


@pytest.mark.parametrize("limit", [1, 3, 6, 8, 100])
@pytest.mark.parametrize("shards", [1, 2, 3, 5])
def test_a_hub_data_set_gives_its_first_rows_whatever_the_shards(tmp_path: Path, limit: int, shards: int) -> None:
    rows = [f"{part}{i}" for part, count in enumerate([1, 0, 6, 1]) for i in range(count)]
    for part in range(4):
        write(
            tmp_path, f"train-{part}.jsonl", b"".join(row(f"t{name}", id=name) for name in rows if name[0] == str(part))
        )
    source = HubSource(name=str(tmp_path), max_documents=limit)
    ids = [name for shard in range(shards) for name in read(source, shard, shards)[0]["id"]]
    assert sorted(ids) == rows[:limit]


def test_a_large_part_of_a_hub_data_set_is_never_exceeded(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(hub, "EXACT_ROWS", 2)
    for part, count in enumerate([1, 6]):
        write(tmp_path, f"train-{part}.jsonl", b"".join(row(f"t{part}{i}", id=f"{part}{i}") for i in range(count)))
    source = HubSource(name=str(tmp_path), max_documents=6)
    assert [read(source, shard, 2)[0]["id"].to_list() for shard in range(2)] == [["00"], ["10", "11", "12"]]
    assert "hold 1 rows; its part of corpus.source.max_documents is 3" in caplog.text


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_hub_files_of_differing_columns_are_read(tmp_path: Path, kind: str, shards: int) -> None:
    parts: list[dict[str, object]] = [
        {"id": "a", "text": "one"},
        {"text": "two", "id": 7, "extra": {"x": 1}},
        {"id": "c", "text": "three", "url": "http://c", "extra": "of another type"},
    ]
    (tmp_path / "data").mkdir()
    for number, part in enumerate(parts):
        path = tmp_path / f"data/train-{number}.{kind}"
        pl.DataFrame([part]).write_parquet(path) if kind == "parquet" else path.write_bytes(row(**part))
    source = HubSource(name=str(tmp_path))
    frames = [read(source, shard, shards)[0] for shard in range(shards)]
    found = pl.concat(frames).sort("id").select("id", "text", "url").rows()
    assert found == [("7", "two", None), ("a", "one", None), ("c", "three", "http://c")]


def test_a_bad_row_of_a_hub_file_costs_that_row_and_other_formats_are_read(tmp_path: Path) -> None:
    documents, rejects, _ = read(
        HubSource(name=write(tmp_path / "lines", "train.jsonl", GOOD + b"{\n" + row("x")).path)
    )
    assert (len(documents), rejects["line"].to_list()) == (2, [2])
    write(tmp_path / "other", "train.csv", b"id,text\n1,one\n2,two\n")
    documents, _, _ = read(HubSource(name=str(tmp_path / "other")))
    assert documents.select("id", "text").rows() == [("1", "one"), ("2", "two")]
    write(
        tmp_path / "array", "train.json.gz", gzip.compress(b'[{"id": "1", "text": "one"},\n{"id": "2", "text": "two"}]')
    )
    documents, rejects, _ = read(HubSource(name=str(tmp_path / "array")))
    assert documents.select("id", "text").rows() == [("1", "one"), ("2", "two")] and not len(rejects)


@pytest.mark.parametrize("name", ["exp [v2]", "a*b", "what?", "a::b"])
def test_a_local_hub_data_set_whose_path_is_a_pattern_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, "train.jsonl", GOOD)
    write(tmp_path / "aab", "train.jsonl", GOOD + row("of another data set"))
    (tmp_path / "link").symlink_to(tmp_path / name)
    for path in (name, "link"):
        with pytest.raises(CorpusError, match="takes for a pattern: rename it"):
            read(HubSource(name=str(tmp_path / path)))


@given(st.text(max_size=40), st.integers(1, 40))
def test_cut_text_is_a_short_prefix_at_a_word_boundary(text: str, limit: int) -> None:
    cut = cut_at_word(text, limit)
    assert len(cut) <= max(limit, 0) or len(text) <= limit
    assert text.lstrip().startswith(cut) or cut == text
    assert cut or not text.strip()


def test_cut_keeps_whole_words_where_there_are_any() -> None:
    assert cut_at_word("alpha beta gamma", 12) == "alpha beta"
    assert cut_at_word("alpha beta gamma", 10) == "alpha beta"
    assert cut_at_word("x" * 10, 4) == "xxxx"
    assert cut_at_word("日本語の文章", 3) == "日本語"
