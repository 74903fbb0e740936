"""Parquet files by their paths: every table of the project is read here, and no path is taken for a pattern.

polars and DuckDB read a path with `*`, `?` or `[` in it as a pattern, and DuckDB takes a folder `seed=3` for a column:
a store below `exp [v2]` would not be found, one below `exp?1` might be another one.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

import polars as pl


def read_table(source: Path | bytes, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Return the table in the Parquet file `source` (a path, or its bytes), or only `columns` of it."""
    return pl.read_parquet(source, columns=None if columns is None else list(columns), glob=False)


def scan_table(path: Path) -> pl.LazyFrame:
    """Return the table in the Parquet file at `path`, of which only what is used will be read."""
    return pl.scan_parquet(path, glob=False)


def as_pattern(path: Path | str) -> str:
    """Return the pattern that matches `path` alone, for a library that takes no plain path (DuckDB, fsspec's `rm`)."""
    # DuckDB has no way to write a backslash in a pattern.
    return glob.escape(str(path)).replace("\\", "?")


def duckdb_table(folder: Path, names: str) -> str:
    """Return the SQL table of the Parquet files in `folder` whose names match the pattern `names`."""
    pattern = f"{as_pattern(folder)}/{names}".replace("'", "''")
    return f"read_parquet('{pattern}', hive_partitioning = false)"
