"""Tables of scores: their columns, how a score and its standard error follow from the samples, and their audit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from sbp_assets.evaluation.tasks import HELDOUT, QUESTIONS, Task
from sbp_assets.storage.columns import Column, table_schema

BOOTSTRAP_RESAMPLES = 1000
SEED = 1234  # Of the bootstrap and the questions: one value, so that all arms see the same.
ACCURACIES = ("acc", "acc_norm", "exact_match")

SCORE_COLUMNS = (
    Column(
        "task",
        pl.String,
        "heldout, concept_questions, reversed_questions, a group of one of these, or a stock benchmark",
    ),
    Column(
        "metric",
        pl.String,
        "perplexity is per token: of the text (heldout, openwebtext2), of the right answer (mmlu, questions); "
        "of lambada, per last word. nats_per_token is its logarithm. bits_per_byte does not depend on the tokenizer",
    ),
    Column("value", pl.Float64, "The score; accuracies in [0, 1]"),
    Column(
        "stderr",
        pl.Float64,
        f"Standard error: bootstrap of the documents or questions, {BOOTSTRAP_RESAMPLES} resamples; those about one "
        "concept are drawn together",
    ),
    Column("samples", pl.Int64, "Documents or questions scored"),
    Column("higher_is_better", pl.Boolean, "Direction of the metric"),
)
SCORES_SCHEMA = table_schema(SCORE_COLUMNS)
# What `with_samples` adds. A score is the weighted mean of the values (a perplexity: the exponential of the mean).
SAMPLE_COLUMNS = (
    Column(
        "sample_values",
        pl.List(pl.Float64),
        "Per document or question; the value is their weighted mean, of perplexities its exponential",
    ),
    Column("sample_weights", pl.List(pl.Int64), "Of the sample values: tokens, bytes, or one per question"),
    Column("sample_clusters", pl.List(pl.Int64), "Samples of one number are drawn together in bootstraps"),
)
SAMPLES_SCHEMA = {
    "task": pl.String, "metric": pl.String, "sample": pl.Int64, "value": pl.Float64, "weight": pl.Int64,
    "cluster": pl.Int64,
}  # fmt: skip


def score_table(samples: pl.DataFrame, exact: Mapping[tuple[str, str], float] | None = None) -> pl.DataFrame:
    """Return the scores (SCORES_SCHEMA) of `samples` (SAMPLES_SCHEMA): a row per task and metric, as they appear.

    `exact` has values by task and metric that replace the estimates, from which they differ by rounding.
    """
    exact = exact or {}
    rows = []
    for (task, metric), group in samples.group_by("task", "metric", maintain_order=True):
        values, weights, clusters = (group[name].to_numpy() for name in ("value", "weight", "cluster"))
        rows.append({
            "task": task, "metric": metric,
            "value": exact.get((str(task), str(metric)), estimate(str(metric), values, weights)),
            "stderr": bootstrap_stderr(str(metric), values, weights, clusters), "samples": len(group),
            "higher_is_better": metric in ACCURACIES,
        })  # fmt: skip
    return pl.DataFrame(rows, schema=SCORES_SCHEMA)


def estimate(metric: str, values: np.ndarray, weights: np.ndarray) -> float:
    """Return the score of documents or questions from their values and weights, each of shape (documents,).

    It is the weighted mean of the values, and for a perplexity its exponential.
    """
    mean = float(values @ weights / weights.sum())
    return float(np.exp(mean)) if metric == "perplexity" else mean


def bootstrap_stderr(
    metric: str, values: np.ndarray, weights: np.ndarray, clusters: np.ndarray | None = None
) -> float | None:
    """Return the standard deviation of `estimate` over BOOTSTRAP_RESAMPLES resamples; None for a single cluster.

    `values`, `weights` and `clusters` have the shape (documents,). Whole clusters (None: single documents) are drawn
    with replacement with one fixed seed, so that two models' scores on the same task are resampled alike. The method is
    the same for every metric (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 6; of clusters: Davison
    and Hinkley, Bootstrap Methods and their Application, section 3.8).
    """
    sums, totals = values * weights, weights.astype(float)
    if clusters is not None:
        sums, totals = sums_by_cluster(sums, clusters), sums_by_cluster(totals, clusters)
    if len(totals) < 2:
        return None
    rng = np.random.default_rng(SEED)
    draws = (rng.integers(0, len(totals), len(totals)) for _ in range(BOOTSTRAP_RESAMPLES))
    means = np.array([sums[drawn].sum() / totals[drawn].sum() for drawn in draws])
    return float(np.std(np.exp(means) if metric == "perplexity" else means, ddof=1))


def sums_by_cluster(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Return sums over the samples of each cluster, (..., clusters), of `values` (..., samples) with `clusters` each.

    The order is that of the clusters' numbers.
    """
    order = np.argsort(clusters, kind="stable")
    starts = np.flatnonzero(np.diff(clusters[order], prepend=clusters[order[:1]] - 1))
    return np.add.reduceat(values[..., order], starts, axis=-1)


