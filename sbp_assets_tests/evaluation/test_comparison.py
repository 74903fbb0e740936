from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbp_assets.evaluation.comparison import (
    AGAINST,
    SCORED,
    compare,
    comparison_problems,
    share_of_oracle_gain,
    values_unlike_scores,
)
from sbp_assets.evaluation.scores import SAMPLES_SCHEMA, score_table, with_samples

VALUE = st.floats(0.1, 100, allow_nan=False)
ARMS = ("baseline", "sbp", "oracle")


def scores(
    values: Sequence[float], metric: str = "nats_per_token", task: str = "heldout", clusters: int | None = None
) -> pl.DataFrame:
    rows = [(task, metric, n, float(value), 1 + n % 3, n % (clusters or len(values))) for n, value in enumerate(values)]
    samples = pl.DataFrame(rows, schema=SAMPLES_SCHEMA, orient="row")
    return with_samples(score_table(samples), samples)


def models(**arms: list[pl.DataFrame]) -> dict[str, dict[str, pl.DataFrame]]:
    """{model: {seed: scores}}; the early-stopped baseline is the baseline unless given."""
    every = {"early_stopped": arms["baseline"], **arms}
    return {name: {str(seed): frame for seed, frame in enumerate(frames)} for name, frames in every.items()}


def one_row(values: dict[str, list[float]], higher: bool) -> dict[str, object]:
    metric = "acc" if higher else "nats_per_token"
    table = compare(models(**{arm: [scores([v] * 3, metric) for v in vs] for arm, vs in values.items()}), 50)
    return table.to_dicts()[0]


@settings(deadline=None)
@given(baseline=VALUE, oracle=VALUE, higher=st.booleans())
def test_share_is_one_for_the_oracle_and_zero_for_the_baseline(baseline: float, oracle: float, higher: bool) -> None:
    as_oracle = one_row({"baseline": [baseline], "sbp": [oracle], "oracle": [oracle]}, higher)
    as_baseline = one_row({"baseline": [baseline], "sbp": [baseline], "oracle": [oracle]}, higher)
    if oracle > baseline if higher else oracle < baseline:
        assert as_oracle["share_of_oracle_gain"] == 1
        assert as_baseline["share_of_oracle_gain"] == 0
    else:
        assert as_oracle["share_of_oracle_gain"] is None
        assert as_baseline["share_of_oracle_gain"] is None


@settings(deadline=None)
@given(baseline=VALUE, sbp=VALUE, gain=st.floats(0.01, 10))
def test_share_is_positive_exactly_where_sbp_gains(baseline: float, sbp: float, gain: float) -> None:
    up, down = (share_of_oracle_gain(sbp - baseline, sign * gain, sign > 0) for sign in (1, -1))
    assert up is not None and down is not None
    assert (up > 0) == (sbp > baseline) and (down > 0) == (sbp < baseline)
    assert up == -down


@settings(deadline=None)
@given(st.lists(st.tuples(VALUE, VALUE, VALUE), min_size=1, max_size=4))
def test_means_are_over_the_seeds(values: list[tuple[float, float, float]]) -> None:
    row = one_row({arm: [triple[i] for triple in values] for i, arm in enumerate(ARMS)}, higher=True)
    deltas = pl.Series([sbp - baseline for baseline, sbp, _ in values])
    assert row["seeds"] == len(values)
    assert row["delta_sbp"] == pytest.approx(deltas.mean())


def test_bootstrap_variance_is_that_of_a_mean_over_seeds() -> None:
    baseline, sbp = [1.0, 1.4, 1.1], [0.8, 1.0, 0.7]
    arms = {"baseline": baseline, "sbp": sbp, "oracle": [0.5, 0.5, 0.6]}
    row = compare(models(**{arm: [scores([v] * 3) for v in vs] for arm, vs in arms.items()}), 20_000).to_dicts()[0]
    # Equal examples leave only the seeds: the classical standard error of a mean of three.
    assert row["delta_sbp_stderr"] == pytest.approx(np.std(np.subtract(sbp, baseline), ddof=1) / 3**0.5, rel=0.03)
    assert row["delta_sbp_low"] < row["delta_sbp"] < row["delta_sbp_high"]


def test_intervals_cover_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)

    def covered(spread: float) -> bool:
        baseline = [scores(random.normal(1.0, 0.05, 40)) for _ in range(3)]
        gains = random.normal(0.5, spread, 3)
        sbp = [scores(random.normal(1.0 - gain, 0.05, 40)) for gain in gains]
        oracle = [scores(random.normal(0.0, 0.05, 40)) for _ in range(3)]
        row = compare(models(baseline=baseline, sbp=sbp, oracle=oracle), 200).to_dicts()[0]
        return row["delta_sbp_low"] <= -0.5 <= row["delta_sbp_high"] and row["share_low"] < row["share_high"]

    for spread in (0.0, 0.1):  # nothing but examples, nearly nothing but seeds
        assert sum(covered(spread) for _ in range(30)) >= 26


