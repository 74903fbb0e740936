import math
import re
from typing import Any

import polars as pl
import pytest

from sbp_assets.evaluation.comparison import compare, with_samples
from sbp_assets.evaluation.suite import SAMPLES_SCHEMA
from sbp_assets.report import page as report
from sbp_assets.report import samples as report_data
from sbp_assets.settings import FiveTokensSource
from sbp_assets_tests.report.example_report import SETTINGS, report_inputs

ATTACK = (
    """</pre><script>alert(1)</script><img src=x onerror="alert(1)"> {{ 7 * 7 }} <style>@import 'http://evil'</style>"""
)


def test_page_is_complete_and_self_contained() -> None:
    inputs = report_inputs()
    assert len(inputs["pairs"]) == 3 and len(inputs["syntheses"].texts) == 2
    page = report.render(**inputs)
    assert report.page_problems(page) == []
    assert "5.74" in page and inputs["pairs"][0].d1 in page
    assert "1.26 M parameters" in page and "with 3 seeds" in page and "no judge configured" in page
    for text in (inputs["syntheses"].seed_text, *(text for _, text in inputs["syntheses"].texts)):
        assert text[:30] in page


def test_text_of_others_cannot_become_markup() -> None:
    page = report.render(**report_inputs(ATTACK))
    assert report.page_problems(page) == []
    assert "<script" not in page and "<img" not in page
    for name in ("found", "quality", "bayes", "pairs", "samples", "cost"):
        assert "&lt;script&gt;" in section(page, name) and "{{ 7 * 7 }}" in section(page, name), name


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("<p class=\"eyebrow\">", "<script>1</script><p>", "<script>"),
        ("<p class=\"eyebrow\">", '<p onclick="x()">', "event handler"),
        ("<p class=\"eyebrow\">", '<img src="https://example.org/a.png"><p>', "loads https"),
        ("--paper: #ffffff", "background: url(https://example.org)", "a style loads"),
        ('<section id="bayes">', "<section>", "'bayes' is missing"),
    ],
)  # fmt: skip
def test_check_goes_red(old: str, new: str, problem: str) -> None:
    page = report.render(**report_inputs())
    assert old in page
    assert any(problem in found for found in report.page_problems(page.replace(old, new, 1)))


def test_page_of_an_empty_experiment_still_stands() -> None:
    inputs = report_inputs()
    for name, value in inputs.items():
        if isinstance(value, pl.DataFrame):
            inputs[name] = value.clear()
    page = report.render(**{**inputs, "pairs": [], "syntheses": None})
    assert report.page_problems(page) == []
    assert "nothing can be said yet" in page and "No pairs were kept" in page and "No complete synthetic" in page
    assert "no precision and recall" in page and "nothing to hold the syntheses against" in page
    assert "were not looked for" in page


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((4.0, 3.5, 3.0), "SBP beat the compute-matched baseline: a perplexity of 3.500 against 4.000"),
        ((4.0, 3.5, 3.0), "50% of what the oracle gained"),
        ((4.0, 4.5, 3.0), "SBP did worse than the compute-matched baseline"),
        ((4.0, 4.0, 3.0), "reached the same held-out perplexity"),
        ((4.0, 3.5, 4.1), "no gain to recover"),
    ],
)
def test_verdict_is_honest(values: tuple[float, float, float], said: str) -> None:
    assert said in report.verdict(_comparison([values]))[0]


def test_verdict_is_given_against_both_baselines() -> None:
    final, early = report.verdict(_comparison([(4.0, 3.6, 3.0)], early_stopped=3.4))
    assert "SBP beat the compute-matched" in final
    assert "SBP did worse than the baseline as early stopping would leave it" in early


def test_verdict_with_zero_in_its_interval_decides_nothing() -> None:
    (noisy, _) = report.verdict(_comparison([(4.0, 3.9, 3.0), (4.0, 4.2, 3.0), (4.0, 3.8, 3.0)]))
    assert "cannot be told apart" in noisy and "95% interval −" in noisy


