"""Intervals over tuning seeds and training seeds, on simulated scores whose law is known."""

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import polars as pl
import pytest

from sbp_assets.evaluation.comparison import compare
from sbp_assets.evaluation.scores import SAMPLES_SCHEMA, score_table, with_samples
from sbp_assets.evaluation.tuning_seeds import compare_arms, interval

TRAINING, TUNING = "012", "01"
EXAMPLES = 30


def scores(values: Sequence[float], metric: str = "nats_per_token", clusters: int | None = None) -> pl.DataFrame:
    rows = [
        ("heldout", metric, n, float(value), 1 + n % 3, n % (clusters or len(values))) for n, value in enumerate(values)
    ]
    samples = pl.DataFrame(rows, schema=SAMPLES_SCHEMA, orient="row")
    return with_samples(score_table(samples), samples)


def world(
    random: np.random.Generator,
    of_tuning: float,
    of_training: float,
    of_both: float = 0.0,
    tuning: str = TUNING,
    metric: str = "nats_per_token",
) -> tuple[dict[str, dict[str, pl.DataFrame]], dict[str, dict[str, dict[str, pl.DataFrame]]]]:
    """Scores of a law: baseline 1, oracle 0, SBP 0.4, control 0.9, with normal effects of these spreads."""
    hard = random.normal(0, 0.3, EXAMPLES)

    def run(mean: float, effect: float) -> pl.DataFrame:
        return scores(mean + effect + hard + random.normal(0, 0.02, EXAMPLES), metric)

    shared = {
        name: {seed: run(mean, random.normal(0, of_training / 2)) for seed in TRAINING}
        for name, mean in (("baseline", 1.0), ("early_stopped", 0.8), ("oracle", 0.0))
    }
    arms = {}
    for name, mean in (("sbp", 0.4), ("control", 0.9)):
        of_seed = {seed: random.normal(0, of_training) for seed in TRAINING}
        arms[name] = {}
        for key in tuning:
            luck = random.normal(0, of_tuning)
            arms[name][key] = {
                seed: run(mean, luck + effect + random.normal(0, of_both)) for seed, effect in of_seed.items()
            }
    return shared, arms


def first_rows(shared: dict, arms: dict, resamples: int = 200) -> tuple[dict, dict]:
    rows, leads = compare_arms(shared, arms, resamples=resamples)
    return rows[0], leads[0]


def inside(row: dict[str, Any], name: str, true: float) -> bool:
    return bool(row[f"{name}_low"] <= true <= row[f"{name}_high"])


