"""Checks of the scores, the comparison, the training curves and the report."""

from pathlib import Path

import dagster as dg
import polars as pl

from sbp_assets.evaluation.assets import configured_tasks
from sbp_assets.evaluation.comparison import SCORED, Scored, comparison_problems
from sbp_assets.evaluation.dynamics import dynamics_problems
from sbp_assets.evaluation.report import page_problems
from sbp_assets.evaluation.suite import score_problems
from sbp_assets.evaluation.tasks import Tasks
from sbp_assets.partitions import SEEDS


def _result(problems: list[str], **numbers: int) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=not problems, metadata={**numbers, "problems": problems})


@dg.asset_check(
    asset=dg.AssetKey(["evaluation", "tasks"]),
    description="Every configured task was made, with documents to score; the problems name those that were not.",
)
def every_task_was_made(tasks: Path) -> dg.AssetCheckResult:
    made = Tasks.load(tasks)
    return _result(made.missing(configured_tasks()), tasks=len(made.tasks))


def _scores_check(name: Scored) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=dg.AssetKey(["evaluation", f"{name}_scores"]),
        name="complete_and_possible",
        partitions_def=SEEDS,
        description="Every configured task has a score; values are finite and accuracies lie in [0, 1].",
    )
    def check(scores: pl.LazyFrame) -> dg.AssetCheckResult:
        table = scores.collect()
        return _result(score_problems(table, configured_tasks()), rows=len(table))

    return check


SCORES_CHECKS = [_scores_check(name) for name in SCORED]


@dg.asset_check(
    asset=dg.AssetKey(["evaluation", "comparison"]),
    description="The three arms have the same tasks, and scored the same number of examples in each.",
)
def arms_measured_alike(comparison: pl.LazyFrame) -> dg.AssetCheckResult:
    table = comparison.collect()
    return _result(comparison_problems(table), rows=len(table))


@dg.asset_check(
    asset=dg.AssetKey(["evaluation", "training_dynamics"]),
    description="Every arm and seed starts and ends at the same number of training tokens, with finite losses.",
)
def curves_span_the_same_tokens(training_dynamics: pl.LazyFrame) -> dg.AssetCheckResult:
    table = training_dynamics.collect()
    return _result(dynamics_problems(table), rows=len(table))


@dg.asset_check(
    asset=dg.AssetKey(["evaluation", "report"]),
    description="The page has all sections, runs no script and loads nothing from elsewhere.",
)
def page_is_self_contained(report: Path) -> dg.AssetCheckResult:
    page = (report / "index.html").read_text(encoding="utf-8")
    return _result(page_problems(page), characters=len(page))
