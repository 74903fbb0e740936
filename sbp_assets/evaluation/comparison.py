"""Compares the arms: differences to the baseline, and the share of the oracle's gain that SBP recovers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast, get_args

import numpy as np
import polars as pl

from sbp_assets.evaluation.scores import SAMPLE_COLUMNS, sums_by_cluster
from sbp_assets.pretraining.budget import ARMS
from sbp_assets.storage.columns import Column, table_schema

Scored = Literal["baseline", "early_stopped", "sbp", "oracle"]
SCORED: tuple[Scored, ...] = get_args(Scored)
"""Models that are scored: the arms as trained, and the baseline at its lowest held-out loss along training."""

Against = Literal["final", "early_stopped"]
AGAINST: tuple[Against, ...] = get_args(Against)
"""The baseline that the others are compared with: as trained, or as early stopping would have left it."""

PERPLEXITY = "perplexity"
RESAMPLES = 2000
CONFIDENCE = 0.975  # Each side of a 95% interval.
# Share of the resamples in which the oracle may fail to beat the baseline before the share of its gain has no interval.
UNDEFINED_SHARE = 0.025
ROUNDING = 1e-9  # A gain of the oracle below it, in the metric's units, is none: sums differ by rounding.
_ENTRIES = 1 << 22  # Counts held at once: resamples by samples.

# Models whose scores a column of the comparison is made of, by what the column's name begins with.
_COMPARED: dict[str, tuple[Scored, ...]] = {
    "baseline": ("baseline", "early_stopped"),
    "sbp": ("sbp",),
    "oracle": ("oracle",),
    "delta_sbp": ("baseline", "early_stopped", "sbp"),
    "delta_oracle": ("baseline", "early_stopped", "oracle"),
    "share": SCORED,
}
_SAMPLES = tuple(column.name for column in SAMPLE_COLUMNS)
_MEANS = (*ARMS, "delta_sbp", "delta_oracle")
INTERVALS = ("delta_sbp", "delta_oracle", "share")


def _of(models: tuple[Scored, ...], *columns: str) -> str:
    """Return the sources of a column that is made of these `columns` of the scores of `models`."""
    return " ".join(f"evaluation/{scored}_scores.{column}" for scored in sorted(models) for column in columns)


COMPARISON_COLUMNS = (
    Column("task", pl.String, "As in the scores", _of(SCORED, "task")),
    Column("metric", pl.String, "As in the scores", _of(SCORED, "metric")),
    Column("higher_is_better", pl.Boolean, "Direction of the metric", _of(SCORED, "higher_is_better")),
    Column("against", pl.String, "The baseline: final, or early_stopped at its lowest held-out loss"),
    *(Column(arm, pl.Float64, f"Mean of the {arm} arm over the seeds", _of(_COMPARED[arm], "value")) for arm in ARMS),
    Column("delta_sbp", pl.Float64, "sbp - baseline", _of(_COMPARED["delta_sbp"], "value")),
    Column("delta_oracle", pl.Float64, "oracle - baseline", _of(_COMPARED["delta_oracle"], "value")),
    Column(
        "share_of_oracle_gain",
        pl.Float64,
        "delta_sbp / delta_oracle; null where the oracle gains nothing",
        _of(SCORED, "value"),
    ),
    Column("seeds", pl.Int64, "Seeds that all arms have"),
    *(
        Column(
            f"{name}_stderr",
            pl.Float64,
            f"Standard error of {name}: bootstrap of examples (concepts where known) and seeds",
            _of(_COMPARED[name], *_SAMPLES),
        )
        for name in _MEANS
    ),
    *(
        Column(
            f"{name}_{end}",
            pl.Float64,
            f"{end.title()} end of the 95% bootstrap interval of {name}",
            _of(_COMPARED[name], *_SAMPLES),
        )
        for name in INTERVALS
        for end in ("low", "high")
    ),
    *(
        Column(f"{arm}_samples", pl.Int64, f"Examples scored per seed of {arm}", _of(_COMPARED[arm], "samples"))
        for arm in ARMS
    ),
)


def compare(scores: Mapping[str, Mapping[str, pl.DataFrame]], resamples: int = RESAMPLES) -> pl.DataFrame:
    """Return the comparison table (COMPARISON_COLUMNS) of {model of SCORED: {seed: scores `with_samples`}}.

    It has a row per task, metric and baseline (`against`: as trained, or early-stopped), with means over the seeds that
    all models have. share_of_oracle_gain is delta_sbp / delta_oracle: 1 is all of the oracle's gain, negative is a
    loss; null where the oracle does not beat the baseline.

    Standard errors are of a paired bootstrap: in each resample all models get the same examples, drawn with
    replacement, and the same seeds. Examples of one cluster, as questions about one concept, are drawn together. Of
    n > 1 seeds n - 1 are drawn, and of n clusters n - 1, which makes the bootstrap variance that of a mean of n (Rao
    and Wu 1988, J. Am. Stat. Assoc. 83); of one seed only the examples vary. 95% intervals reach as many standard
    errors as Student's t asks for with so few (see `quantile`). The synthesizer is tuned and sampled once, so its own
    variation is not in them. Errors and intervals are null where models did not answer the same examples, or all
    examples are one cluster. Raises ValueError when a model of SCORED has no scores.
    """
    if missing := [name for name in SCORED if not scores.get(name)]:
        raise ValueError(f"no scores of {', '.join(missing)}: a comparison needs {', '.join(SCORED)}")
    frames = [
        frame.with_columns(model=pl.lit(name), seed=pl.lit(seed))
        for name, seeds in scores.items()
        for seed, frame in seeds.items()
    ]
    long = pl.concat(frames, how="vertical_relaxed")
    rows = []
    for against in AGAINST:
        baseline: Scored = "baseline" if against == "final" else "early_stopped"
        for (task, metric), group in long.group_by("task", "metric", maintain_order=True):
            models = {"baseline": baseline, "sbp": "sbp", "oracle": "oracle"}
            higher = bool(group["higher_is_better"][0])
            arms = {arm: group.filter(model=model) for arm, model in models.items()}
            row = _row(str(task), str(metric), higher, arms, resamples)
            rows.append({"task": task, "metric": metric, "against": against} | row)
    return pl.DataFrame(rows, schema=table_schema(COMPARISON_COLUMNS))


def _row(task: str, metric: str, higher: bool, arms: Mapping[str, pl.DataFrame], resamples: int) -> dict[str, object]:
    # Only seeds that every arm has: a mean over other seeds would compare luck.
    seeds = sorted(set.intersection(*(set(own["seed"].to_list()) for own in arms.values())))
    row: dict[str, object] = {"higher_is_better": higher, "seeds": len(seeds)}
    values = {}
    for arm, own in arms.items():
        common = own.filter(pl.col("seed").is_in(seeds)) if seeds else own
        values[arm] = cast(float | None, common["value"].mean())
        row[arm] = values[arm]
        row[f"{arm}_samples"] = own["samples"][0] if own["samples"].n_unique() == 1 else None
    deltas = {
        f"delta_{arm}": values[arm] - values["baseline"] if seeds else None  # type: ignore[operator]
        for arm in ("sbp", "oracle")
    }
    row |= deltas
    row["share_of_oracle_gain"] = share_of_oracle_gain(deltas["delta_sbp"], deltas["delta_oracle"], higher)
    if not seeds or (sample := _samples(arms, seeds)) is None:
        return row
    clusters = len(sample[2])
    # With the seeds drawn, too, for the error; with the seeds as they are, to tell what part of it seeds make.
    both, examples = (_statistics(drawn, higher) for drawn in _bootstrap(task, metric, *sample, resamples))
    for name, resampled in both.items():
        if np.mean(np.isnan(resampled)) > UNDEFINED_SHARE:
            continue
        error = float(np.nanstd(resampled, ddof=1))
        middle = row["share_of_oracle_gain"] if name == "share" else row[name]
        if name != "share":
            row[f"{name}_stderr"] = error
        if name in INTERVALS and middle is not None:
            of_examples = float(np.nanvar(examples[name], ddof=1))
            reach = error * quantile([(of_examples, clusters - 1), (error**2 - of_examples, len(seeds) - 1)])
            row[f"{name}_low"], row[f"{name}_high"] = middle - reach, middle + reach  # type: ignore[operator]
    return row


def quantile(parts: Iterable[tuple[float, int]]) -> float:
    """Return Student's t quantile of a two-sided 95% interval, its degrees of freedom by Satterthwaite (1946).

    `parts` are the parts of the variance, each with the degrees of freedom that it is estimated with: n - 1 of n seeds
    or clusters of examples. A part with zero degrees comes from a single seed: it is rounding, and is left out. With
    three seeds and nothing but them the quantile is 4.3 and not 1.96: percentiles of the bootstrap would cover 80%
    instead of 95%.
    """
    from scipy import stats

    estimated = [(variance, degrees) for variance, degrees in parts if degrees and variance > 0]
    if not estimated:
        return float(stats.norm.ppf(CONFIDENCE))
    total = sum(variance for variance, _ in estimated)
    return float(stats.t.ppf(CONFIDENCE, total**2 / sum(variance**2 / degrees for variance, degrees in estimated)))


def _statistics(drawn: dict[str, np.ndarray], higher: bool) -> dict[str, np.ndarray]:
    """Return resampled scores, deltas and share, (resamples,) each; the share is NaN where the oracle does not gain."""
    drawn = drawn | {f"delta_{arm}": drawn[arm] - drawn["baseline"] for arm in ("sbp", "oracle")}
    return drawn | {"share": shares_of_oracle_gain(drawn["delta_sbp"], drawn["delta_oracle"], higher)}


def _samples(arms: Mapping[str, pl.DataFrame], seeds: list[str]) -> tuple[list[str], np.ndarray, np.ndarray] | None:
    """Return arms, weighted values (arms, seeds, clusters) and weights; None where examples differ or are unknown.

    None as well where all examples are one cluster, which tells nothing of how examples vary.
    """
    found = {arm: [own.filter(seed=seed).select(_SAMPLES).row(0) for seed in seeds] for arm, own in arms.items()}
    flat = [sample for rows in found.values() for sample in rows]
    if any(not values for values, *_ in flat) or len({(tuple(w), tuple(c)) for _, w, c in flat}) != 1:
        return None
    if len(set(flat[0][2])) < 2:
        return None
    values = np.array([[values for values, *_ in rows] for rows in found.values()])
    weights, clusters = np.array(flat[0][1], dtype=np.float64), np.array(flat[0][2])
    return list(found), sums_by_cluster(values * weights, clusters), sums_by_cluster(weights, clusters)


def _bootstrap(
    task: str, metric: str, arms: list[str], sums: np.ndarray, weights: np.ndarray, resamples: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return resampled means over the seeds of every arm, (resamples,) each: over drawn seeds, and over all seeds."""
    seeds = sums.shape[1]
    random = generator_of(task)
    chosen = random.integers(0, seeds, (resamples, max(1, seeds - 1)))
    of_seeds = resampled_means(random, metric, sums, weights, resamples)
    drawn = np.take_along_axis(of_seeds, chosen[None], axis=2)
    return (
        dict(zip(arms, drawn.mean(axis=2), strict=True)),
        dict(zip(arms, of_seeds.mean(axis=2), strict=True)),
    )


