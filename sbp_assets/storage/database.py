"""DuckDB for joins and groups of tables that may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb


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
