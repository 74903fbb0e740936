"""DuckDB for joins and groups of tables that may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow.parquet as pq

from sbp_assets.storage.paths import duckdb_tables

ROWS = 65_536  # Rows of a result in memory at a time.


@contextmanager
def database(scratch: Path, memory_limit: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield an empty database for the block, which takes `memory_limit` ("4GB") and spills into the folder `scratch`.

    The order of rows is kept only where a query asks for it.
    """
    with duckdb.connect() as db:
        db.execute("SET memory_limit = ?", [memory_limit])
        db.execute("SET temp_directory = ?", [str(scratch / "spill")])
        db.execute("SET preserve_insertion_order = false")
        yield db


def scalar(db: duckdb.DuckDBPyConnection, query: str) -> int:
    """Return the one number that `query` gives."""
    row = db.execute(query).fetchone()
    assert row is not None
    return int(row[0])


def batches(
    db: duckdb.DuckDBPyConnection,
    query: str,
    rows: int | None = None,
    parameters: Sequence[Any] | None = None,
    file: Path | None = None,
) -> Iterator[pl.DataFrame]:
    """Yield what `query` returns, `rows` (ROWS) or so at a time; `db` may be used for other queries meanwhile.

    With `file` the result is written there first: of a large one in order, DuckDB would hold all in its memory while it
    is read, and fail where that is more than its limit.
    """
    if file:
        path = str(file).replace("'", "''")
        db.execute(f"COPY ({query}) TO '{path}' (FORMAT parquet, ROW_GROUP_SIZE 30720)", parameters)
        with pq.ParquetFile(file) as result:
            yield from map(pl.DataFrame, result.iter_batches(rows or ROWS))
        return
    with db.cursor() as cursor:
        for batch in cursor.execute(query, parameters).to_arrow_reader(rows or ROWS):
            yield pl.DataFrame(batch)


def create_view(db: duckdb.DuckDBPyConnection, name: str, files: Mapping[str, Path]) -> None:
    """Create the view `name` of the rows of Parquet `files` (by shard), with the `shard` of each."""
    db.execute(
        f"CREATE TABLE {name}_files AS SELECT unnest($1::VARCHAR[]) AS filename, unnest($2::VARCHAR[]) AS shard",
        [[str(path) for path in files.values()], list(files)],
    )
    table = duckdb_tables(list(files.values()))
    db.execute(f"CREATE VIEW {name} AS FROM {table} JOIN {name}_files USING (filename)")
