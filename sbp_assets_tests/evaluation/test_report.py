import math

import polars as pl
import pytest

from sbp_assets.evaluation import report, report_data
from sbp_assets.evaluation.comparison import compare, with_samples
from sbp_assets.evaluation.suite import SAMPLES_SCHEMA, score_table
from sbp_assets_tests.evaluation.example_report import report_inputs

ATTACK = (
    """</pre><script>alert(1)</script><img src=x onerror="alert(1)"> {{ 7 * 7 }} <style>@import 'http://evil'</style>"""
)


def test_page_is_complete_and_self_contained() -> None:
    inputs = report_inputs()
    assert len(inputs["pairs"]) == 3 and len(inputs["syntheses"].texts) == 2
    page = report.render(**inputs)
    assert report.page_problems(page) == []
    assert "recovering" in page and "5.74" in page and inputs["pairs"][0].d1 in page
    for text in (inputs["syntheses"].seed_text, *(text for _, text in inputs["syntheses"].texts)):
        assert text[:30] in page


def test_corpus_text_cannot_become_markup() -> None:
    page = report.render(**report_inputs(ATTACK))
    assert report.page_problems(page) == []
    assert "<script" not in page and "<img" not in page
    assert "&lt;script&gt;" in page and "{{ 7 * 7 }}" in page


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("<p class=\"eyebrow\">", "<script>1</script><p>", "<script>"),
        ("<p class=\"eyebrow\">", '<p onclick="x()">', "event handler"),
        ("<p class=\"eyebrow\">", '<img src="https://example.org/a.png"><p>', "loads https"),
        ("--paper: #ffffff", "background: url(https://example.org)", "a style loads"),
        ('<section id="pairs">', "<section>", "'pairs' is missing"),
    ],
)  # fmt: skip
def test_check_goes_red(old: str, new: str, problem: str) -> None:
    page = report.render(**report_inputs())
    assert old in page
    assert any(problem in found for found in report.page_problems(page.replace(old, new, 1)))


def test_page_of_an_empty_experiment_still_stands() -> None:
    inputs = report_inputs()
    for name in ("comparison", "dynamics", "token_budget", "quality", "similarities"):
        inputs[name] = inputs[name].clear()
    page = report.render(**{**inputs, "pairs": [], "syntheses": None})
    assert "nothing can be said yet" in page and "No pairs were kept" in page and "No complete synthetic" in page


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((4.0, 3.5, 3.0), "beat the compute-matched baseline"),
        ((4.0, 3.5, 3.0), "50%"),
        ((4.0, 4.5, 3.0), "did not help"),
        ((4.0, 4.0, 3.0), "same held-out perplexity"),
        ((4.0, 3.5, 4.1), "no gain to recover"),
    ],
)
def test_verdict_is_honest(values: tuple[float, float, float], said: str) -> None:
    assert said in report.verdict(_comparison([values]))


def test_verdict_over_seeds_knows_its_error() -> None:
    noisy = _comparison([(4.0, 3.9, 3.0), (4.0, 4.2, 3.0), (4.0, 3.8, 3.0)])
    assert "cannot be told apart" in report.verdict(noisy)


def _comparison(values: list[tuple[float, float, float]]) -> pl.DataFrame:
    def scores(value: float) -> pl.DataFrame:
        rows = [("heldout", "perplexity", n, math.log(value), 1) for n in range(10)]
        samples = pl.DataFrame(rows, schema=SAMPLES_SCHEMA, orient="row")
        return with_samples(score_table(samples), samples)

    places = {"baseline": 0, "early_stopped": 0, "sbp": 1, "oracle": 2}
    return compare({
        name: {str(seed): scores(triple[place]) for seed, triple in enumerate(values)} for name, place in places.items()
    })  # fmt: skip


def test_settings_name_data_not_machines() -> None:
    shown = report.public(
        {"path": "/home/someone/corpus.jsonl", "hub": "s3://key:secret@bucket/data", "model": "Qwen/Qwen3"}
    )
    assert shown == {"path": "…/corpus.jsonl", "hub": "…/data", "model": "Qwen/Qwen3"}


def test_histogram_counts_every_pair_once() -> None:
    similarities = [0.70, 0.71, 0.72, 0.80, 0.999]
    counts = report_data.similarity_counts({"0": pl.LazyFrame({"similarity": similarities})})
    assert counts["count"].sum() == 5
    assert counts.filter(pl.col("count") > 0)["low"].to_list() == pytest.approx([0.70, 0.72, 0.80, 0.98])
    assert report_data.similarity_counts({"0": pl.LazyFrame(schema={"similarity": pl.Float64})}).is_empty()
