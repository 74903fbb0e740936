import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sbp_assets.evaluation import suite
from sbp_assets.evaluation.benchmarks import BENCHMARKS
from sbp_assets.evaluation.scores import score_problems, score_table, unscored, with_samples
from sbp_assets.evaluation.task_files import write_tasks
from sbp_assets.evaluation.tasks import CONCEPT_QUESTIONS, REVERSED_QUESTIONS, Tasks
from sbp_assets_tests.evaluation.conftest import ASKED, HELDOUT, QUESTIONS, write_benchmarks


def evaluate(model_dir: Path, work_dir: Path, **settings: Any) -> suite.Scores:
    (work_dir / "tasks").mkdir()
    write_tasks(work_dir / "tasks", HELDOUT, **settings)
    return suite.evaluate(model_dir, work_dir / "tasks", device="cpu")


def values(scores: suite.Scores) -> dict[tuple[str, str], float]:
    return {(task, metric): value for task, metric, value in scores.table.select("task", "metric", "value").iter_rows()}


def test_per_token_perplexity_equals_transformers(model_dir: Path, tmp_path: Path) -> None:
    scores = evaluate(model_dir, tmp_path, questions=QUESTIONS)
    tokenizer, model = AutoTokenizer.from_pretrained(model_dir), AutoModelForCausalLM.from_pretrained(model_dir).eval()
    context = model.config.max_position_embeddings
    loss, tokens, bytes_ = 0.0, 0, 0
    for text in HELDOUT["text"]:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)]
        # First window predicts `context` tokens from <bos>; a later one sees the tokens just before what it predicts.
        predicted = 1
        while predicted < len(ids):
            end = min(predicted + context, len(ids))
            start = max(0, end - 1 - context)
            with torch.no_grad():
                logits = model(torch.tensor([ids[start : end - 1]])).logits[0].log_softmax(-1)
            for position in range(predicted, end):
                loss -= logits[position - 1 - start, ids[position]].item()
            predicted = end
        tokens += len(ids) - 1
        bytes_ += len(text.encode())
    assert tokens == bytes_, "byte-level tokens: a special token's name in a text is not a special token"
    found = values(scores)
    assert found["heldout", "nats_per_token"] == pytest.approx(loss / tokens, abs=1e-4)
    assert found["heldout", "perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    assert found["heldout", "bits_per_byte"] == pytest.approx(loss / bytes_ / math.log(2), abs=1e-4)
    assert found["concept_questions", "acc"] in (0, 1)
    assert scores.table["samples"].to_list() == [3] * 5
    table, made = with_samples(scores.table, scores.samples), Tasks.load(tmp_path / "tasks").tasks
    assert not score_problems(table, made)
    assert "heldout nats_per_token is missing" in score_problems(table.filter(pl.col("task") != "heldout"), made)
    again = suite.evaluate(model_dir, tmp_path / "tasks", device="cpu", batch_size=4)
    torch.testing.assert_close(
        torch.tensor(again.table["stderr"].to_list()),
        torch.tensor(scores.table["stderr"].to_list()),
        rtol=1e-4,
        atol=1e-6,
    )


def test_benchmarks_run_and_unusable_ones_are_named(model_dir: Path, tmp_path: Path) -> None:
    folder = write_benchmarks(tmp_path / "benchmarks")
    (folder / "sciq.validation.parquet").unlink()
    # Found only when lm-eval asks it.
    broken = pl.read_parquet(folder / "arc_easy.validation.parquet").with_columns(answerKey=pl.lit("Z"))
    broken.write_parquet(folder / "arc_easy.validation.parquet")
    names = list(BENCHMARKS)
    scores = evaluate(model_dir, tmp_path, benchmarks=names, benchmarks_dir=folder, benchmark_limit=2)
    assert set(scores.table["task"]) == {"heldout", *names} - {"sciq", "arc_easy"}
    assert len(scores.problems) == 2 and scores.problems[0].startswith("sciq: deployment.benchmarks_dir has no sciq.")
    assert scores.problems[1].startswith("arc_easy: ValueError")
    assert any("webtext.test.parquet" in note for note in scores.notes)
    assert any("cut on the left" in note for note in scores.notes)
    assert dict(scores.table.select("task", "samples").iter_rows())["mmlu"] == 2
    problems = unscored(scores.table, ["heldout", *names])
    assert len(problems) == 2 and all("sciq" in p or "arc_easy" in p for p in problems)
    assert not score_problems(with_samples(scores.table, scores.samples), Tasks.load(tmp_path / "tasks").tasks)
    assert not list((tmp_path / "tasks").rglob("*.pyc")), "an artifact stays as it was written"


def test_cut_prompts_are_counted_once_of_choices_and_of_generation(model_dir: Path, tmp_path: Path) -> None:
    """A context of 64 tokens, bytes here; 32 of them are for what is generated."""
    folder = write_benchmarks(tmp_path / "benchmarks")
    choices = ["copper", "tin", "oak"]
    questions = [{"question": letter * length, "choices": choices, "answer": 0} for letter, length in
                 (("a", 80), ("b", 90), ("c", 20))]  # fmt: skip
    shot = {"question": ["q"], "answer": [{"value": "a", "aliases": ["a"]}]}
    asked = {"question": ["why" * 30, "who"], "answer": shot["answer"] * 2}
    pl.DataFrame(shot).write_parquet(folder / "triviaqa.train.parquet")
    pl.DataFrame(asked).write_parquet(folder / "triviaqa.validation.parquet")
    (tmp_path / "tasks").mkdir()
    write_tasks(
        tmp_path / "tasks",
        HELDOUT,
        questions={CONCEPT_QUESTIONS: questions},
        benchmarks=["triviaqa"],
        benchmarks_dir=folder,
    )
    expected = "4 different prompts were longer than the model's context and were cut on the left"
    for batch_size in (1, 2):
        scores = suite.evaluate(model_dir, tmp_path / "tasks", device="cpu", batch_size=batch_size)
        assert scores.problems == [] and scores.notes == [expected], "two of three questions, and both with their shot"
    model = suite.load_model(model_dir, "cpu", 2, lambda _: None, add_bos_token=True)
    ids, mask = model.tok_batch_encode(["a" * 9, "b" * 10, "c" * 3], left_truncate_len=10)
    assert ids.shape == mask.shape == (3, 10) and model.truncated == 1, "<bos> counts, padding does not"


def test_scores_follow_from_the_samples(model_dir: Path, tmp_path: Path) -> None:
    scores = evaluate(model_dir, tmp_path, questions=QUESTIONS)
    table = score_table(scores.samples)
    assert table.drop("value").equals(scores.table.drop("value"))
    assert table["value"].to_list() == pytest.approx(scores.table["value"].to_list(), rel=1e-12)
    rows = scores.samples.filter(task="heldout", metric="perplexity")
    assert rows["sample"].to_list() == [0, 1, 2]
    assert rows["weight"].to_list() == [len(text.encode()) for text in HELDOUT["text"]], "byte-level tokens"
    mean = (rows["value"] * rows["weight"]).sum() / rows["weight"].sum()
    assert values(scores)["heldout", "perplexity"] == pytest.approx(math.exp(mean))


def test_groups_are_scored_apart_from_the_same_samples(model_dir: Path, tmp_path: Path) -> None:
    asked = [*ASKED, {**ASKED[0], "answer": 1}]
    groups = {"heldout": {"short": (0, 2)}, REVERSED_QUESTIONS: {"first": (0, 3), "last": (2, 3)}}
    clusters = {REVERSED_QUESTIONS: (7, 8, 8, 7)}
    scores = evaluate(model_dir, tmp_path, questions={REVERSED_QUESTIONS: asked}, groups=groups, clusters=clusters)
    found = values(scores)
    assert {task for task, _ in found} == {
        "heldout", "heldout_short", REVERSED_QUESTIONS, "reversed_questions_first", "reversed_questions_last",
    }  # fmt: skip
    assert [metric for task, metric in found if task.startswith("heldout_")] == ["perplexity"]
    # Of two equal questions with different answers one at most is right.
    right = found["reversed_questions_first", "acc"]
    assert right in (0, 0.5) and right == found["reversed_questions_last", "acc"]
    of = scores.samples.filter(task="heldout", metric="perplexity").filter(pl.col("sample").is_in([0, 2]))
    mean = (of["value"] * of["weight"]).sum() / of["weight"].sum()
    assert found["heldout_short", "perplexity"] == pytest.approx(math.exp(mean))
    table, made = with_samples(scores.table, scores.samples), Tasks.load(tmp_path / "tasks").tasks
    assert not score_problems(table, made)
    clustered = dict(table.filter(metric="acc").select("task", "sample_clusters").iter_rows())
    assert clustered[REVERSED_QUESTIONS] == [7, 8, 8, 7] and clustered["reversed_questions_last"] == [8, 7]
    assert table.filter(task="heldout")["sample_clusters"].to_list() == [[0, 1, 2]] * 3
    without = score_problems(table.filter(pl.col("task") != "reversed_questions_last"), made)
    assert without == ["reversed_questions_last acc is missing"]
