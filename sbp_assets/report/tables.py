"""Builds the rows of the page's tables and plots from the tables of the assets."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import polars as pl

from sbp_assets.evaluation.comparison import oracle_gains, share_of_oracle_gain
from sbp_assets.evaluation.comparison_table import display_rows
from sbp_assets.evaluation.scores import ACCURACIES
from sbp_assets.pretraining.budget import ARMS, equal_total_compute
from sbp_assets.report import published
from sbp_assets.report.findings import tone
from sbp_assets.report.formatting import decimal, percent, quantity
from sbp_assets.report.samples import BIN_WIDTH
from sbp_assets.settings import Experiment
from sbp_assets.synthesis.novelty import SHARES, SIMILARITIES
from sbp_assets.synthesis.quality import DETAILS, JUDGE

# Groups of the posterior table that are shown; the others are sums of these.
BELIEFS = {
    "concept": "Whom a fact is about",
    "restated": "Facts that d1 states",
    "new_known": "Other facts of its concept, stated elsewhere in D",
    "new_unknown": "Other facts of its concept, stated nowhere in D",
    "other_known": "Facts of another concept, stated in D",
    "other_unknown": "Facts of another concept, stated nowhere in D",
}


def result_groups(comparison: pl.DataFrame) -> list[list[dict[str, Any]]]:
    """Return the rows of `comparison` as strings (`display_rows`), one list per task, in order.

    Each has also the tone of either delta (`findings.tone`), and `share_plot`: where in a small plot the share of the
    oracle's gain and the ends of its interval lie, from 0 (left) to 1.
    """
    groups: list[list[dict[str, Any]]] = []
    for shown, row in zip(display_rows(comparison), comparison.iter_rows(named=True), strict=True):
        entry: dict[str, Any] = {
            **shown,
            "samples": row["baseline_samples"],
            "share_plot": None
            if row["share_of_oracle_gain"] is None or not oracle_gains(row)
            else [_clamp(row[key]) for key in ("share_of_oracle_gain", "share_low", "share_high")],
            **{f"{arm}_tone": tone(row, arm) for arm in ("sbp", "oracle")},
        }
        if groups and groups[-1][0]["task"] == shown["task"]:
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return groups


def _clamp(share: float | None, low: float = -0.5, high: float = 1.5) -> float | None:
    """Return where a share lies between `low` (0) and `high` (1)."""
    return None if share is None else (min(max(share, low), high) - low) / (high - low)


def with_average(comparison: pl.DataFrame) -> pl.DataFrame:
    """Return `comparison` (of one baseline) with a row of the six QA tasks' mean accuracy, if all were scored.

    The first accuracy of each task counts. The row has no standard error, as the published one has none.
    """
    accuracies = comparison.filter(pl.col("task").is_in(published.QA_TASKS), pl.col("metric").is_in(ACCURACIES))
    first = accuracies.unique("task", keep="first")
    if set(first["task"]) != set(published.QA_TASKS) or first["delta_sbp"].null_count():
        return comparison
    means = first.select(pl.col(*ARMS, "delta_sbp", "delta_oracle").mean()).with_columns(
        task=pl.lit("Average QA"), metric=pl.lit("acc"), higher_is_better=True,
        against=pl.lit(comparison["against"][0]), seeds=first["seeds"].min(),
    )  # fmt: skip
    share = share_of_oracle_gain(means["delta_sbp"][0], means["delta_oracle"][0], True)
    average = means.with_columns(share_of_oracle_gain=pl.lit(share, dtype=pl.Float64))
    return pl.concat([comparison, average], how="diagonal_relaxed")


def published_rows() -> list[tuple[str, str, list[tuple[float, float, float, float | None]]]]:
    """Return the paper's results: name, arrow of the better direction, per scale the three figures and SBP's share."""
    return [
        (
            row.name,
            "↑" if row.higher_is_better else "↓",
            [
                (*scale, share_of_oracle_gain(scale.delta_sbp, scale.delta_oracle, row.higher_is_better))
                for scale in (row.tokens_200b, row.tokens_1t)
            ],
        )
        for row in published.RESULTS
    ]


def published_at_6b() -> tuple[float, float, float, float | None]:
    """Return the paper's average QA accuracy of the 6B model: the three figures and SBP's share."""
    scale = published.AVERAGE_QA_6B
    return *scale, share_of_oracle_gain(scale.delta_sbp, scale.delta_oracle, higher_is_better=True)


def quality_rows(quality: pl.DataFrame, judged: bool) -> list[dict[str, Any]]:
    """Return a row per metric and method: the synthetic and real documents' values with counts, and the published.

    `judged` says whether a judge is configured, which decides how a missing value of a judge is explained.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in quality.iter_rows(named=True):
        metric, method = row["metric"], row["method"]
        figures: tuple[float | None, ...] = published.QUALITY.get(metric, ())
        entry = rows.setdefault((metric, method), {
            "name": metric.replace("_", "-"), "method": method, "definition": row["definition"],
            "detail": metric in DETAILS,
            "synthetic": ("–", ""), "real": ("–", ""),
            "published": ["n.a." if figure is None else f"{figure}%" for figure in figures] or [""] * 4,
        })  # fmt: skip
        if row["value"] is not None:
            value, count = percent(row["value"]), f"{row['flagged']:,} of {row['scored']:,}"
            if unjudged := row["sample"] - row["documents"]:
                count += f", {unjudged:,} unjudged"
        elif metric.startswith("pair_") and row["corpus"] == "real":
            value, count = "n.a.", ""
        elif method == JUDGE:
            value, count = "unjudged" if judged else "no judge configured", ""
        else:
            value, count = "none scored", ""
        entry[row["corpus"]] = (value, count)
    return list(rows.values())


