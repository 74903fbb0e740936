"""The tasks folder: what is written into it, and that it works wherever it lies."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import polars as pl
import pytest
import yaml

from sbp_assets.dagster_support.preview import escape
from sbp_assets.evaluation import local_data
from sbp_assets.evaluation.benchmarks import BENCHMARKS, stock_tasks
from sbp_assets.evaluation.task_files import sample_heldout, write_tasks
from sbp_assets.evaluation.tasks import Tasks
from sbp_assets.storage.artifacts import content_version
from sbp_assets_tests.evaluation.conftest import HELDOUT, task_rows, write_benchmarks, write_example_tasks


def test_task_files_name_no_machine(tmp_path: Path) -> None:
    benchmarks = write_benchmarks(tmp_path / "benchmarks")
    made = write_example_tasks(tmp_path / "here", list(BENCHMARKS), benchmarks)
    assert not made.problems and Tasks.load(tmp_path / "here") == made
    for file in (tmp_path / "here").glob("*.*"):
        text = file.read_text()
        assert str(tmp_path) not in text and str(stock_tasks()) not in text, file.name
    again = write_example_tasks(tmp_path / "there", list(BENCHMARKS), shutil.copytree(benchmarks, tmp_path / "copy"))
    assert again == made
    for file in (path for path in (tmp_path / "here").rglob("*") if path.is_file()):
        assert file.read_bytes() == (tmp_path / "there" / file.relative_to(tmp_path / "here")).read_bytes()
    assert all(task.lm_eval in (tmp_path / "here/README.md").read_text() for task in made.tasks)


# Stands in for the program lm_eval: it imports what is in the tasks folder and writes results, as lm_eval does.
LM_EVAL = """#!{python}
import pathlib, sys
value = dict(zip(sys.argv, sys.argv[1:]))
sys.path.insert(0, value["--include_path"])
import local_data
results = pathlib.Path(value["--output_path"])
results.mkdir(exist_ok=True)
(results / value["--tasks"]).write_text(value["--model_args"])
"""


def test_the_readmes_commands_leave_the_folder_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    made = write_example_tasks(folder, ["sciq"], write_benchmarks(tmp_path / "benchmarks"))
    before = content_version(folder)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/lm_eval"
    program.write_text(LM_EVAL.format(python=sys.executable))
    program.chmod(0o755)
    script = (folder / "README.md").read_text().split("```sh\n")[1].split("```")[0]
    script = script.replace("/path/for/results", str(tmp_path / "results"))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    subprocess.run(["sh", "-e", "-c", script], cwd=folder, env=environment, check=True)
    assert {path.name for path in (tmp_path / "results").iterdir()} == {task.lm_eval for task in made.tasks}
    assert content_version(folder) == before


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("sciq.validation", None, "sciq: deployment.benchmarks_dir has no sciq.validation.parquet"),
        ("winogrande.validation", lambda f: f.drop("option2"), "winogrande.validation.parquet lacks column option2"),
        ("arc_easy.validation", lambda f: f.clear(), "arc_easy.validation.parquet has no rows"),
        ("webqs.train", lambda f: f.clear(), "webqs.train.parquet has no rows"),
        ("lambada_openai.test", b"", "lambada_openai.test.parquet cannot be read as Parquet"),
        ("mmlu.dev", None, "mmlu: five-shot MMLU needs mmlu.dev.parquet"),
        ("mmlu.dev", lambda f: f[:3], "fewer than 5 dev rows of subject anatomy"),
        ("mmlu.test", lambda f: f.with_columns(subject=pl.lit("alchemy")), "subject alchemy is not one of MMLU's"),
    ],
)  # fmt: skip
def test_unusable_benchmarks_are_named_and_the_others_written(tmp_path: Path, file: str, change, said: str) -> None:
    path = write_benchmarks(tmp_path / "benchmarks") / f"{file}.parquet"
    if change is None:
        path.unlink()
    elif isinstance(change, bytes):
        path.write_bytes(change)
    else:
        change(pl.read_parquet(path)).write_parquet(path)
    made = write_example_tasks(tmp_path / "tasks", list(BENCHMARKS), path.parent)
    (problem,) = made.problems
    assert said in problem
    bad = problem.split(":")[0]
    assert {task.name for task in made.tasks} == {"heldout", "concept_questions", *BENCHMARKS} - {bad}
    assert made.missing(["heldout", *BENCHMARKS]) == [problem], "the check on this asset fails and names it"
    assert escape(problem, 1000) in (tmp_path / "tasks/README.md").read_text()


def test_limit_is_in_the_data_and_no_asked_row_is_shown(tmp_path: Path) -> None:
    benchmarks = write_benchmarks(tmp_path / "benchmarks")
    write_example_tasks(tmp_path / "all", ["triviaqa"], benchmarks)
    assert len(task_rows(tmp_path / "all", "sbp_triviaqa.test")) == 2
    # lm-eval leaves the asked row out of the shots only where both come from one split.
    assert yaml.safe_load((tmp_path / "all/sbp_triviaqa.yaml").read_text().replace("!function", ""))[
        "fewshot_split"
    ] == "test"  # fmt: skip
    made = write_example_tasks(tmp_path / "one", ["triviaqa", "mmlu", "openwebtext2"], benchmarks, limit=1)
    assert {task.name: task.documents for task in made.tasks if task.name in BENCHMARKS} == {
        "triviaqa": 1, "mmlu": 1, "openwebtext2": 1,
    }  # fmt: skip
    asked, shown = (task_rows(tmp_path / "one", f"sbp_triviaqa.{split}")["question"] for split in ("test", "shots"))
    assert not set(asked) & set(shown) and len(shown) == 1
    assert made.notes == ("openwebtext2: scored on webtext.test.parquet, which stands in for it",)


def test_data_is_found_wherever_the_folder_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_example_tasks(tmp_path / "tasks", ["mmlu"], write_benchmarks(tmp_path / "benchmarks"))
    (tmp_path / "tasks").rename(tmp_path / "moved")
    monkeypatch.setattr(local_data, "__file__", str(tmp_path / "moved/local_data.py"))
    loaded = local_data.load("sbp_mmlu", subject="anatomy", pretrained="ignored")
    assert isinstance(loaded, datasets.DatasetDict) and (len(loaded["test"]), len(loaded["shots"])) == (2, 5)


def test_heldout_sample_does_not_depend_on_sharding() -> None:
    documents = pl.DataFrame({
        "id": [f"d{i}" for i in range(40)], "text": [f"text {i}" for i in range(40)],
        "split": ["heldout", "unique"] * 20,
    })  # fmt: skip
    one = sample_heldout({"00000": documents.lazy()}, 7)
    two = sample_heldout({"00000": documents[25:].lazy(), "00001": documents[:25].lazy()}, 7)
    assert one.equals(two) and len(one) == 7
    assert set(one["id"]) <= set(documents.filter(pl.col("split") == "heldout")["id"])
    assert len(sample_heldout({"0": documents.lazy()}, 99)) == 20


def test_nothing_to_score_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"corpus\.split\.heldout"):
        write_tasks(tmp_path, HELDOUT.clear())
    with pytest.raises(FileNotFoundError, match="materialise evaluation/tasks"):
        Tasks.load(tmp_path / "none")
