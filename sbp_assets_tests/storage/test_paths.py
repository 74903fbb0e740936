"""No path is taken for a pattern, whatever library opens it."""

from pathlib import Path

import duckdb
import fsspec
import polars as pl
import pytest

from sbp_assets.storage.paths import as_pattern, duckdb_table, plain_path, read_table, scan_table, write_tables

ODD = [
    "exp [v2]",
    "exp?1",
    "a*",
    "#1",
    "50%",
    "it's",
    '"q"',
    "{a,b}",
    "~",
    "seed=3",
    "back\\slash",
    "é 漢",
    "a::b",
    "$HOME",
]


@pytest.mark.parametrize("name", ODD)
def test_a_table_below_any_folder_is_that_table(tmp_path: Path, name: str) -> None:
    (folder := tmp_path / name).mkdir()
    for other in (f"exp {name[-2:-1]}", "exp1", "expX1", "ab"):  # what the names match as patterns
        (tmp_path / other).mkdir(exist_ok=True)
        pl.DataFrame({"x": ["another"]}).write_parquet(tmp_path / other / "t-0.parquet")
    wanted = pl.DataFrame({"x": ["this"], "y": [1]})
    wanted.write_parquet(folder / "t-0.parquet")
    assert read_table(folder / "t-0.parquet").equals(wanted)
    assert read_table(folder / "t-0.parquet", ["y"]).equals(wanted.select("y"))
    assert scan_table(folder / "t-0.parquet").collect().equals(wanted)
    with duckdb.connect() as db:
        assert db.sql(f"SELECT * FROM {duckdb_table(folder, 't-*.parquet')}").pl().equals(wanted)
    with plain_path(folder) as plain:
        assert not set("*?[") & set(str(plain)) and read_table(plain / "t-0.parquet").equals(wanted)


@pytest.mark.parametrize("name", ODD)
def test_what_a_pattern_of_a_path_removes_is_that_path(name: str) -> None:
    memory = fsspec.filesystem("memory")
    for folder in (name, "expX1", "exp v", "ab"):
        memory.pipe_file(f"/store/{folder}/x.d/file", b"")
    memory.rm(as_pattern(f"/store/{name}/x.d"), recursive=True)
    assert not memory.exists(f"/store/{name}/x.d/file")
    assert all(memory.exists(f"/store/{folder}/x.d/file") for folder in ("expX1", "exp v", "ab"))
    memory.rm("/store", recursive=True)


def test_tables_one_after_another_are_the_bytes_of_all_at_once(tmp_path: Path) -> None:
    """Content versions are of bytes: row groups have to end where they do when everything is in memory."""
    tables = [pl.DataFrame({"x": range(rows)}).select("x", y=pl.col("x").cast(pl.String)) for rows in (3, 200_000, 9)]
    pl.concat(tables, rechunk=False).write_parquet(tmp_path / "all.parquet")
    write_tables(iter(tables), tables[0].schema, tmp_path / "parts.parquet")
    assert (tmp_path / "parts.parquet").read_bytes() == (tmp_path / "all.parquet").read_bytes()
