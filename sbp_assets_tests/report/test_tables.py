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


def test_parameters_are_those_of_the_model_that_was_trained() -> None:
    for tied in (True, False):
        model = SETTINGS.model.model_copy(update={"tie_embeddings": tied})
        flops = 20_000 * model.flops_per_token(997)
        budget = pl.DataFrame({"arm": ["baseline"], "flops": [flops], "tokens_read": [20_000]})
        experiment = SETTINGS.model_copy(update={"model": model})
        assert tables.parameters(experiment, budget) == model.parameters(997)