def novelty_rows(novelty: pl.DataFrame) -> list[dict[str, Any]]:
    """Return a row per measure and n: its definition, and the synthetic and the reference documents' values as text.

    A value is (mean, spread): the mean, and the median with the tenths below and above and the maximum. `of` says which
    documents are the reference.
    """
    rows: dict[tuple[str, int | None], dict[str, Any]] = {}
    for row in novelty.iter_rows(named=True):
        measure, words = row["measure"], row["words"]
        entry = rows.setdefault((measure, words), {
            "name": measure.replace("_", "-") + (f", n = {words}" if words else ""), "definition": row["definition"],
            "synthetic": ("–", ""), "reference": ("–", ""), "of": "",
        })  # fmt: skip
        shown = percent if measure in SHARES else decimal if measure in SIMILARITIES else quantity
        value = spread = ""
        if row["mean"] is not None:
            value = shown(row["mean"])
        if row["median"] is not None:
            low, median, high, top = (shown(row[key]) for key in ("p10", "median", "p90", "maximum"))
            spread = f"median {median} ({low} to {high}), at most {top}"
        if row["corpus"] == "synthetic":
            entry["synthetic"] = (value or "–", spread)
        else:
            entry["reference"], entry["of"] = (value or "–", spread), row["corpus"]
    for entry, other in reversed(list(pairwise(rows.values()))):  # One definition of several n is shown once.
        if entry["definition"] == other["definition"]:
            other["definition"] = ""
    return list(rows.values())


def belief_rows(posterior: pl.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of the posterior table whose group is one of BELIEFS, with its name."""
    return [
        {**row, "name": BELIEFS[row["group"]]}
        for row in posterior.filter(pl.col("group").is_in(BELIEFS)).iter_rows(named=True)
    ]


def histogram(counts: pl.DataFrame, width: int = 640, height: int = 150) -> dict[str, Any] | None:
    """Return bars and ticks of `samples.similarity_counts` for an SVG of this size (user units); None without pairs."""
    if counts.is_empty():
        return None
    top, step = max(counts["count"]), width / len(counts)
    bars = [
        {
            "x": round(index * step + 0.75, 2), "width": round(max(step - 1.5, 1), 2),
            "height": round(height * count / top, 2), "y": round(height * (1 - count / top), 2),
            "title": f"{low:.2f} to {low + BIN_WIDTH:.2f}: {count:,} pairs",
        }
        for index, (low, count) in enumerate(counts.select("low", "count").iter_rows())
    ]  # fmt: skip
    every = max(1, len(counts) // 8)
    ticks = [(round(index * step, 2), f"{low:.2f}") for index, low in enumerate(counts["low"]) if index % every == 0]
    return {"bars": bars, "ticks": ticks, "width": width, "height": height, "top": top, "total": sum(counts["count"])}


def budget(token_budget: pl.DataFrame) -> dict[str, Any]:
    """Return rows and totals of the arms, the rows of tuning and generation, and these as a share of an arm's FLOPs.

    `budget_equal` is the row of a baseline that costs what SBP does with tuning and generation charged, and
    `budget_equal_start` its epochs with the synthesizer's starting point charged, too.
    """
    rows = token_budget.to_dicts()
    arms = {arm: [row for row in rows if row["arm"] == arm] for arm in ARMS}
    arms = {arm: own for arm, own in arms.items() if own}
    totals = {
        arm: {key: sum(row[key] or 0 for row in own) for key in ("tokens_read", "flops")} for arm, own in arms.items()
    }
    ledger = [row for row in rows if row["arm"] not in ARMS]
    of_arm = totals["baseline"]["flops"] if "baseline" in totals else 0
    corpus = next((row for row in arms.get("baseline", []) if row["source"] == "unique"), None)
    equal = equal_total_compute(token_budget)
    return {
        "budget_equal": equal
        and corpus
        and {
            **corpus,
            "passes": equal.repetitions,
            "tokens_read": equal.tokens,
            "steps": round(corpus["steps"] * equal.tokens / totals["baseline"]["tokens_read"]),
            "flops": equal.flops,
        },
        "budget_equal_start": equal and equal.with_start,
        "budget_arms": arms,
        "budget_ledger": ledger,
        "budget_totals": totals,
        "corpus": corpus,
        "synthesis_cost": percent(sum(row["flops"] or 0 for row in ledger) / of_arm) if of_arm and ledger else None,
        "budget_matched": len({total["tokens_read"] for total in totals.values()}) <= 1,
    }


def parameters(experiment: Experiment, token_budget: pl.DataFrame) -> int | None:
    """Return the number of the model's parameters, from the budget's FLOPs per token; None without a budget."""
    rows = token_budget.filter(arm="baseline")
    if rows.is_empty():
        return None
    model = experiment.model
    per_token = sum(rows["flops"].to_list()) / sum(rows["tokens_read"].to_list())
    # FLOPs per token are linear in the vocabulary, which is the one size of the model that is not a setting.
    slope = model.flops_per_token(1) - model.flops_per_token(0)
    return model.parameters(round((per_token - model.flops_per_token(0)) / slope))
