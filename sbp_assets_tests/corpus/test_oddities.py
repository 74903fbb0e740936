"""Corpora of random mixtures of everything odd: no row is lost without a word.

The rows that become documents, the rows that are rejected, and the rows of files that are named as not read (in what
the manifest leaves out, or in the error of their shard) are together all the rows that are there.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from sbp_assets.corpus.errors import CorpusError
from sbp_assets.corpus.ingest import read_shard, source_manifest
from sbp_assets.settings import FilesSource
from sbp_assets.storage.progress import Progress

MAX_ROW_BYTES = 300

LINES = [
    *(json.dumps({"text": f"text {n}", "id": value}).encode() for n, value in enumerate(["a", "b", 7, 7.0, 2.5, True])),
    b'{"text": "no id"}',
    b'{"text": "surrogate \\ud83d"}',
    b'{"text": "caf\xe9"}',
    b'{"text": null}',
    b'{"text": " "}',
    b'{"text": 7}',
    b'{"body": "no text"}',
    b'{"text": "cut',
    b'["text"]',
    b"\xff\xfe\x00",
    b"\x00",
    b'{"text": "' + b"long " * 100 + b'"}',
    '{"text": "日本語", "id": "\u200f"}'.encode(),
]
CELLS = [b"words", b"caf\xe9", None, b"", b"long " * 100, "日本語".encode()]

FOLDERS = [b"", b"sub/", b"sub/deep [1]/", b".hidden/", b"_tmp/", b"caf\xe9/"]
STEMS = [b"a", b"b c", b"[x]*?#%", b".hidden", b"_hidden", b"caf\xe9", "né\u202e".encode(), b"line\nfeed", b"a.b.c"]
ENDINGS = [b".jsonl", b".ndjson", b".JSONL", b".json", b".md", b"", b".jsonl.tmp"]
PACKINGS = {
    b"": lambda content: content,
    b".gz": gzip.compress,
    b".GZ": lambda content: gzip.compress(content[:9]) + gzip.compress(content[9:]),
    b".zst": zstandard.compress,
    b".zstd": lambda content: zstandard.compress(content[:9]) + zstandard.compress(content[9:]),
}


@dataclass
class File:
    """A file's name as bytes, its content, and how many rows are in it."""

    name: bytes
    content: bytes
    rows: int


def parquet(cells: list[bytes | None]) -> bytes:
    raw = pa.array(cells, pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers(), null_count=raw.null_count)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": text, "id": pa.array([1.0] * len(raw))}), sink)
    return sink.getvalue().to_pybytes()


@st.composite
def odd_files(draw: st.DrawFn) -> File:
    name = draw(st.sampled_from(FOLDERS)) + draw(st.sampled_from(STEMS))
    kind = draw(st.sampled_from(["lines", "lines", "lines", "parquet", "text"]))
    if kind == "parquet":
        cells = draw(st.lists(st.sampled_from(CELLS), max_size=4))
        content, rows = parquet(cells), len(cells)
        cut = draw(st.booleans()) and draw(st.integers(0, len(content) - 1))
        return File(name + b".parquet", content[:cut] if cut is not False else content, rows)
    if kind == "text":
        content, rows, name = draw(st.sampled_from(CELLS)) or b"", 1, name + b".txt"
    else:
        lines = draw(st.lists(st.sampled_from([*LINES, b"", b"  "]), max_size=5))
        rows = sum(bool(line.strip()) for line in lines)
        # A file that begins like UTF-16 is refused as a whole: the others below do not.
        content = b"\n".join(lines) + draw(st.sampled_from([b"", b"\n", b"\r\n"])) * bool(lines)
        name += draw(st.sampled_from(ENDINGS))
    packing = draw(st.sampled_from(list(PACKINGS)))
    packed = PACKINGS[packing](content)
    if packing and draw(st.integers(0, 3)) == 0:
        packed = packed[: draw(st.integers(0, len(packed) - 1))]
    return File(name + packing, packed, rows)


Links = list[tuple[bytes, bytes]]
links = st.lists(
    st.tuples(
        st.sampled_from([b"l.jsonl", b"sub/l.jsonl.gz", b"linked", b"sub/linked"]),
        st.sampled_from([b".", b"..", b"sub", b"_tmp", b"nowhere", b"l.jsonl", b"a.jsonl", b"_hidden.jsonl"]),
    ),
    max_size=3,
)


