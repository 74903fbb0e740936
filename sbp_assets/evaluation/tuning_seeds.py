"""Compares arms that were tuned and sampled more than once: intervals that hold the luck of the synthesizer.

An arm with synthetic documents has a score for every pair of a tuning seed (of tuning and sampling) and a training
seed; baseline and oracle have one for every training seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from sbp_assets.evaluation.comparison import (
    AGAINST,
    RESAMPLES,
    UNDEFINED_SHARE,
    generator_of,
    quantile,
    resampled_means,
    shares_of_oracle_gain,
)
from sbp_assets.evaluation.scores import sums_by_cluster

SHARED = ("baseline", "early_stopped", "oracle")
"""Models that no tuning seed reaches."""

Drawn = dict[str, dict[str, np.ndarray]]  # What is drawn, then the model: resampled means, (resamples,).
TrainingSeeds = Mapping[str, pl.DataFrame]  # Training seed: scores `with_samples`.


@dataclass(frozen=True)
class Estimate:
    """A figure with its standard error and 95% interval; null where it is not defined."""

    value: float | None
    stderr: float | None = None
    low: float | None = None
    high: float | None = None

    def columns(self, name: str) -> dict[str, float | None]:
        """Return `name`, `name`_stderr, `name`_low and `name`_high."""
        return {name: self.value, f"{name}_stderr": self.stderr, f"{name}_low": self.low, f"{name}_high": self.high}


def compare_arms(
    shared: Mapping[str, TrainingSeeds],
    arms: Mapping[str, Mapping[str, TrainingSeeds]],
    first: str = "sbp",
    resamples: int = RESAMPLES,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of every arm against each baseline, and the leads of the arm `first` over every other.

    `shared` holds the scores of SHARED by training seed, `arms` those of the other arms by tuning seed and training
    seed. A row of the first list has task, metric, higher_is_better, against, arm, the numbers of seeds and of clusters
    of examples, the score, its delta to the baseline, the oracle's, and the arm's share of the oracle's gain, each with
    stderr, low and high. A row of the second has the lead of `first` over `control` in score, and in share of the
    oracle's gain. The tuning seeds are those that all arms of a row have.

    The bootstrap has two levels, crossed (Owen 2007): in each resample all models get the same examples, the same
    training seeds and the same tuning seeds. Examples of one cluster, as questions about one concept, are drawn
    together. Of n > 1 seeds of either kind, and of n clusters, n - 1 are drawn (Rao and Wu 1988), and all pairs of the
    seeds drawn are averaged. Intervals are t intervals whose degrees of freedom Satterthwaite's formula takes from the
    parts of the variance (see `interval`). With two tuning seeds their part has one degree: where it rules, an interval
    reaches 12.7 standard errors to either side. With one tuning seed its luck is in no interval. The baseline that all
    synthesizers start from is the first training seed's, and its luck is in none.

    Raises ValueError where a model lacks scores, or models were not scored on the same examples.
    """
    if lacking := [name for name in SHARED if not shared.get(name)] + [name for name in arms if not arms[name]]:
        raise ValueError(f"no scores of {', '.join(lacking)}")
    training = _common([*shared.values(), *(own for runs in arms.values() for own in runs.values())])
    if not training:
        raise ValueError("no training seed has scores of all arms")
    cells = {
        (name, tuning, seed): {(row["task"], row["metric"]): row for row in own[seed].iter_rows(named=True)}
        for name, runs in [*((name, {"": shared[name]}) for name in SHARED), *arms.items()]
        for tuning, own in runs.items()
        for seed in training
    }
    rows: list[dict[str, Any]] = []
    leads: list[dict[str, Any]] = []
    for task, metric in cells[SHARED[0], "", training[0]]:
        drawn: dict[tuple[str, ...], tuple[dict[str, float], Drawn]] = {}

        def of(tuning: list[str], task: str = task, metric: str = metric, drawn: dict = drawn) -> tuple:
            """Return means and resampled means of the shared models and of all arms that have these tuning seeds."""
            if tuple(tuning) not in drawn:
                having = [name for name, runs in arms.items() if set(tuning) <= set(runs)]
                of_models = {
                    name: [[cells[name, key, seed].get((task, metric)) for seed in training] for key in keys]
                    for name, keys in [*((name, [""] * len(tuning)) for name in SHARED), *((n, tuning) for n in having)]
                }
                drawn[tuple(tuning)] = _means(task, of_models), _resampled(task, metric, of_models, resamples)
            return drawn[tuple(tuning)]

        example = cells[SHARED[0], "", training[0]][task, metric]
        higher, clusters = bool(example["higher_is_better"]), len(set(example["sample_clusters"]))
        for against in AGAINST:
            base = "baseline" if against == "final" else "early_stopped"
            common = {"task": task, "metric": metric, "higher_is_better": higher, "against": against}
            for arm, runs in arms.items():
                tuning = sorted(runs)
                means, resampled = of(tuning)
                counts = {"tuning_seeds": len(tuning), "training_seeds": len(training), "clusters": clusters}
                share = _estimate(_share(arm, base, higher), means, resampled, counts)
                rows.append({
                    **common, "arm": arm, **counts,
                    "baseline": means[base], "oracle": means["oracle"], "score": means[arm],
                    **_estimate(_difference(arm, base), means, resampled, counts).columns("delta"),
                    **_estimate(_difference("oracle", base), means, resampled, counts).columns("delta_oracle"),
                    **share.columns("share"),
                })  # fmt: skip
            for control in arms:
                tuning = _common([arms[name] for name in (first, control) if name in arms])
                if control == first or first not in arms or not tuning:
                    continue
                means, resampled = of(tuning)
                counts = {"tuning_seeds": len(tuning), "training_seeds": len(training), "clusters": clusters}
                own, other = _share(first, base, higher), _share(control, base, higher)
                leads.append({
                    **common, "control": control, **counts,
                    **_estimate(_difference(first, control), means, resampled, counts).columns("lead"),
                    **_estimate(lambda m, a=own, b=other: a(m) - b(m), means, resampled, counts).columns("share_lead"),
                })  # fmt: skip
    return rows, leads


