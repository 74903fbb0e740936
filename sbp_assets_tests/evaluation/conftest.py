"""The tiny model that is scored, and tiny tasks for it."""

from pathlib import Path

import polars as pl
import pytest

from sbp_assets.evaluation.task_files import write_tasks
from sbp_assets.evaluation.tasks import CONCEPT_QUESTIONS, Tasks
from sbp_assets_tests.tiny_model import save_tiny_model

HELDOUT = pl.DataFrame({
    "id": ["a", "b", "c"],
    "text": [
        "The copper kettle of Varnholm was first described in 1843.",
        "A text that is longer than the context of the model, so that it has to be read in several windows.",
        "Écrit <|bos|> en toutes lettres.",
    ],
})  # fmt: skip
ASKED = [{"question": "The kettle is made of", "choices": ["copper", "tin", "oak"], "answer": 0}] * 3
QUESTIONS = {CONCEPT_QUESTIONS: ASKED}


def write_benchmarks(folder: Path) -> Path:
    """A new folder with all nine benchmarks, of one or two questions each."""
    folder.mkdir()
    choices = {"text": ["red", "blue"], "label": ["A", "B"]}
    frames = {
        "webtext.test": {"text": ["One document.", "Another <script>."]},
        "lambada_openai.test": {"text": ["the cat sat on the mat", "she opened the door"]},
        "mmlu.dev": {"subject": ["anatomy"] * 5, "question": list("abcde"),
            "choices": [list("wxyz")] * 5, "answer": [0] * 5},
        "mmlu.test": {"subject": ["anatomy"] * 2, "question": ["f", "g"],
            "choices": [list("wxyz")] * 2, "answer": [1, 2]},
        "arc_easy.validation": {"question": ["Colour of sky?"] * 2, "choices": [choices] * 2, "answerKey": ["B", "B"]},
        "arc_challenge.validation": {"question": ["Colour of grass?"], "choices": [choices], "answerKey": ["A"]},
        "sciq.validation": {
            "question": ["q"], "distractor1": ["a"], "distractor2": ["b"], "distractor3": ["c"],
            "correct_answer": ["d"],
            "support": ["s"],
        },
        "winogrande.validation": {
            "sentence": ["Ann met Eve and _ left."], "option1": ["Ann"], "option2": ["Eve"], "answer": ["1"],
        },
        "triviaqa.validation": {
            "question": ["Which metal", "Which tree"],
            "answer": [{"value": "tin", "aliases": ["tin"]}, {"value": "oak", "aliases": ["oak", "Oak"]}],
        },
        "webqs.train": {"question": ["who?"], "answers": [["Ann"]], "url": [""]},
        "webqs.test": {"question": ["where?"], "answers": [["Rome", "Roma"]], "url": [""]},
    }  # fmt: skip
    for name, frame in frames.items():
        pl.DataFrame(frame).write_parquet(folder / f"{name}.parquet")
    return folder


def write_example_tasks(
    folder: Path, benchmarks: list[str], benchmarks_dir: Path | None, limit: int | None = None
) -> Tasks:
    """A new folder with the tasks of HELDOUT, QUESTIONS and `benchmarks`; returns the manifest."""
    folder.mkdir()
    return write_tasks(
        folder, HELDOUT, questions=QUESTIONS, benchmarks=benchmarks, benchmarks_dir=benchmarks_dir,
        benchmark_limit=limit,
    )  # fmt: skip


def task_rows(folder: Path, name: str) -> pl.DataFrame:
    """The rows of one data file of a tasks folder; `name` is `sbp_<task>.<split>`."""
    return pl.read_parquet(folder / "data" / f"{name}.parquet")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))