BASES = ["corpus", "exp [v2]", "a*b", "what?", "**", "a#b", "a::b", "100%", "a b", "né", "[!x]", "b\\c"]
FORMS = ["{base}", "{base}/", "{parent}//./{name}", "{name}", "./{name}", "../outer/{name}//"]
FORMS += ["{base}/**", "./{name}//**", "../outer/{name}/**", "file://{base}", "file://{parent}//{name}/**"]
locations = st.tuples(st.sampled_from(BASES), st.sampled_from(FORMS)).filter(
    lambda location: not ("::" in location[0] and "file://" in location[1])  # In a URL, :: joins two.
)


def build(base: bytes, files: list[File], linked: Links) -> dict[bytes, int]:
    """Write the files and links; return the rows that are there by the real path of their file."""
    rows: dict[bytes, int] = {}
    for file in files:
        path = base + b"/" + file.name
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as stream:
            stream.write(file.content)
        rows[os.path.realpath(path)] = file.rows
    for name, target in linked:
        path = base + b"/" + name
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not os.path.lexists(path):
            os.symlink(os.path.relpath(base + b"/" + target, os.path.dirname(path)), path)
    return rows


def is_named(file: str, left_out: dict[str, str]) -> bool:
    """Whether a file, or a folder that holds it, is among what is left out."""
    parts = file.split("/")
    return file in left_out or any("/".join(parts[:end]) + "/" in left_out for end in range(1, len(parts)))


@settings(max_examples=150, deadline=None)
@given(st.lists(odd_files(), min_size=1, max_size=6), links, locations, st.sampled_from([None, 1]))
def test_rows_read_rejected_and_of_named_files_are_all_rows(
    files: list[File], linked: Links, location: tuple[str, str], files_per_shard: int | None
) -> None:
    with tempfile.TemporaryDirectory() as folder, Progress("test", "files") as progress:
        name, form = location
        base = Path(folder) / "outer" / name
        base.mkdir(parents=True)
        above = any(target == b".." for _, target in linked)
        for other in () if above else ("exp v", "aab", "what1", "x"):  # which a base matches as a pattern
            (base.parent / other).mkdir()
            (base.parent / other / "other.jsonl").write_bytes(b'{"text": "of another corpus"}\n')
        # One file is always there to be read: a corpus without any is refused, with the names of what it holds.
        rows = build(os.fsencode(base), [*files, File(b"z.jsonl", b'{"text": "last"}\n', 1)], linked)
        source = FilesSource(
            path=form.format(base=base, parent=base.parent, name=name), files_per_shard=files_per_shard
        )
        shards = 2 * len(files) + len(linked) + 2  # At least one for each file that is read, so that each fails alone.
        with contextlib.chdir(base.parent):
            check(source, base, shards, rows, progress)


def check(source: FilesSource, base: Path, shards: int, rows: dict[bytes, int], progress: Progress) -> None:
    """Read the corpus shard by shard and count what becomes of the `rows` of each file."""
    manifest, left_out = source_manifest(source, shards, progress)
    read: dict[bytes, int] = {}
    named = 0
    for file, shard in manifest.select("file", "shard").iter_rows():
        real = os.path.realpath(os.fsencode(base / file))
        assert real not in read, "read twice"
        try:
            documents, rejects, counts = read_shard(source, manifest, shard, shards, None, progress, MAX_ROW_BYTES)
        except CorpusError as error:
            assert file in str(error)
            read[real], named = 0, named + rows[real]
            continue
        read[real] = len(documents) + len(rejects)
        assert counts.rows_read == read[real]
        assert (read[real], set(documents["file"]) | set(rejects["file"])) == (
            rows[real],
            {file} if read[real] else set(),
        )
    for real, count in rows.items():
        if real not in read:
            shown = os.path.relpath(real, os.path.realpath(os.fsencode(base))).decode(errors="backslashreplace")
            assert is_named(shown, left_out), shown
            named += count
    assert sum(read.values()) + named == sum(rows.values())