def test_caveats_name_the_tasks_that_sbp_wins_and_loses() -> None:
    table = report_inputs()["comparison"]
    intervals = {
        "concept_questions": (0.1, 0.3), "arc_easy": (-0.3, -0.1), "winogrande": (-0.1, 0.1), "heldout": (-1.0, -0.8),
    }  # fmt: skip
    rows = [
        {**row, "delta_sbp": (low + high) / 2, "delta_sbp_low": low, "delta_sbp_high": high}
        for row in table.filter(against="final").iter_rows(named=True)
        for low, high in [intervals[row["task"]]]
    ]
    final, seeds = report.caveats(pl.DataFrame(rows, schema=table.schema))
    assert "ahead of the final baseline on 1 (Concept questions), behind on 1 (ARC-Easy)" in final
    assert "told apart from it on 1 (Winogrande)" in final
    assert "3 training seeds" in seeds
    assert "One training seed" in report.caveats(_comparison([(4.0, 3.9, 3.0)]))[-1]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({}, []),
        ({"synthesis": {"condition": "none"}, "synthesizer": {"start": "scratch"}}, ["placebo: unconditional"]),
        (
            {"synthesizer": {"partners": "random", "start": "scratch"}},
            ["placebo: random partners", "ablation: synthesizer from random weights"],
        ),
        ({"corpus": {"source": FiveTokensSource(documents=9)}}, ["negative control: five-token world"]),
    ],
)
def test_title_says_what_is_no_plain_sbp(changed: dict[str, dict[str, Any]], named: list[str]) -> None:
    inputs = report_inputs()
    sections = {key: getattr(SETTINGS, key).model_copy(update=values) for key, values in changed.items()}
    page = report.render(**{**inputs, "experiment": SETTINGS.model_copy(update=sections)})
    title = page[page.index("<title>") : page.index("</title>")]
    heading = page[page.index("<h1>") : page.index("</h1>")]
    assert title.split(" · ")[1:] == named and re.findall("<span>(.*?)</span>", heading) == named


def test_parameters_are_those_of_the_model_that_was_trained() -> None:
    for tied in (True, False):
        model = SETTINGS.model.model_copy(update={"tie_embeddings": tied})
        flops = 20_000 * model.flops_per_token(997)
        budget = pl.DataFrame({"arm": ["baseline"], "flops": [flops], "tokens_read": [20_000]})
        experiment = SETTINGS.model_copy(update={"model": model})
        assert report.parameters(experiment, budget) == model.parameters(997)


def test_quality_that_nobody_judged_is_no_zero() -> None:
    quality = report_inputs()["quality"].filter(method="judge")
    page = section(report.render(**{**report_inputs(), "quality": quality}), "quality")
    assert page.count("no judge configured") == 2 and "0.0%" not in page and "15.1%" in page


def test_leak_of_what_nobody_can_know_is_said() -> None:
    inputs = report_inputs()
    unknown = pl.col("group") == "other_unknown"
    leaky = inputs["posterior"].with_columns(p_above_chance=pl.when(unknown).then(0.0001).otherwise("p_above_chance"))
    assert "text outside D has reached" in section(report.render(**{**inputs, "posterior": leaky}), "bayes")
    assert "nothing suggests" in section(report.render(**inputs), "bayes")


def test_average_of_the_qa_tasks_needs_all_six() -> None:
    row = report_inputs()["comparison"].filter(task="arc_easy", against="final")
    table = pl.concat([
        row.with_columns(task=pl.lit(task), baseline=0.1 * n, delta_sbp=0.1, delta_oracle=0.2)
        for n, task in enumerate(report.QA)
    ])  # fmt: skip
    average = report.with_average(table).filter(task="Average QA").row(0, named=True)
    assert average["baseline"] == pytest.approx(0.25) and average["share_of_oracle_gain"] == pytest.approx(0.5)
    assert report.with_average(table[1:]).equals(table[1:])