def test_examples_are_paired_between_arms() -> None:
    hard = np.linspace(0, 5, 200)  # examples differ much, the gain hardly at all
    arms = {"baseline": hard, "sbp": hard - 0.5, "oracle": hard - 1 + 0.01 * np.sin(hard)}
    row = compare(models(**{arm: [scores(list(values))] for arm, values in arms.items()})).to_dicts()[0]
    assert row["sbp_stderr"] > 0.05 and row["delta_sbp_stderr"] < 1e-9
    assert row["share_low"] <= row["share_of_oracle_gain"] <= row["share_high"]
    assert row["share_high"] - row["share_low"] < 0.01


def test_perplexity_is_the_exponential_of_the_resampled_mean() -> None:
    row = compare(models(**{arm: [scores([1, 2, 3, 4], "perplexity")] for arm in ARMS})).to_dicts()[0]
    mean = (1 * 1 + 2 * 2 + 3 * 3 + 4 * 1) / 7
    assert row["baseline"] == pytest.approx(np.exp(mean)) and row["baseline_stderr"] > 1


def test_a_share_of_a_doubtful_gain_has_no_interval() -> None:
    noise = np.random.default_rng(0).normal(size=(2, 30))
    arms = {"baseline": noise[0], "sbp": noise[0], "oracle": noise[0] + noise[1] - noise[1].mean() - 1e-3}
    row = compare(models(**{arm: [scores(list(values))] for arm, values in arms.items()})).to_dicts()[0]
    assert row["share_low"] is None and row["delta_oracle_stderr"] > 0


def test_examples_of_a_cluster_are_drawn_together() -> None:
    """Two copies of 21 examples, each with its own: they are as one, and without clusters as twice as many."""
    values = np.random.default_rng(0).normal(1, 1, 21)

    def error(copies: int, clusters: int | None) -> float:
        arms = {arm: [scores([*values + shift] * copies, clusters=clusters)] for shift, arm in enumerate(ARMS)}
        return compare(models(**arms), 20_000).to_dicts()[0]["baseline_stderr"]

    assert error(2, 21) == pytest.approx(error(1, None), rel=0.03)
    assert error(2, None) == pytest.approx(error(1, None) / 2**0.5, rel=0.03)
    arms = {"baseline": [scores(values)], "sbp": [scores(values, clusters=7)], "oracle": [scores(values)]}
    assert compare(models(**arms)).to_dicts()[0]["delta_sbp_stderr"] is None, "other clusters are other examples"


def test_only_common_seeds_are_compared() -> None:
    four, nine = scores([4.0]), scores([9.0])
    table = compare(models(baseline=[four, nine], sbp=[scores([3.0])], oracle=[scores([2.0])]))
    row = table.to_dicts()[0]
    assert (row["seeds"], row["baseline"], row["share_of_oracle_gain"]) == (1, 4.0, 0.5)


def test_deltas_are_taken_to_both_baselines() -> None:
    arms = {"baseline": 3.0, "early_stopped": 2.5, "sbp": 2.0, "oracle": 1.5}
    table = compare(models(**{name: [scores([value] * 4)] for name, value in arms.items()}))
    assert table["against"].to_list() == list(AGAINST)
    assert table["delta_sbp"].to_list() == [-1.0, -0.5]
    assert table["share_of_oracle_gain"].to_list() == pytest.approx([2 / 3, 1 / 2])


def test_arms_that_were_not_measured_alike_are_found() -> None:
    same = models(**{arm: [scores([1.0, 2.0])] for arm in ARMS})
    assert not comparison_problems(compare(same))
    fewer = comparison_problems(compare({**same, "sbp": {"0": scores([1.0])}}))
    assert "sample counts differ" in fewer[0]
    lacking = {**same, "baseline": {"0": pl.concat([scores([1.0, 2.0]), scores([2.0], task="sciq")])}}
    assert comparison_problems(compare(lacking)) == [
        "sciq nats_per_token against the final baseline: missing for sbp, oracle",
        "sciq nats_per_token against the early-stopped baseline: missing for baseline, sbp, oracle",
    ]
    other_weights = scores([1.0, 2.0]).with_columns(sample_weights=pl.Series([[5, 5]]))
    assert "same examples" in comparison_problems(compare({**same, "sbp": {"0": other_weights}}))[0]
    assert comparison_problems(compare(same).clear())


@pytest.mark.parametrize("name", ["baseline", "delta_sbp", "share_of_oracle_gain", "seeds"])
def test_values_that_the_scores_do_not_give(name: str) -> None:
    arms = {"baseline": 3.0, "early_stopped": 2.5, "sbp": 2.0, "oracle": 1.5}
    of = models(**{arm: [scores([value, 2 * value])] for arm, value in arms.items()})
    table = compare(of)
    assert not values_unlike_scores(table, of)
    assert name in values_unlike_scores(table.with_columns(pl.col(name) * -2), of)[0]
    assert values_unlike_scores(table[1:], of) == ["the scores give other rows: 2, the table has 1"]


def test_a_model_without_scores_is_an_error() -> None:
    with pytest.raises(ValueError, match="oracle"):
        compare({name: {"0": scores([1.0])} for name in SCORED if name != "oracle"})
