from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from sbp_assets.storage.checks import all_partitions
from sbp_assets.storage.io_managers import ParquetIOManager


def test_a_partition_is_opened_when_it_is_asked_for_and_not_before(tmp_path: Path) -> None:
    store, shards = ParquetIOManager(str(tmp_path), cache=str(tmp_path / "cache")), ["0", "1", "2"]
    path = tmp_path / "s" / "table" / "1.parquet"
    tables = all_partitions(store, "s/table", dg.StaticPartitionsDefinition(shards))
    assert list(tables) == shards and len(tables) == 3 and "2" in tables and "3" not in tables
    with pytest.raises(FileNotFoundError, match="s/table"):
        tables["1"]
    path.parent.mkdir(parents=True)
    pl.DataFrame({"x": [1]}).write_parquet(path)
    assert tables["1"].collect()["x"].to_list() == [1]
    with pytest.raises(KeyError):
        tables["3"]
