"""Data that are not those of the tasks are found."""

from pathlib import Path

import polars as pl

from sbp_assets.evaluation.audit import data_problems
from sbp_assets_tests.evaluation.conftest import HELDOUT, QUESTIONS, task_rows, write_benchmarks, write_example_tasks


def test_data_that_are_not_those_of_the_tasks_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    write_example_tasks(folder, ["arc_easy"], write_benchmarks(tmp_path / "benchmarks"))
    splits = pl.Series(["heldout", "heldout", "heldout", "unique"])
    corpus = pl.concat([HELDOUT, HELDOUT[:1].with_columns(id=pl.lit("other"))]).with_columns(split=splits)
    documents = {"0": corpus[:2].lazy(), "1": corpus[2:].lazy()}
    correct = {name: task_rows(folder, f"sbp_{name}.test") for name in ("heldout", "concept_questions", "arc_easy")}

    def problems(name: str, table: pl.DataFrame) -> list[str]:
        table.write_parquet(folder / "data" / f"sbp_{name}.test.parquet")
        found = data_problems(folder, documents, QUESTIONS)
        correct[name].write_parquet(folder / "data" / f"sbp_{name}.test.parquet")
        return found

    assert problems("heldout", correct["heldout"]) == []
    assert problems("heldout", correct["heldout"][1:]) == ["heldout: 2 rows of 3"]
    leaked = correct["heldout"].with_columns(id=pl.lit("other"))
    assert problems("heldout", leaked) == ["other: no held-out document of this text"] * 3
    swapped = correct["heldout"].with_columns(text=pl.col("text").reverse())
    assert len(problems("heldout", swapped)) == 2
    assert "questions" in problems("concept_questions", correct["concept_questions"].with_columns(answer=pl.lit(2)))[0]
    assert problems("arc_easy", correct["arc_easy"].clear()) == [f"arc_easy: 0 rows of {len(correct['arc_easy'])}"]
    (folder / "data/sbp_heldout.test.parquet").write_bytes(b"cut")
    assert "cannot be read" in data_problems(folder, documents, QUESTIONS)[0]