def test_contamination_tells_leaks_from_the_facts_that_are_asked_for() -> None:
    columns = ["evaluation_set", "corpus", "words", "judged", "contained"]
    rows = [("sciq", "unique", 13, 900, 0), ("sciq", "synthetic", 13, 900, 2)]
    asked = ("concept_questions", "unique", 13, 300, 40)
    leaked, task = report.contamination_found(pl.DataFrame([*rows, asked], schema=columns, orient="row"))
    assert "SciQ 2 of 900 in the syntheses" in leaked and "300" not in leaked
    assert "Concept questions 40 of 300 in D" in task and "no leak" in task
    (clean,) = report.contamination_found(pl.DataFrame(rows[:1], schema=columns, orient="row"))
    assert "Of 900 evaluation items" in clean and "none" in clean


def section(page: str, name: str) -> str:
    start = page.index(f'<section id="{name}">')
    return page[start : page.index("</section>", start)]


def _comparison(values: list[tuple[float, float, float]], early_stopped: float | None = None) -> pl.DataFrame:
    """Of (baseline, SBP, oracle) per seed; the early-stopped baseline is the baseline unless given."""

    def scores(value: float) -> pl.DataFrame:
        rows = [("heldout", "perplexity", n, math.log(value), 1) for n in range(10)]
        samples = pl.DataFrame(rows, schema=SAMPLES_SCHEMA, orient="row")
        table = {"task": "heldout", "metric": "perplexity", "value": value, "stderr": 0.0, "samples": 10}
        return with_samples(pl.DataFrame({**table, "higher_is_better": False}), samples)

    return compare({
        name: {str(seed): scores(early_stopped if place is None and early_stopped else triple[place or 0])
               for seed, triple in enumerate(values)}
        for name, place in {"baseline": 0, "early_stopped": None, "sbp": 1, "oracle": 2}.items()
    }, resamples=200)  # fmt: skip


def test_settings_name_data_not_machines() -> None:
    shown = report.public(
        {
            "path": "/home/someone/corpus.jsonl", "hub": "s3://bucket/data", "model": "Qwen/Qwen3",
            "host": "http://judge.internal:8000", "query": "https://host/v1/a.jsonl?token=secret",
        }
    )  # fmt: skip
    assert shown == {
        "path": "…/corpus.jsonl", "hub": "…/data", "model": "Qwen/Qwen3", "host": "…/", "query": "…/a.jsonl"
    }  # fmt: skip


def test_histogram_counts_every_pair_once() -> None:
    similarities = [0.70, 0.71, 0.72, 0.80, 0.999]
    counts = report_data.similarity_counts({"0": pl.LazyFrame({"similarity": similarities})})
    assert counts["count"].sum() == 5
    assert counts.filter(pl.col("count") > 0)["low"].to_list() == pytest.approx([0.70, 0.72, 0.80, 0.98])
    assert report_data.similarity_counts({"0": pl.LazyFrame(schema={"similarity": pl.Float64})}).is_empty()


def test_caveats_count_a_task_by_its_accuracy() -> None:
    table = report_inputs()["comparison"]
    questions = table.filter(task="concept_questions", against="final")
    # The perplexity says ahead, the accuracy says behind.
    flipped = questions.with_columns(
        [pl.when(metric="acc").then(-pl.col(name)).otherwise(name).alias(name) for name in ("delta_sbp",)]
        + [
            pl.when(metric="acc")
            .then(-pl.col(f"delta_sbp_{other}"))
            .otherwise(f"delta_sbp_{end}")
            .alias(f"delta_sbp_{end}")
            for end, other in (("low", "high"), ("high", "low"))
        ]
    ).sort("metric", descending=True)
    assert flipped["metric"].to_list() == ["perplexity", "acc"]
    assert "behind on 1 (Concept questions)" in report.caveats(flipped)[0]
