"""Exact similarities of candidate pairs of texts, each text cut into shingles once and each pair compared once.

The shingles of all candidate texts stand in one file, and a pair reads the two runs of numbers that are its own: what
it costs depends neither on how many texts there are nor on where the two stand. (Texts fetched by a batch's lowest to
highest place took time with the square of the corpus, and a text was cut again for every batch that it was in.)

Similarities are kept from one run to the next by the digests of the two texts, which decide them. So a new shard costs
the comparisons of its own pairs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import duckdb
import numpy as np
import polars as pl

from sbp_assets.corpus.errors import CorpusError
from sbp_assets.corpus.shingles import jaccard, shingled
from sbp_assets.storage.artifacts import atomic_path
from sbp_assets.storage.database import batches, scalar
from sbp_assets.storage.paths import as_pattern, duckdb_table
from sbp_assets.storage.progress import Progress


class Runs:
    """Runs of numbers of one type, one after another in a file, read by their places; memory holds none of them."""

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        """Make an empty file at `path`."""
        self._file, self._dtype, self._end = path.open("w+b"), np.dtype(dtype), 0

    def append(self, numbers: np.ndarray) -> int:
        """Write a run, and return the place of its first number: how many there were before."""
        start = self._end
        self._file.write(np.ascontiguousarray(numbers, self._dtype).data)
        self._end += len(numbers)
        return start

    def read(self, start: int, length: int) -> np.ndarray:
        """Return the `length` numbers from the place `start` on, of what was written before `flush`."""
        size = self._dtype.itemsize
        # Not a memory map: its pages would count as this process's memory.
        return np.frombuffer(os.pread(self._file.fileno(), size * length, size * start), self._dtype)

    def flush(self) -> None:
        """Make what was written readable."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def compare(
    db: duckdb.DuckDBPyConnection,
    documents: Mapping[str, pl.LazyFrame],
    places: Mapping[str, range],
    shingle_words: int,
    scratch: Path,
    store: Path | None,
    progress: Progress,
) -> int:
    """Create view `similarities` (a, b, jaccard) of all rows of the table `pairs` (a, b); return how many are new.

    `db` also has the table `texts` (n, text_sha256). `documents` (text) are keyed by shard, and `places` are the n of
    each. Of a shard without a document in a new pair nothing is read. `store` is the file that similarities are taken
    from and that is replaced by those of `pairs`; where there is none, or `store` is None, all pairs are new. Memory
    holds the texts of one shard and `db`'s limit. Raises CorpusError where `store` cannot be read.
    """
    db.execute(
        """
        CREATE TABLE named_pairs AS
        SELECT a, b, least(x.text_sha256, y.text_sha256) AS low, greatest(x.text_sha256, y.text_sha256) AS high
        FROM pairs JOIN texts x ON x.n = a JOIN texts y ON y.n = b
        """
    )
    known = "(SELECT NULL::VARCHAR AS low, NULL::VARCHAR AS high, NULL::DOUBLE AS jaccard LIMIT 0)"
    if store is not None and store.exists():
        known = duckdb_table(store.parent, as_pattern(store.name))
    try:
        db.execute(f"CREATE VIEW stored AS SELECT low, high, jaccard FROM {known}")
        db.execute("CREATE TABLE known AS SELECT a, b, jaccard FROM named_pairs LEFT JOIN stored USING (low, high)")
    except duckdb.Error as error:
        (reason, *_) = str(error).splitlines()
        raise CorpusError(
            f"{store}: delete the file, so that its similarities are computed again ({reason})"
        ) from error
    new = progress.total = scalar(db, "SELECT count(*) FROM known WHERE jaccard IS NULL")
    shingles = Runs(scratch / "shingles", np.uint64)
    try:
        _stage_shingles(db, documents, places, shingle_words, scratch, shingles)
        _compare_new(db, scratch, shingles, progress)
    finally:
        shingles.close()
        (scratch / "shingles").unlink()
    db.execute(
        f"""
        CREATE VIEW similarities AS
        SELECT a, b, jaccard FROM known WHERE jaccard IS NOT NULL
        UNION ALL SELECT a, b, jaccard FROM {duckdb_table(scratch, "compared-*.parquet")}
        """
    )
    if store is not None:
        with atomic_path(store) as temporary:
            target = str(temporary).replace("'", "''")
            rows = "SELECT low, high, jaccard FROM named_pairs JOIN similarities USING (a, b)"
            db.execute(f"COPY ({rows}) TO '{target}' (FORMAT parquet, COMPRESSION zstd)")
    return new


