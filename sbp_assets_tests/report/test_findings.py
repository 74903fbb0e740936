"""The sentences about the results say what the figures say, also where SBP loses."""

import math

import polars as pl
import pytest

from sbp_assets.evaluation.comparison import compare
from sbp_assets.evaluation.comparison_table import display_rows
from sbp_assets.evaluation.scores import SAMPLES_SCHEMA, with_samples
from sbp_assets.report import findings
from sbp_assets.settings import load_settings
from sbp_assets_tests.report.example_report import report_inputs


def comparison_of(values: list[tuple[float, float, float]], early_stopped: float | None = None) -> pl.DataFrame:
    """A comparison of held-out perplexities, (baseline, SBP, oracle) per seed.

    The early-stopped baseline scores `early_stopped`, or where that is None what the baseline scores.
    """

    def scores(value: float) -> pl.DataFrame:
        rows = [("heldout", "perplexity", n, math.log(value), 1, n) for n in range(10)]
        samples = pl.DataFrame(rows, schema=SAMPLES_SCHEMA, orient="row")
        table = {"task": "heldout", "metric": "perplexity", "value": value, "stderr": 0.0, "samples": 10}
        return with_samples(pl.DataFrame({**table, "higher_is_better": False}), samples)

    return compare({
        name: {str(seed): scores(early_stopped if place is None and early_stopped else triple[place or 0])
               for seed, triple in enumerate(values)}
        for name, place in {"baseline": 0, "early_stopped": None, "sbp": 1, "oracle": 2}.items()
    }, resamples=200)  # fmt: skip


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
def test_verdict_says_whether_sbp_won_lost_or_tied(values: tuple[float, float, float], said: str) -> None:
    assert said in findings.verdict(comparison_of([values]))[0]


def test_verdict_is_given_against_both_baselines() -> None:
    final, early = findings.verdict(comparison_of([(4.0, 3.6, 3.0)], early_stopped=3.4))
    assert "SBP beat the compute-matched" in final
    assert "SBP did worse than the baseline as early stopping would leave it" in early


def test_verdict_with_zero_in_its_interval_decides_nothing() -> None:
    (noisy, _) = findings.verdict(comparison_of([(4.0, 3.9, 3.0), (4.0, 4.2, 3.0), (4.0, 3.8, 3.0)]))
    assert "cannot be told apart" in noisy and "95% interval −" in noisy


def test_a_run_that_is_no_control_says_which_controls_there_are() -> None:
    plain = load_settings("tiny", {}).experiment
    placebo = load_settings("tiny", {"SBP_EXPERIMENT__SYNTHESIZER__PARTNERS": "random"}).experiment
    (said,) = findings.controls(plain)
    assert "synthesis.condition=none" in said and "synthesizer.partners=random" in said
    assert findings.controls(placebo) == []


def test_questions_the_other_way_round_are_told_of_concepts_in_one_view_alone() -> None:
    held_out = comparison_of([(4.0, 3.6, 3.0)])
    assert findings.other_way_round(held_out) == []
    row = held_out.head(1).with_columns(
        task=pl.lit("reversed_questions_by_entries_alone"), metric=pl.lit("acc"), against=pl.lit("final"),
        baseline=pl.lit(0.26), sbp=pl.lit(0.5), oracle=pl.lit(0.86), share_of_oracle_gain=pl.lit(0.4),
        share_low=pl.lit(0.3), share_high=pl.lit(0.5), delta_oracle_low=pl.lit(0.5), delta_oracle_high=pl.lit(0.7),
        delta_sbp=pl.lit(0.24), delta_sbp_low=pl.lit(0.2), delta_sbp_high=pl.lit(0.3), delta_oracle=pl.lit(0.6),
        higher_is_better=pl.lit(True),
    )  # fmt: skip
    (said,) = findings.other_way_round(row)
    assert said.startswith("Asked for the name of concepts that D knows by entries alone")
    assert "the baseline is right 26% of the time, SBP 50%, the oracle 86%" in said
    assert said.endswith(": 40% of the oracle’s gain (95% interval 30% to 50%).")
    (level,) = findings.other_way_round(row.with_columns(delta_oracle_low=pl.lit(-0.1)))
    assert level.endswith("the oracle 86%.")
    (noisy,) = findings.other_way_round(row.with_columns(delta_sbp_low=pl.lit(-0.1)))
    assert noisy.endswith("; SBP and the baseline cannot be told apart.")
    no_interval = pl.lit(None, pl.Float64)
    (short,) = findings.other_way_round(row.with_columns(share_low=no_interval, share_high=no_interval))
    assert short.endswith(": 40% of the oracle’s gain.")
    assert findings.other_way_round(row.with_columns(oracle=no_interval)) == []
    inverted = row.with_columns(task=pl.lit("concept_questions_by_inverted_alone"))
    assert "knows by inverted forms alone" in findings.other_way_round(pl.concat([row, inverted]))[1]


