"""Our scores are those of the lm_eval command line, run as its users run it: to the last digit."""

from pathlib import Path

import pytest

from benchmarks import lm_eval_equality
from benchmarks.lm_eval_equality import compare
from sbp_assets.evaluation.benchmarks import BENCHMARKS
from sbp_assets.evaluation.task_files import write_tasks
from sbp_assets_tests.evaluation.conftest import HELDOUT, QUESTIONS, write_benchmarks

pytestmark = pytest.mark.processes

SHARED = Path(__file__).parents[2] / "../shared/data/benchmarks"


def test_every_score_equals_the_command_lines(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    benchmarks = write_benchmarks(tmp_path / "benchmarks")
    made = write_tasks(
        tmp_path / "tasks", HELDOUT, questions=QUESTIONS, benchmarks=list(BENCHMARKS), benchmarks_dir=benchmarks
    )
    found = compare(model_dir, tmp_path / "tasks")
    assert found["different"] == [] and found["not_scored"] == []
    assert found["compared"] == sum(len(task.metrics) for task in made.tasks) == 21
    assert all(pair["lm_eval"] is not None for pair in found["scores"].values())


@pytest.mark.parametrize(
    ("different", "not_scored", "status"),
    [([], [], 0), (["sciq acc"], [], 1), ([], ["sciq: deployment.benchmarks_dir has no sciq.test.parquet"], 1)],
)
def test_a_score_that_differs_or_is_not_there_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, different: list[str], not_scored: list[str], status: int
) -> None:
    found = {"different": different, "not_scored": not_scored}
    monkeypatch.setattr(lm_eval_equality, "compare", lambda *_, **__: found)
    monkeypatch.setattr("sys.argv", ["lm_eval_equality", "--model", "m", "--tasks", "t"])
    assert lm_eval_equality.main() == status


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmarks' own files are not beside this checkout")
def test_the_nine_benchmarks_are_made_from_their_own_files(tmp_path: Path) -> None:
    made = write_tasks(tmp_path, HELDOUT, benchmarks=list(BENCHMARKS), benchmarks_dir=SHARED, benchmark_limit=3)
    assert not made.problems
    # MMLU gives one question of each of its 57 subjects.
    assert {task.name: task.documents for task in made.tasks} == {"heldout": 3, **dict.fromkeys(BENCHMARKS, 3)} | {
        "mmlu": 57
    }