def _stage_shingles(
    db: duckdb.DuckDBPyConnection,
    documents: Mapping[str, pl.LazyFrame],
    places: Mapping[str, range],
    shingle_words: int,
    scratch: Path,
    shingles: Runs,
) -> None:
    """Create view `staged_shingles` (n, start, length): where those of each text in a new pair are in `shingles`."""
    schema = {"n": pl.Int64, "start": pl.Int64, "length": pl.Int64}
    pl.DataFrame(schema=schema).write_parquet(scratch / "staged-.parquet")
    wanted = "SELECT DISTINCT unnest([a, b]) AS n FROM known WHERE jaccard IS NULL ORDER BY n"
    for key, numbers in _by_shard(batches(db, wanted), places):
        if len(numbers):
            texts = documents[key].select("text").collect()["text"].gather(numbers - places[key].start)
            sets = (text.shingles for text in shingled(texts, shingle_words))
            rows = [(n, shingles.append(found), len(found)) for n, found in zip(numbers.tolist(), sets, strict=True)]
            pl.DataFrame(rows, schema=schema, orient="row").write_parquet(scratch / f"staged-{key}.parquet")
    shingles.flush()
    db.execute(f"CREATE VIEW staged_shingles AS SELECT * FROM {duckdb_table(scratch, 'staged-*.parquet')}")


def _by_shard(rows: Iterator[pl.DataFrame], places: Mapping[str, range]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each shard with those of the rising numbers `n` in `rows` that are its places."""
    numbers = np.empty(0, np.int64)
    for key in sorted(places):
        found = [np.empty(0, np.int64)]
        while not len(numbers) or numbers[0] < places[key].stop:
            if not len(numbers):
                if (batch := next(rows, None)) is None:
                    break
                numbers = batch["n"].to_numpy()
            end = int(np.searchsorted(numbers, places[key].stop))
            found.append(numbers[:end])
            numbers = numbers[end:]
        yield key, np.concatenate(found)


def _compare_new(db: duckdb.DuckDBPyConnection, scratch: Path, shingles: Runs, progress: Progress) -> None:
    """Write the files `compared-*.parquet` (a, b, jaccard) of the new pairs."""
    schema = {"a": pl.Int64, "b": pl.Int64, "jaccard": pl.Float64}
    pl.DataFrame(schema=schema).write_parquet(scratch / "compared-.parquet")
    query = """
        SELECT a, b, x.start AS start_a, x.length AS length_a, y.start AS start_b, y.length AS length_b FROM known
        JOIN staged_shingles x ON x.n = a JOIN staged_shingles y ON y.n = b WHERE jaccard IS NULL ORDER BY b, a
    """
    for number, batch in enumerate(batches(db, query)):
        compared, last, of_last = [], None, np.empty(0, np.uint64)
        for a, b, start_a, length_a, start_b, length_b in batch.iter_rows():
            if b != last:
                last, of_last = b, shingles.read(start_b, length_b)
            compared.append((a, b, jaccard(shingles.read(start_a, length_a), of_last)))
        pl.DataFrame(compared, schema=schema, orient="row").write_parquet(scratch / f"compared-{number:08d}.parquet")
        progress.advance(len(compared))