def test_caveats_name_the_tasks_that_sbp_wins_and_loses() -> None:
    table = report_inputs()["comparison"]
    intervals = {
        "concept_questions": (0.1, 0.3), "arc_easy": (-0.3, -0.1), "winogrande": (-0.1, 0.1), "heldout": (-1.0, -0.8),
    }  # fmt: skip
    rows = [
        {**row, "delta_sbp": (low + high) / 2, "delta_sbp_low": low, "delta_sbp_high": high}
        for row in table.filter(pl.col("task").is_in(list(intervals)), against="final").iter_rows(named=True)
        for low, high in [intervals[row["task"]]]
    ]
    final, seeds = findings.caveats(pl.DataFrame(rows, schema=table.schema))
    assert "ahead of the final baseline on 1 (Concept questions), behind on 1 (ARC-Easy)" in final
    assert "told apart from it on 1 (Winogrande)" in final
    assert "3 training seeds" in seeds
    assert "One training seed" in findings.caveats(comparison_of([(4.0, 3.9, 3.0)]))[-1]


def test_caveats_name_the_two_groups_that_repetition_cannot_teach_and_no_others() -> None:
    table = report_inputs()["comparison"]
    question = table.filter(task="concept_questions", metric="acc", against="final")
    groups = ("reversed_questions_by_entries_alone", "concept_questions_by_inverted_alone", "reversed_questions",
              "concept_questions_by_entries_alone", "reversed_questions_in_both_views", "heldout_entries")  # fmt: skip
    rows = pl.concat([question.with_columns(task=pl.lit(task)) for task in groups])
    said = findings.caveats(rows)[0]
    assert (
        said.startswith("Of 3 further tasks") and "Reversed questions: concepts that D knows by entries alone" in said
    )
    assert "Concept questions: concepts that D knows by inverted forms alone" in said and "both views" not in said


def test_no_share_of_a_gain_that_cannot_be_told_from_zero() -> None:
    table = comparison_of([(4.0, 3.5, 3.9)])
    doubtful = table.with_columns(delta_oracle_low=pl.lit(-0.3), delta_oracle_high=pl.lit(0.1))
    assert "500% of what the oracle gained" in findings.verdict(table)[0]
    assert "SBP beat" in findings.verdict(doubtful)[0] and "500%" not in findings.verdict(doubtful)[0]
    assert "the oracle gained cannot be told from zero" in findings.verdict(doubtful)[0]
    assert [row["share"] for row in display_rows(doubtful)] == ["–", "–"]
    assert [row["share_interval"] for row in display_rows(doubtful)] == ["–", "–"]


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
    assert "behind on 1 (Concept questions)" in findings.caveats(flipped)[0]


def test_contamination_tells_leaks_from_the_facts_that_are_asked_for() -> None:
    columns = ["evaluation_set", "corpus", "words", "judged", "contained"]
    rows = [("sciq", "unique", 13, 900, 0), ("sciq", "synthetic", 13, 900, 2)]
    asked = ("concept_questions", "unique", 13, 300, 40)
    leaked, task = findings.contamination_found(pl.DataFrame([*rows, asked], schema=columns, orient="row"))
    assert "SciQ 2 of 900 in the synthetic documents" in leaked and "300" not in leaked
    assert "Concept questions 40 of 300 in D" in task and "no leak" in task
    (clean,) = findings.contamination_found(pl.DataFrame(rows[:1], schema=columns, orient="row"))
    assert "Of 900 evaluation items" in clean and "none" in clean
