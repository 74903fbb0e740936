"""The three arms side by side: deltas against the baseline and the share of the oracle's gain that SBP recovers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import polars as pl

from sbp_assets.pretraining.budget import ARMS

EARLY_STOPPED = ("heldout_during_training", "best_nats_per_token")

SCHEMA = {
    "task": pl.String, "metric": pl.String, "higher_is_better": pl.Boolean,
    "baseline": pl.Float64, "sbp": pl.Float64, "oracle": pl.Float64,
    "delta_sbp": pl.Float64, "delta_oracle": pl.Float64,
    "share_of_oracle_gain": pl.Float64, "seeds": pl.Int64,
    "baseline_stderr": pl.Float64, "sbp_stderr": pl.Float64, "oracle_stderr": pl.Float64,
    "delta_sbp_stderr": pl.Float64, "delta_oracle_stderr": pl.Float64,
    "baseline_samples": pl.Int64, "sbp_samples": pl.Int64, "oracle_samples": pl.Int64,
}  # fmt: skip


def compare(scores: Mapping[str, Mapping[str, pl.DataFrame]], dynamics: pl.DataFrame | None = None) -> pl.DataFrame:
    """Comparison table from {arm: {seed: scores}}: one row per task and metric, means over the seeds.

    With several seeds a standard error is that of the mean over seeds, and that of a delta is over the per-seed
    differences; with one seed it is the score's own sampling error, and a delta's adds the two arms' in quadrature,
    which overstates it since the arms answer the same examples. share_of_oracle_gain is delta_sbp / delta_oracle: 1 is
    all of the oracle's gain, negative is a loss; null where the oracle does not beat the baseline. `dynamics`
    (columns arm, seed, tokens, heldout_loss) adds each arm's lowest held-out loss along training: what early stopping
    would have kept. samples are per seed, null where a task is missing or seeds disagree.
    """
    if missing := [arm for arm in ARMS if not scores.get(arm)]:
        raise ValueError(f"no scores of {', '.join(missing)}: a comparison needs the three arms")
    frames = [
        frame.with_columns(arm=pl.lit(arm), seed=pl.lit(seed), order=pl.int_range(pl.len()))
        for arm, seeds in scores.items()
        for seed, frame in seeds.items()
    ]
    if dynamics is not None and not dynamics.is_empty():
        best = dynamics.group_by("arm", "seed").agg(
            value=pl.col("heldout_loss").min(), samples=pl.len().cast(pl.Int64)
        )  # fmt: skip
        frames.append(best.select(
            task=pl.lit(EARLY_STOPPED[0]), metric=pl.lit(EARLY_STOPPED[1]), value="value",
            stderr=pl.lit(None, dtype=pl.Float64), samples="samples", higher_is_better=pl.lit(False), arm="arm",
            seed=pl.col("seed").cast(pl.String), order=pl.lit(len(max(frames, key=len)), dtype=pl.Int64),
        ))  # fmt: skip
    long = pl.concat(frames, how="vertical_relaxed")
    rows = [_row(task, metric, group) for (task, metric), group in long.group_by("task", "metric", maintain_order=True)]
    return pl.DataFrame(rows, schema=SCHEMA)


def _row(task: object, metric: object, group: pl.DataFrame) -> dict[str, object]:
    higher = bool(group["higher_is_better"][0])
    by_seed = {arm: dict(group.filter(pl.col("arm") == arm).select("seed", "value").iter_rows()) for arm in ARMS}
    row: dict[str, object] = {"task": task, "metric": metric, "higher_is_better": higher}
    # Only seeds that every arm has: a mean over other seeds would compare luck.
    seeds = sorted(set.intersection(*(set(values) for values in by_seed.values())))
    row["seeds"] = len(seeds)
    for arm in ARMS:
        values = [by_seed[arm][seed] for seed in seeds or by_seed[arm]]
        own = group.filter(pl.col("arm") == arm)
        row[arm] = sum(values) / len(values) if values else None
        row[f"{arm}_stderr"] = _stderr(values) if len(values) > 1 else (own["stderr"][0] if len(own) else None)
        row[f"{arm}_samples"] = own["samples"][0] if own["samples"].n_unique() == 1 else None
    for arm in ("sbp", "oracle"):
        deltas = [by_seed[arm][seed] - by_seed["baseline"][seed] for seed in seeds]
        row[f"delta_{arm}"] = sum(deltas) / len(deltas) if deltas else None
        errors = (row[f"{arm}_stderr"], row["baseline_stderr"])
        if len(deltas) > 1:
            row[f"delta_{arm}_stderr"] = _stderr(deltas)
        elif deltas and None not in errors:
            row[f"delta_{arm}_stderr"] = math.hypot(*errors)  # type: ignore[arg-type]
        else:
            row[f"delta_{arm}_stderr"] = None
    row["share_of_oracle_gain"] = share_of_oracle_gain(row["delta_sbp"], row["delta_oracle"], higher)  # type: ignore[arg-type]
    return row


def share_of_oracle_gain(delta_sbp: float | None, delta_oracle: float | None, higher_is_better: bool) -> float | None:
    """delta_sbp / delta_oracle, or None where the oracle does not beat the baseline: nothing to recover."""
    if delta_sbp is None or delta_oracle is None:
        return None
    gain = delta_oracle if higher_is_better else -delta_oracle
    return delta_sbp / delta_oracle if gain > 0 else None


def _stderr(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)) ** 0.5


def comparison_problems(table: pl.DataFrame) -> list[str]:
    """Rows in which the arms were not measured alike: a task that an arm lacks, or different sample counts."""
    problems = []
    for row in table.iter_rows(named=True):
        name = f"{row['task']} {row['metric']}"
        if lacking := [arm for arm in ARMS if row[arm] is None]:
            problems.append(f"{name}: missing for {', '.join(lacking)}")
        elif len(counts := {row[f"{arm}_samples"] for arm in ARMS}) > 1 or None in counts:
            problems.append(
                f"{name}: sample counts differ: " + ", ".join(f"{arm} {row[f'{arm}_samples']}" for arm in ARMS)
            )
        elif not row["seeds"]:
            problems.append(f"{name}: no seed is common to the three arms")
    if table.is_empty():
        problems.append("the comparison has no rows")
    return problems


TASK_NAMES = {
    "heldout": "Held-out documents", "concept_questions": "Concept questions", "openwebtext2": "OpenWebText2",
    "lambada": "LAMBADA", "mmlu": "MMLU, five-shot", "arc_challenge": "ARC-Challenge", "arc_easy": "ARC-Easy",
    "sciq": "SciQ", "winogrande": "Winogrande", "triviaqa": "TriviaQA, one-shot", "webqs": "WebQS, one-shot",
    "heldout_during_training": "Held-out, best along training",
}  # fmt: skip
METRIC_NAMES = {
    "perplexity": "perplexity", "nats_per_token": "nats per token", "bits_per_byte": "bits per byte",
    "acc": "accuracy", "acc_norm": "accuracy, length-normalised", "exact_match": "exact match",
    "best_nats_per_token": "nats per token",
}  # fmt: skip
PERCENT_METRICS = ("acc", "acc_norm", "exact_match")


def seed_count(table: pl.DataFrame) -> int:
    """Seeds that the comparison is a mean over."""
    return max(table["seeds"].to_list(), default=0)


def display_rows(table: pl.DataFrame) -> list[dict[str, str]]:
    """The comparison as strings for people: accuracies in percent, deltas signed, a dash where there is no value."""

    def number(value: float | None, metric: str, signed: bool = False) -> str:
        if value is None:
            return "–"
        scaled, digits = (100 * value, 2) if metric in PERCENT_METRICS else (value, 3 if abs(value) < 100 else 1)
        shown = f"{scaled:+.{digits}f}" if signed else f"{scaled:.{digits}f}"
        return shown.replace("-", "−")

    rows = []
    for row in table.iter_rows(named=True):
        metric, share = row["metric"], row["share_of_oracle_gain"]
        direction = "↑" if row["higher_is_better"] else "↓"
        unit = " %" if metric in PERCENT_METRICS else ""
        rows.append({
            "task": TASK_NAMES.get(row["task"], row["task"]),
            "metric": f"{METRIC_NAMES.get(metric, metric)}{unit} {direction}",
            "baseline": number(row["baseline"], metric),
            "sbp": number(row["delta_sbp"], metric, signed=True),
            "sbp_stderr": number(row["delta_sbp_stderr"], metric),
            "oracle": number(row["delta_oracle"], metric, signed=True),
            "oracle_stderr": number(row["delta_oracle_stderr"], metric),
            "share": "–" if share is None else f"{share:.0%}".replace("-", "−"),
        })  # fmt: skip
    return rows


def render_table(table: pl.DataFrame) -> str:
    """The comparison as a plain-text table for a terminal."""
    header = ["", "", "baseline", "SBP", "oracle", "share of oracle's gain"]
    cells = [
        [row["task"], row["metric"], row["baseline"], _with_error(row, "sbp"), _with_error(row, "oracle"), row["share"]]
        for row in display_rows(table)
    ]
    widths = [max(len(line[column]) for line in [header, *cells]) for column in range(len(header))]

    def line(parts: list[str]) -> str:
        aligned = [
            part.ljust(width) if column < 2 else part.rjust(width)
            for column, (part, width) in enumerate(zip(parts, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    seeds = seed_count(table)
    plural = "" if seeds == 1 else "s"
    note = f"SBP and oracle are differences to the baseline, ± one standard error; {seeds} seed{plural}."
    return "\n".join([line(header), line(["─" * width for width in widths]), *map(line, cells), "", note])


def render_markdown(table: pl.DataFrame) -> str:
    """The comparison as a markdown table."""
    lines = ["| task | metric | baseline | SBP | oracle | share of oracle's gain |", "|---|---|--:|--:|--:|--:|"]
    lines += [
        f"| {row['task']} | {row['metric']} | {row['baseline']} | {_with_error(row, 'sbp')} "
        f"| {_with_error(row, 'oracle')} | {row['share']} |"
        for row in display_rows(table)
    ]
    return "\n".join(lines)


def _with_error(row: dict[str, str], arm: str) -> str:
    error = row[f"{arm}_stderr"]
    return row[arm] if error == "–" else f"{row[arm]} ± {error}"
