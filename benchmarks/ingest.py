"""Seconds and peak memory of reading inputs that are meant to exhaust both.

    python -m benchmarks.ingest [--files 100000] [--line-mb 64] [--rows 700000]

- `zst` and `gz`: so many log-like rows of 880 bytes (620 MB), compressed 5,000 and 300 times, and
  `window`: a .zst of the largest window that is read, 128 MiB;
- `line`: one line of so many MB between two short ones, rejected under corpus.max_row_bytes, and `line_read`: read;
- `parquet`: 20,000 rows of one text of 100 kB, which Parquet stores once;
- `files`: so many files of one row in one folder: listed and digested (`manifest`), read, and compared with the
  manifest by the sensor (`changes`).

Each runs in a process of its own, whose peak resident memory counts; `baseline` is one that reads two rows. The rows
are counted and dropped, except for `files`, which is read into the tables of a shard. The last line is the JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from benchmarks.arguments import parser
from sbp_assets.corpus.ingest import read_shard, source_changes, source_manifest
from sbp_assets.corpus.readers import read_rows
from sbp_assets.corpus.rows import Document, Fields, RowMaker
from sbp_assets.corpus.source_files import Root
from sbp_assets.settings import FilesSource
from sbp_assets.storage.progress import Progress

LIMIT = 2**24  # the default of corpus.max_row_bytes
Sizes = argparse.Namespace


def main() -> None:
    """Measure each case in a new process and print a table and the JSON."""
    from benchmarks.machine import describe  # It loads torch, which would count in every process.

    arguments = parser(__doc__)
    arguments.add_argument("--files", type=int, default=100_000)
    arguments.add_argument("--line-mb", type=int, default=64)
    arguments.add_argument("--rows", type=int, default=700_000)
    sizes = arguments.parse_args()
    found: dict[str, Any] = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            CASES[case][0](Path(folder), sizes)
            found[case] = _in_process(case, folder)
        print(case, found[case], flush=True)
    print(json.dumps({"machine": describe(), **found}))


def _in_process(case: str, folder: str) -> dict[str, Any]:
    """Return what reading `folder` gives and takes, in a process that has done nothing else."""
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(case, folder, writer))
    process.start()
    writer.close()
    result: dict[str, Any] = reader.recv()
    process.join()
    return result


def _measure(case: str, folder: str, writer: Any) -> None:
    start = time.perf_counter()
    result = CASES[case][1](folder)
    seconds = round(time.perf_counter() - start, 2)
    writer.send({**result, "seconds": seconds, "peak_mb": _peak_mb()})


def _peak_mb() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # Linux hands the peak of getrusage on from a process to those that it starts.
        kilobytes = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:")).split()[1]
        return int(kilobytes) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20  # bytes on macOS


def _line() -> bytes:
    return json.dumps({"id": None, "text": "error: connection refused, retrying in 5 s " * 20}).encode() + b"\n"


def write_zst(folder: Path, sizes: Sizes) -> None:
    """Write the log-like rows as .jsonl.zst."""
    _write_zst(folder, sizes, zstandard.ZstdCompressor(level=3))


def write_window(folder: Path, sizes: Sizes) -> None:
    """Write the log-like rows as .jsonl.zst with a window of 128 MiB, the largest that is read."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27)
    _write_zst(folder, sizes, zstandard.ZstdCompressor(compression_params=parameters))


def _write_zst(folder: Path, sizes: Sizes, packing: zstandard.ZstdCompressor) -> None:
    compressor, block = packing.compressobj(), _line() * 1000
    with (folder / "a.jsonl.zst").open("wb") as file:
        for _ in range(sizes.rows // 1000):
            file.write(compressor.compress(block))
        file.write(compressor.flush())


def write_gz(folder: Path, sizes: Sizes) -> None:
    """Write the log-like rows as .jsonl.gz."""
    block = _line() * 1000
    with gzip.open(folder / "a.jsonl.gz", "wb", compresslevel=6) as file:
        for _ in range(sizes.rows // 1000):
            file.write(block)


def write_line(folder: Path, sizes: Sizes) -> None:
    """Write a long line between two short ones."""
    with (folder / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "first"}\n{"text": "')
        for number in range(sizes.line_mb):
            file.write(f"word{number:04d} ".encode() * 110_000)  # 0.99 MB
        file.write(b'"}\n{"text": "last"}\n')


def write_parquet(folder: Path, _: Sizes) -> None:
    """Write one text 20,000 times, which Parquet stores as a dictionary of one."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), ["repeated text " * 7_000])
    pq.write_table(pa.table({"text": text}), folder / "a.parquet")


def write_files(folder: Path, sizes: Sizes) -> None:
    """Write files of one row each into one folder."""
    for number in range(sizes.files):
        (folder / f"{number:06d}.jsonl").write_text(f'{{"text": "document number {number}"}}\n')


def write_two(folder: Path, _: Sizes) -> None:
    """Write two short rows."""
    (folder / "a.jsonl").write_text('{"text": "first"}\n{"text": "last"}\n')


def read_all(folder: str, limit: int = LIMIT) -> dict[str, Any]:
    """Read the one file of `folder` row by row and keep nothing."""
    root = Root(folder)
    (file,), _ = root.files()
    make = RowMaker(file, root.name, Fields("text", "id", "url"), limit, Counter())
    size, digest, _ = root.describe(file)
    kinds = Counter(type(row) is Document for row in read_rows(root, file, make, digest))
    return {"file_bytes": size, "documents": kinds[True], "rejected": kinds[False]}


def read_long(folder: str) -> dict[str, Any]:
    """Read the one file of `folder` under a limit that admits the long line."""
    return read_all(folder, 2**30)


def read_files(folder: str) -> dict[str, Any]:
    """List and digest the files, read them as one shard, and compare them with their manifest."""
    source, seconds = FilesSource(path=folder), {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[f"{name}_seconds"] = round(time.perf_counter() - start, 2)
        return result

    with Progress("files", "files") as progress:
        manifest, _ = timed("manifest", lambda: source_manifest(source, 1, progress))
        documents, rejects, _ = timed("read", lambda: read_shard(source, manifest, 0, 1, None, progress, LIMIT))
    changes = timed("changes", lambda: source_changes(source, manifest))
    changed = sum(map(len, changes.values()))
    return {"documents": len(documents), "rejected": len(rejects), "changes": changed, **seconds}


CASES: dict[str, tuple[Callable[[Path, Sizes], None], Callable[[str], dict[str, Any]]]] = {
    "baseline": (write_two, read_all),
    "zst": (write_zst, read_all),
    "window": (write_window, read_all),
    "gz": (write_gz, read_all),
    "line": (write_line, read_all),
    "line_read": (write_line, read_long),
    "parquet": (write_parquet, read_all),
    "files": (write_files, read_files),
}

if __name__ == "__main__":
    main()
