import math
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sbp_assets.evaluation import suite
from sbp_assets.evaluation.suite import score_problems

HELDOUT = pl.DataFrame({
    "id": ["a", "b", "c"],
    "text": [
        "The copper kettle of Varnholm was first described in 1843.",
        "A text that is longer than the context of the model, so that it has to be read in several windows.",
        "Écrit <|bos|> en toutes lettres.",
    ],
})  # fmt: skip
QUESTIONS = [{"question": "The kettle is made of", "choices": ["copper", "tin", "oak"], "answer": 0}] * 3


def values(scores: suite.Scores) -> dict[tuple[str, str], float]:
    return {(task, metric): value for task, metric, value in scores.table.select("task", "metric", "value").iter_rows()}


def write_benchmarks(folder: Path) -> Path:
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


def test_per_token_perplexity_equals_transformers(model_dir: Path, tmp_path: Path) -> None:
    scores = suite.evaluate(model_dir, tmp_path, HELDOUT, questions=QUESTIONS, device="cpu")
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
    assert not score_problems(scores.table, ["heldout", "concept_questions"])
    again = suite.evaluate(model_dir, tmp_path, HELDOUT, questions=QUESTIONS, device="cpu", batch_size=1)
    torch.testing.assert_close(
        torch.tensor(again.table["stderr"].to_list()),
        torch.tensor(scores.table["stderr"].to_list()),
        rtol=1e-4,
        atol=1e-6,
    )


def test_benchmarks_run_and_bad_ones_are_named(model_dir: Path, tmp_path: Path) -> None:
    folder = write_benchmarks(tmp_path / "benchmarks")
    (folder / "sciq.validation.parquet").unlink()
    pl.read_parquet(folder / "winogrande.validation.parquet").drop("option2").write_parquet(
        folder / "winogrande.validation.parquet"
    )
    names = [name for name in suite.BENCHMARKS if name != "arc_challenge"]
    scores = suite.evaluate(
        model_dir, tmp_path / "work", HELDOUT, benchmarks=names, benchmarks_dir=folder, device="cpu", benchmark_limit=2
    )
    assert set(scores.table["task"]) == {"heldout", *names} - {"sciq", "winogrande"}
    assert any("sciq" in problem and "sciq.validation.parquet" in problem for problem in scores.problems)
    assert any("winogrande.validation.parquet lacks column option2" in problem for problem in scores.problems)
    assert len(scores.problems) == 2
    assert any("webtext.test.parquet" in note for note in scores.notes)
    assert dict(scores.table.select("task", "samples").iter_rows())["mmlu"] == 2
    problems = score_problems(scores.table, ["heldout", *names])
    assert len(problems) == 2 and all("sciq" in p or "winogrande" in p for p in problems)


def test_scores_follow_from_the_samples(model_dir: Path, tmp_path: Path) -> None:
    scores = suite.evaluate(model_dir, tmp_path, HELDOUT, questions=QUESTIONS, device="cpu")
    assert suite.score_table(scores.samples).equals(scores.table)
    rows = scores.samples.filter(task="heldout", metric="perplexity")
    assert rows["sample"].to_list() == [0, 1, 2]
    assert rows["weight"].to_list() == [len(text.encode()) for text in HELDOUT["text"]], "byte-level tokens"
    mean = (rows["value"] * rows["weight"]).sum() / rows["weight"].sum()
    assert values(scores)["heldout", "perplexity"] == pytest.approx(math.exp(mean))


def test_standard_errors_resample_documents() -> None:
    rng = np.random.default_rng(7)
    accuracies, ones = rng.integers(0, 2, 400).astype(float), np.ones(400, dtype=np.int64)
    of_the_mean = accuracies.std(ddof=1) / 20
    assert suite.bootstrap_stderr("acc", accuracies, ones) == pytest.approx(of_the_mean, rel=0.1)
    assert suite.bootstrap_stderr("acc", accuracies, ones) == suite.bootstrap_stderr("acc", accuracies, ones)
    losses = rng.normal(3, 0.2, 400)
    perplexity = suite.bootstrap_stderr("perplexity", losses, ones)
    assert perplexity == pytest.approx(math.exp(3) * losses.std(ddof=1) / 20, rel=0.15), "delta method"
    assert suite.bootstrap_stderr("acc", accuracies[:1], ones[:1]) is None


def test_heldout_sample_does_not_depend_on_sharding() -> None:
    documents = pl.DataFrame({
        "id": [f"d{i}" for i in range(40)], "text": [f"text {i}" for i in range(40)],
        "split": ["heldout", "unique"] * 20,
    })  # fmt: skip
    one = suite.sample_heldout({"00000": documents.lazy()}, 7)
    two = suite.sample_heldout({"00000": documents[25:].lazy(), "00001": documents[:25].lazy()}, 7)
    assert one.equals(two) and len(one) == 7
    assert set(one["id"]) <= set(documents.filter(pl.col("split") == "heldout")["id"])
    assert len(suite.sample_heldout({"0": documents.lazy()}, 99)) == 20


def test_no_heldout_documents_is_an_error(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"corpus\.split\.heldout"):
        suite.evaluate(model_dir, tmp_path, HELDOUT.clear())


@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"value": math.nan}, "finite"), ({"value": 1.5}, r"\[0, 1\]"), ({"task": "other"}, "acc_task")],
)
def test_score_problems_go_red(changed: dict[str, object], reason: str) -> None:
    row = {"task": "acc_task", "metric": "acc", "value": 0.5, "stderr": 0.1, "samples": 3, "higher_is_better": True}
    table = pl.DataFrame([row], schema=suite.SCORES_SCHEMA)
    assert not score_problems(table, ["acc_task"])
    problems = score_problems(pl.DataFrame([{**row, **changed}], schema=suite.SCORES_SCHEMA), ["acc_task"])
    assert problems and re.search(reason, " ".join(problems))