def with_samples(scores: pl.DataFrame, samples: pl.DataFrame) -> pl.DataFrame:
    """Return `scores` (SCORES_SCHEMA) with SAMPLE_COLUMNS in addition, made of `samples` (SAMPLES_SCHEMA)."""
    lists = (
        samples.sort("task", "metric", "sample")
        .group_by("task", "metric")
        .agg(sample_values="value", sample_weights="weight", sample_clusters="cluster")
    )
    return scores.join(lists, on=["task", "metric"], how="left", maintain_order="left")


def unscored(table: pl.DataFrame, tasks: Sequence[str]) -> list[str]:
    """Return a sentence for each of the configured `tasks` that has no score in `table`."""
    scored = set(table["task"])
    return [f"{task} was configured but has no score" for task in tasks if task not in scored]


def score_problems(table: pl.DataFrame, tasks: Sequence[Task]) -> list[str]:
    """Return what is wrong with a score table (SCORE_COLUMNS and SAMPLE_COLUMNS) of `tasks`, a sentence each.

    Wrong are values that are impossible or differ from what their samples give, numbers of samples that are not the
    task's, and metrics that a task lacks. A benchmark may be missing (see `unscored`), held-out documents and questions
    may not.
    """
    scored, metrics = set(table["task"]), set(table.select("task", "metric").iter_rows())
    clusters = {task.name: task.clusters_of() for task in tasks}
    clusters |= {task.group_name(group): task.clusters_of(group) for task in tasks for group in task.groups}
    problems = [
        f"{task.name} {metric} is missing"
        for task in tasks
        for metric in task.metrics
        if task.name in scored | {HELDOUT, *QUESTIONS} and (task.name, metric) not in metrics
    ]
    problems += [
        f"{task.group_name(group)} {task.group_metric} is missing"
        for task in tasks
        for group in task.groups
        if (task.group_name(group), task.group_metric) not in metrics
    ]
    for row in table.iter_rows(named=True):
        name = f"{row['task']} {row['metric']}"
        if row["value"] is None or not math.isfinite(row["value"]):
            problems.append(f"{name} is not finite: {row['value']}")
        elif row["metric"] in ACCURACIES and not 0 <= row["value"] <= 1:
            problems.append(f"{name} is outside [0, 1]: {row['value']}")
        elif not row["higher_is_better"] and row["value"] < 0:
            problems.append(f"{name} is negative: {row['value']}")
        values, weights, drawn = (row.get(column.name) or [] for column in SAMPLE_COLUMNS)
        expected = clusters.get(row["task"], [])
        if {row["samples"], len(values), len(weights)} != {len(expected)}:
            problems.append(f"{name} is of {row['samples']} samples, the task has {len(expected)}")
        elif drawn != expected:
            problems.append(f"{name}: its samples are not in the clusters that the task names")
        elif row["value"] is not None:
            estimated = estimate(row["metric"], np.array(values), np.array(weights))
            # lm-eval's own value, in place of the estimate, differs by rounding.
            if not math.isclose(row["value"], estimated, rel_tol=1e-4, abs_tol=1e-6):
                problems.append(f"{name} is {row['value']:.6g}, its samples give {estimated:.6g}")
    return problems
