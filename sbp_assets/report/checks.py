"""Checks of the training curves and the report."""

from pathlib import Path

import dagster as dg
import polars as pl

from sbp_assets.dagster_support.check_results import problems_result
from sbp_assets.report.audit import page_problems
from sbp_assets.report.dynamics import dynamics_problems


@dg.asset_check(
    asset=dg.AssetKey(["evaluation", "training_dynamics"]),
    blocking=True,
    description="Every arm and seed starts and ends at the same number of training tokens, with finite losses.",
)
def training_curves_span_the_same_tokens(training_dynamics: pl.LazyFrame) -> dg.AssetCheckResult:
    table = training_dynamics.collect()
    return problems_result(dynamics_problems(table), rows=len(table))


@dg.asset_check(
    asset=dg.AssetKey(["evaluation", "report"]),
    description="The page has all sections, runs no script and loads nothing from elsewhere.",
)
def page_is_self_contained(report: Path) -> dg.AssetCheckResult:
    page = (report / "index.html").read_text(encoding="utf-8")
    return problems_result(page_problems(page), characters=len(page))
