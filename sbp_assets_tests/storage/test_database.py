from pathlib import Path

import polars as pl
import pytest

from sbp_assets.storage.database import batches, create_view, database, scalar

SMALL = "64MB"
NUMBERS = "SELECT range AS number FROM range($1) ORDER BY hash(range)"


@pytest.mark.parametrize("in_file", [False, True])
def test_batches_are_the_rows_of_the_query_in_order_a_few_at_a_time(tmp_path: Path, in_file: bool) -> None:
    file = tmp_path / "it's a result.parquet" if in_file else None
    with database(tmp_path, SMALL) as db:
        found = list(batches(db, NUMBERS, 1000, [10_000], file))
        expected = db.execute(NUMBERS, [10_000]).pl()
    assert pl.concat(found).equals(expected)
    assert max(map(len, found)) <= 1000


@pytest.mark.parametrize("in_file", [False, True])
def test_other_queries_may_be_made_between_batches(tmp_path: Path, in_file: bool) -> None:
    file = tmp_path / "result.parquet" if in_file else None
    with database(tmp_path, SMALL) as db:
        sums = [
            scalar(db, f"SELECT {batch['number'].sum()} + 1") - 1 for batch in batches(db, NUMBERS, 100, [1000], file)
        ]
    assert len(sums) >= 10 and sum(sums) == 499_500


def test_a_view_has_the_shard_of_each_row(tmp_path: Path) -> None:
    files = {"00000": tmp_path / "first.parquet", "00001": tmp_path / "the second's [1].parquet"}
    for number, file in enumerate(files.values()):
        pl.DataFrame({"id": [f"{number}-{row}" for row in range(number + 2)]}).write_parquet(file)
    with database(tmp_path, SMALL) as db:
        create_view(db, "documents", files)
        found = db.execute("SELECT id, shard FROM documents ORDER BY id").fetchall()
    assert found == [("0-0", "00000"), ("0-1", "00000"), ("1-0", "00001"), ("1-1", "00001"), ("1-2", "00001")]
