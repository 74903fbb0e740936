"""Rows of the page's tables."""

import polars as pl
import pytest

from sbp_assets.report import published, tables
from sbp_assets_tests.report.example_report import SETTINGS, report_inputs


def test_average_of_the_qa_tasks_needs_all_six() -> None:
    row = report_inputs()["comparison"].filter(task="arc_easy", against="final")
    table = pl.concat([
        row.with_columns(task=pl.lit(task), baseline=0.1 * n, delta_sbp=0.1, delta_oracle=0.2)
        for n, task in enumerate(published.QA_TASKS)
    ])  # fmt: skip
    average = tables.with_average(table).filter(task="Average QA").row(0, named=True)
    assert average["baseline"] == pytest.approx(0.25) and average["share_of_oracle_gain"] == pytest.approx(0.5)
    assert tables.with_average(table[1:]).equals(table[1:])


def test_a_baseline_of_equal_total_compute_is_charged_tuning_and_generation() -> None:
    budget = report_inputs()["token_budget"]
    found = tables.budget(budget)
    # 6.1e12 FLOPs of SBP, 4.0e12 of tuning and 1.1e12 of generation, where 6.1e12 read D 20.01 times.
    assert found["budget_equal"]["passes"] == pytest.approx(614_400 / 30_700 * 11.2 / 6.1)
    assert found["budget_equal"]["flops"] == pytest.approx(11.2e12)
    assert found["budget_equal"]["steps"] == round(600 * 11.2 / 6.1)
    assert found["budget_equal_start"] == pytest.approx(614_400 / 30_700 * 17.3 / 6.1)
    without = tables.budget(budget.filter(pl.col("arm") != "synthesizer"))
    assert without["budget_equal"] is None and without["budget_equal_start"] is None


def test_novelty_stands_beside_its_reference() -> None:
    rows = {row["name"]: row for row in tables.novelty_rows(report_inputs()["novelty"])}
    words = rows["novel-ngrams, n = 1"]
    assert words["synthetic"][0].endswith("%") and words["reference"][0].endswith("%") and words["definition"]
    assert not rows["novel-ngrams, n = 2"]["definition"], "one definition of several n is shown once"
    assert "at most" in rows["length"]["synthetic"][1] and "%" not in rows["length"]["synthetic"][0]
    assert rows["partner-similarity"]["of"] == "seed" and rows["length"]["of"] == "heldout"


def test_parameters_are_those_of_the_model_that_was_trained() -> None:
    for tied in (True, False):
        model = SETTINGS.model.model_copy(update={"tie_embeddings": tied})
        flops = 20_000 * model.flops_per_token(997)
        budget = pl.DataFrame({"arm": ["baseline"], "flops": [flops], "tokens_read": [20_000]})
        experiment = SETTINGS.model_copy(update={"model": model})
        assert tables.parameters(experiment, budget) == model.parameters(997)
