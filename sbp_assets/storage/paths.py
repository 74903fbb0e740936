"""Files by their paths: every table of the project is read here, and no path is taken for a pattern.

polars, DuckDB, fsspec and vLLM read a path with `*`, `?` or `[` in it as a pattern in some of their functions, and
DuckDB takes a folder `seed=3` for a column: what is below `exp [v2]` would not be found, and for what is below `exp?1`
another folder's files would be read, or removed. Which characters the folders of a deployment may have at all is said
in `sbp_assets/settings/formats.py`.
"""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import polars as pl
from polars.io.plugins import register_io_source


def read_table(source: Path | bytes, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Return the table in the Parquet file `source` (a path, or its bytes), or only `columns` of it."""
    return pl.read_parquet(source, columns=None if columns is None else list(columns), glob=False)


def scan_table(path: Path) -> pl.LazyFrame:
    """Return the table in the Parquet file at `path`, of which only what is used will be read."""
    return pl.scan_parquet(path, glob=False)


def row_count(path: Path) -> int:
    """Return the number of rows of the Parquet file at `path`, which its footer tells."""
    return int(scan_table(path).select(pl.len()).collect().item())


def write_tables(tables: Iterable[pl.DataFrame], schema: pl.Schema, path: Path) -> None:
    """Write tables of `schema` one after another to the Parquet file `path`; memory holds one or two at a time.

    The bytes are those that `write_parquet` gives of their concatenation.
    """

    # polars cuts row groups where the chunks of a data frame end, and so each table is one.
    def chunks(*_: object) -> Iterator[pl.DataFrame]:
        return (table.rechunk() for table in tables)

    register_io_source(chunks, schema=schema).sink_parquet(path)


def as_pattern(path: Path | str) -> str:
    """Return the pattern that matches `path` alone, for a library that takes no plain path (DuckDB, fsspec's `rm`)."""
    # DuckDB has no way to write a backslash in a pattern.
    return glob.escape(str(path)).replace("\\", "?")


@contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """Yield a path of `folder` for the block that is no pattern: a link to it where its own path is one."""
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="sbp-") as temporary:
        (link := Path(temporary) / "folder").symlink_to(folder.absolute())
        yield link


def duckdb_tables(files: Sequence[Path]) -> str:
    """Return the SQL table of all rows of Parquet `files`, with the column `filename` of the path that each is from."""
    patterns = ", ".join("'" + as_pattern(file).replace("'", "''") + "'" for file in files)
    return f"read_parquet([{patterns}], filename = true, hive_partitioning = false)"


def duckdb_table(folder: Path, names: str) -> str:
    """Return the SQL table of the Parquet files in `folder` whose names match the pattern `names`."""
    pattern = f"{as_pattern(folder)}/{names}".replace("'", "''")
    return f"read_parquet('{pattern}', hive_partitioning = false)"