def generator_of(task: str) -> np.random.Generator:
    """Return the random numbers of a task's bootstrap.

    The task alone decides what is drawn: rows about the same examples agree, and nothing else moves them.
    """
    return np.random.default_rng(int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "big"))


def resampled_means(
    random: np.random.Generator, metric: str, sums: np.ndarray, weights: np.ndarray, resamples: int
) -> np.ndarray:
    """Return every run's mean over each resample of the clusters of examples, (arms, resamples, runs).

    `sums` (arms, runs, clusters) are values times weights, summed over each cluster, `weights` (clusters,) the weights.
    Of perplexity, values are in nats. A resample has one cluster less than there are (Rao and Wu 1988).
    """
    parts = []
    at_once = max(1, _ENTRIES // len(weights))
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        counts = random.multinomial(len(weights) - 1, np.full(len(weights), 1 / len(weights)), size).astype(float)
        totals = np.maximum(counts @ weights, 1e-9)
        means = np.einsum("rn,asn->ars", counts, sums, optimize=True) / totals[None, :, None]
        parts.append(np.exp(means) if metric == PERPLEXITY else means)
    return np.concatenate(parts, axis=1)


def share_of_oracle_gain(delta_sbp: float | None, delta_oracle: float | None, higher_is_better: bool) -> float | None:
    """Return delta_sbp / delta_oracle; None where the oracle does not beat the baseline, so gains nothing."""
    if delta_sbp is None or delta_oracle is None:
        return None
    share = float(shares_of_oracle_gain(delta_sbp, delta_oracle, higher_is_better))
    return None if math.isnan(share) else share


def shares_of_oracle_gain(
    delta_sbp: np.ndarray | float, delta_oracle: np.ndarray | float, higher_is_better: bool
) -> np.ndarray:
    """Return delta_sbp / delta_oracle, of the shape of both; NaN where the oracle gains no more than ROUNDING."""
    gain = np.asarray(delta_oracle if higher_is_better else np.negative(delta_oracle))
    gained = gain > ROUNDING
    return np.where(gained, delta_sbp / np.where(gained, delta_oracle, 1.0), np.nan)


def oracle_gains(row: Mapping[str, Any]) -> bool:
    """Return whether the oracle's gain in a row of the comparison is clear of zero, so that a share of it means much.

    A gain without an interval counts.
    """
    low, high = row["delta_oracle_low"], row["delta_oracle_high"]
    return low is None or (low > 0 if row["higher_is_better"] else high < 0)


def values_unlike_scores(table: pl.DataFrame, scores: Mapping[str, Mapping[str, pl.DataFrame]]) -> list[str]:
    """Return where `table` differs from the comparison of `scores` (as for `compare`), a sentence per difference.

    Rows, means, deltas, shares and the numbers of seeds are compared.
    """
    # With next to no bootstrap, which changes no value that is compared here.
    columns = ["task", "metric", "against", *ARMS, "delta_sbp", "delta_oracle", "share_of_oracle_gain", "seeds"]
    again = compare(scores, resamples=2).select(columns)
    if not table.select(columns[:3]).equals(again.select(columns[:3])):
        return [f"the scores give other rows: {len(again)}, the table has {len(table)}"]
    return [
        f"{row['task']} {row['metric']} against {row['against']}: {name} is {row[name]}, of the scores {expected[name]}"
        for row, expected in zip(table.iter_rows(named=True), again.iter_rows(named=True), strict=True)
        for name in columns[3:]
        if not _same(row[name], expected[name])
    ]


def comparison_problems(table: pl.DataFrame) -> list[str]:
    """Return the rows in which the arms were not measured alike: an arm lacks the task, or answered other examples."""
    problems = []
    for row in table.iter_rows(named=True):
        name = f"{row['task']} {row['metric']} against the {row['against'].replace('_', '-')} baseline"
        if lacking := [arm for arm in ARMS if row[arm] is None]:
            problems.append(f"{name}: missing for {', '.join(lacking)}")
        elif len(counts := {row[f"{arm}_samples"] for arm in ARMS}) > 1 or None in counts:
            problems.append(
                f"{name}: sample counts differ: " + ", ".join(f"{arm} {row[f'{arm}_samples']}" for arm in ARMS)
            )
        elif not row["seeds"]:
            problems.append(f"{name}: no seed is common to the three arms")
        elif row["delta_sbp_stderr"] is None:
            problems.append(
                f"{name}: there is no standard error: the arms were not scored on the same examples, or all of them "
                "are about one concept"
            )
    if table.is_empty():
        problems.append("the comparison has no rows")
    return problems


def _same(a: float | None, b: float | None) -> bool:
    return a is b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12))


def seed_count(table: pl.DataFrame) -> int:
    """Return the number of seeds that the comparison is a mean over; 0 for an empty one."""
    return max(table["seeds"].to_list(), default=0)
