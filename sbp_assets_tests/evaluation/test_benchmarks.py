"""Rows of the stock benchmarks, from local files and from the hub."""

import shutil
from pathlib import Path

import polars as pl
import pytest

from sbp_assets.evaluation.benchmarks import BENCHMARKS, BenchmarkDataError, data_version, local_files
from sbp_assets_tests.evaluation.conftest import task_rows, write_benchmarks, write_example_tasks


def test_other_benchmark_data_are_another_version(tmp_path: Path) -> None:
    folder = write_benchmarks(tmp_path / "benchmarks")
    before = data_version(["sciq", "webqs"], folder)
    assert before == data_version(["webqs", "sciq"], shutil.copytree(folder, tmp_path / "elsewhere"))
    (folder / "arc_easy.validation.parquet").unlink()
    assert before == data_version(["sciq", "webqs"], folder), "nobody asked for it"
    path = folder / "webqs.train.parquet"
    pl.read_parquet(path).with_columns(question=pl.lit("why?")).write_parquet(path)
    changed = data_version(["sciq", "webqs"], folder)
    path.unlink()
    (folder / "sciq.validation.parquet").unlink()
    versions = [before, changed, data_version(["sciq", "webqs"], folder), data_version(["webqs"], folder)]
    assert len(set(versions)) == 4 and "hub" not in versions
    for benchmarks, directory in (([], folder), (["sciq"], None), (["sciq"], tmp_path / "none")):
        assert data_version(benchmarks, directory) == "hub"


def test_hub_rows_are_those_of_the_stock_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A folder of Parquet files is a data set to `datasets`, as a repository on the hub is.
    hub = tmp_path / "stanfordnlp/web_questions"
    hub.mkdir(parents=True)
    for split, who in (("train", ["Ann", "Eve"]), ("test", ["Rome"])):
        frame = pl.DataFrame({"question": ["who?"] * len(who), "answers": [[name] for name in who]})
        frame.write_parquet(hub / f"{split}.parquet")
    monkeypatch.chdir(tmp_path)
    made = write_example_tasks(tmp_path / "tasks", ["webqs", "sciq"], None)
    assert [task.documents for task in made.tasks if task.name == "webqs"] == [1]
    assert task_rows(tmp_path / "tasks", "sbp_webqs.shots")["answers"].to_list() == [["Ann"], ["Eve"]]
    assert len(made.problems) == 1 and made.problems[0].startswith("sciq: "), "named, and the others are made"


def test_a_benchmark_without_a_local_copy_is_an_error_that_names_the_files(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkDataError, match=r"openwebtext2\.validation\.parquet or .*webtext\.test\.parquet"):
        local_files(BENCHMARKS["openwebtext2"], tmp_path)