def interval(
    value: float, variances: Mapping[str, float], tuning: int, training: int, clusters: int
) -> tuple[float, float, float]:
    """Return standard error, low and high end of the 95% interval about `value`.

    `variances` are those of the resampled figure where "both" kinds of seeds are drawn beside the examples, where
    "training" or "tuning" seeds alone are, and where "neither" is. What c clusters of examples cause counts as
    estimated with c - 1 degrees of freedom, what n training seeds cause with n - 1, what m tuning seeds cause with
    m - 1, and what only both together do with (n - 1)(m - 1).
    """
    examples = variances["neither"]
    parts = {kind: max(variances[kind] - examples, 0.0) for kind in ("training", "tuning")}
    parts["both"] = max(variances["both"] - examples - sum(parts.values()), 0.0)
    degrees = {"training": training - 1, "tuning": tuning - 1, "both": (training - 1) * (tuning - 1)}
    reach = quantile([(examples, clusters - 1), *((part, degrees[kind]) for kind, part in parts.items())])
    error = float(np.sqrt(examples + sum(parts.values())))
    return error, value - reach * error, value + reach * error


def _common(of: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted(set.intersection(*(set(own) for own in of)))


def _difference(arm: str, base: str) -> Any:
    return lambda means: means[arm] - means[base]


def _share(arm: str, base: str, higher: bool) -> Any:
    def share(means: Mapping[str, Any]) -> Any:
        return shares_of_oracle_gain(means[arm] - means[base], means["oracle"] - means[base], higher)

    return share


def _estimate(statistic: Any, means: dict[str, float], drawn: Drawn, counts: Mapping[str, int]) -> Estimate:
    value, resampled = float(statistic(means)), {kind: statistic(of_models) for kind, of_models in drawn.items()}
    if np.isnan(value):
        return Estimate(None)
    if counts["clusters"] < 2:  # One tells nothing of how examples vary.
        return Estimate(value)
    if max(float(np.mean(np.isnan(own))) for own in resampled.values()) > UNDEFINED_SHARE:
        return Estimate(value)
    variances = {kind: float(np.nanvar(own, ddof=1)) for kind, own in resampled.items()}
    return Estimate(
        value, *interval(value, variances, counts["tuning_seeds"], counts["training_seeds"], counts["clusters"])
    )


def _means(task: str, of_models: Mapping[str, list[list[Any]]]) -> dict[str, float]:
    """Return the mean over all runs of every model; raise ValueError where one lacks the task."""
    for name, runs in of_models.items():
        if any(row is None for own in runs for row in own):
            raise ValueError(f"{task}: not scored for every seed of {name}")
    return {name: float(np.mean([[row["value"] for row in own] for own in runs])) for name, runs in of_models.items()}


def _resampled(task: str, metric: str, of_models: Mapping[str, list[list[Any]]], resamples: int) -> Drawn:
    flat = [row for runs in of_models.values() for own in runs for row in own]
    if any(row[name] != flat[0][name] for row in flat for name in ("sample_weights", "sample_clusters")):
        raise ValueError(f"{task} {metric}: the models were not scored on the same examples")
    weights = np.array(flat[0]["sample_weights"], dtype=np.float64)
    values = np.array([[[row["sample_values"] for row in own] for own in runs] for runs in of_models.values()])
    clusters = np.array(flat[0]["sample_clusters"])
    # (models, tuning seeds, training seeds, clusters) and (clusters,)
    sums, weights = sums_by_cluster(values * weights, clusters), sums_by_cluster(weights, clusters)
    tuning, training = sums.shape[1:3]
    random = generator_of(task)
    of_training = random.integers(0, training, (resamples, max(1, training - 1)))
    of_tuning = random.integers(0, tuning, (resamples, max(1, tuning - 1)))
    each = sums.reshape(len(sums), tuning * training, len(weights))
    runs = resampled_means(random, metric, each, weights, resamples)
    runs = runs.reshape(len(sums), resamples, tuning, training)
    every = np.arange(resamples)[:, None, None]
    found = {
        "both": runs[:, every, of_tuning[:, :, None], of_training[:, None, :]].mean(axis=(2, 3)),
        "training": np.take_along_axis(runs.mean(axis=2), of_training[None], axis=2).mean(axis=2),
        "tuning": np.take_along_axis(runs.mean(axis=3), of_tuning[None], axis=2).mean(axis=2),
        "neither": runs.mean(axis=(2, 3)),
    }
    return {kind: dict(zip(of_models, own, strict=True)) for kind, own in found.items()}