def coverage(repetitions: int, **law: Any) -> dict[str, float]:
    """The shares of simulated worlds in which the interval holds the law's delta, share, lead and lead in share."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(repetitions):
        row, lead = first_rows(*world(random, **law), resamples=100)
        found.append((
            inside(row, "delta", -0.6), inside(row, "share", 0.6), inside(lead, "lead", -0.5),
            inside(lead, "share_lead", 0.5),
        ))  # fmt: skip
    return dict(zip(("delta", "share", "lead", "share_lead"), np.mean(found, axis=0), strict=True))


def test_intervals_cover_a_known_variance_of_tuning_seeds() -> None:
    # With 300 worlds each: 90% to 93% here, and 100% where nothing but the examples varies.
    assert min(coverage(25, of_tuning=0.1, of_training=0.0).values()) >= 0.8
    # Of one tuning seed nothing can be known of its luck: that is what a second one is for.
    assert coverage(25, of_tuning=0.1, of_training=0.0, tuning="0")["lead"] < 0.5


def test_the_error_is_that_of_the_means_of_crossed_seeds() -> None:
    random = np.random.default_rng(1)
    # The law's own error of a lead: two arms, each a mean over two tuning seeds and three training seeds.
    true = (2 * (0.1**2 / 2 + 0.2**2 / 3)) ** 0.5
    squares = [first_rows(*world(random, 0.1, 0.2), resamples=100)[1]["lead_stderr"] ** 2 for _ in range(40)]
    assert np.mean(squares) ** 0.5 == pytest.approx(true, rel=0.25)


def test_two_tuning_seeds_alone_ask_for_twelve_standard_errors() -> None:
    alone = {"neither": 0.0, "training": 0.0, "tuning": 4.0, "both": 4.0}
    error, low, high = interval(1.0, alone, 2, 3, 900)
    assert error == 2 and (high - 1) / error == pytest.approx(12.706, abs=0.01) and low == pytest.approx(2 - high)
    known = dict.fromkeys(alone, 4.0)
    assert interval(1.0, known, 2, 3, 100_000)[2] == pytest.approx(1 + 1.96 * 2, abs=0.001)
    assert interval(1.0, known, 2, 3, 5)[2] == pytest.approx(1 + 2.776 * 2, abs=0.001), "few clusters of examples"
    of_training = {**alone, "training": 4.0, "tuning": 0.0}
    assert interval(1.0, of_training, 2, 3, 900)[2] == pytest.approx(1 + 4.303 * 2, abs=0.01)


def test_with_one_tuning_seed_the_comparison_s_own_figures_come_out() -> None:
    shared, arms = world(np.random.default_rng(2), 0.1, 0.1, tuning="0")
    rows, _ = compare_arms(shared, arms, resamples=4000)
    expected = compare({**shared, "sbp": arms["sbp"]["0"]}, 4000).to_dicts()
    for row, own in zip((row for row in rows if row["arm"] == "sbp"), expected, strict=True):
        assert row["against"] == own["against"] and row["share"] == pytest.approx(own["share_of_oracle_gain"])
        for name in ("delta", "delta_low", "delta_high"):
            assert row[name] == pytest.approx(own[name.replace("delta", "delta_sbp")], rel=0.1)
        assert row["delta_oracle"] == pytest.approx(own["delta_oracle"])


def test_a_lead_is_over_the_tuning_seeds_that_both_have() -> None:
    shared, arms = world(np.random.default_rng(3), 0.1, 0.0)
    arms["control"].pop("1")
    rows, leads = compare_arms(shared, arms, resamples=20)
    assert {row["arm"]: row["tuning_seeds"] for row in rows} == {"sbp": 2, "control": 1}
    assert {lead["tuning_seeds"] for lead in leads} == {1}
    first = np.mean([arms["sbp"]["0"][seed]["value"][0] - arms["control"]["0"][seed]["value"][0] for seed in TRAINING])
    assert leads[0]["lead"] == pytest.approx(first)
    # A lead in share is the difference of the shares, here of the same tuning seed.
    assert leads[0]["share_lead"] == pytest.approx(first / rows[0]["delta_oracle"])


def clustered(random: np.random.Generator, clusters: int | None) -> dict[str, Any]:
    """The delta of one seed each: three copies of 20 examples whose effects are normal about -0.6."""
    hard, effect = random.normal(0, 0.3, 20), random.normal(-0.6, 0.2, 20)
    values = {"baseline": hard, "early_stopped": hard, "oracle": hard - 1, "sbp": hard + effect}
    runs = {name: {"0": scores([*own] * 3, clusters=clusters)} for name, own in values.items()}
    return compare_arms(runs, {"sbp": {"0": runs["sbp"]}}, resamples=300)[0][0]


def test_examples_of_a_cluster_are_drawn_together() -> None:
    together, alone = clustered(np.random.default_rng(5), 20), clustered(np.random.default_rng(5), None)
    assert (together["clusters"], alone["clusters"]) == (20, 60) and together["delta"] == pytest.approx(alone["delta"])
    assert together["delta_stderr"] == pytest.approx(3**0.5 * alone["delta_stderr"], rel=0.15)
    one = clustered(np.random.default_rng(6), 1)
    assert one["delta_low"] is None and one["share"] is not None


def test_an_oracle_that_gains_but_rounding_gives_no_share() -> None:
    """The same models in another order: means over the seeds differ in the last bits, in either direction."""
    random = np.random.default_rng(7)
    right = [scores(random.integers(0, 2, 90).astype(float), "acc") for _ in TRAINING]
    same = dict(zip(TRAINING, right, strict=True))
    gains = []
    for order in permutations(right):
        oracle = dict(zip(TRAINING, order, strict=True))
        shared = {"baseline": same, "early_stopped": same, "oracle": oracle}
        row = compare_arms(shared, {"sbp": {"0": same}}, resamples=50)[0][0]
        own = compare({**shared, "sbp": same}, resamples=50).row(0, named=True)
        gains += [row["delta_oracle"], own["delta_oracle"]]
        assert row["share"] is row["share_low"] is own["share_of_oracle_gain"] is own["share_low"] is None
    assert max(gains) > 0 and max(map(abs, gains)) < 1e-12


def test_other_examples_or_missing_scores_are_errors() -> None:
    shared, arms = world(np.random.default_rng(4), 0.0, 0.0)
    with pytest.raises(ValueError, match="no scores of oracle"):
        compare_arms({**shared, "oracle": {}}, arms)
    with pytest.raises(ValueError, match="same examples"):
        compare_arms(shared, {"sbp": {"0": {seed: scores([1.0, 2.0]) for seed in TRAINING}}})
    shuffled = {
        seed: own.with_columns(sample_clusters=pl.lit([0] * EXAMPLES)) for seed, own in arms["sbp"]["0"].items()
    }
    with pytest.raises(ValueError, match="same examples"):
        compare_arms(shared, {"sbp": {"0": shuffled}})
    with pytest.raises(ValueError, match="heldout: not scored for every seed of sbp"):
        compare_arms(shared, {"sbp": {"0": {seed: scores([1.0], "acc") for seed in TRAINING}}})
