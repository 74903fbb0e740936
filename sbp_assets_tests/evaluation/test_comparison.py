import math

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbp_assets.evaluation.comparison import (
    ARMS,
    compare,
    comparison_problems,
    render_markdown,
    render_table,
    share_of_oracle_gain,
)
from sbp_assets.evaluation.suite import SCORES_SCHEMA

VALUE = st.floats(0.1, 100, allow_nan=False)


def scores(value: float, higher: bool = False, samples: int = 10, task: str = "heldout") -> pl.DataFrame:
    row = {"task": task, "metric": "m", "value": value, "stderr": 0.1, "samples": samples, "higher_is_better": higher}
    return pl.DataFrame([row], schema=SCORES_SCHEMA)


def one_row(values: dict[str, list[float]], higher: bool) -> dict[str, object]:
    table = compare({arm: {str(s): scores(v, higher) for s, v in enumerate(vs)} for arm, vs in values.items()})
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
@given(st.lists(st.tuples(VALUE, VALUE, VALUE), min_size=2, max_size=5))
def test_means_and_errors_over_seeds(values: list[tuple[float, float, float]]) -> None:
    row = one_row({arm: [triple[i] for triple in values] for i, arm in enumerate(ARMS)}, higher=True)
    deltas = pl.Series([sbp - baseline for baseline, sbp, _ in values])
    assert row["seeds"] == len(values)
    assert row["delta_sbp"] == pytest.approx(deltas.mean())
    assert row["delta_sbp_stderr"] == pytest.approx(float(deltas.std() or 0) / math.sqrt(len(values)))  # type: ignore[arg-type]


def test_one_seed_keeps_the_sampling_error() -> None:
    row = one_row({"baseline": [3.0], "sbp": [2.5], "oracle": [2.0]}, higher=False)
    assert row["seeds"] == 1 and row["sbp_stderr"] == 0.1
    assert row["delta_sbp_stderr"] == pytest.approx(0.1 * math.sqrt(2))


def test_only_common_seeds_are_compared() -> None:
    table = compare({
        "baseline": {"0": scores(4.0), "1": scores(9.0)}, "sbp": {"0": scores(3.0)}, "oracle": {"0": scores(2.0)},
    })  # fmt: skip
    row = table.to_dicts()[0]
    assert (row["seeds"], row["baseline"], row["share_of_oracle_gain"]) == (1, 4.0, 0.5)


def test_early_stopping_row_takes_each_arms_best() -> None:
    dynamics = pl.DataFrame({
        "arm": ["baseline"] * 2 + ["sbp"] * 2 + ["oracle"] * 2, "seed": ["0"] * 6, "tokens": [1, 2] * 3,
        "heldout_loss": [2.0, 2.6, 2.4, 1.9, 2.2, 1.5],
    })  # fmt: skip
    table = compare({arm: {"0": scores(1.0)} for arm in ARMS}, dynamics)
    row = table.filter(metric="best_nats_per_token").to_dicts()[0]
    assert (row["baseline"], row["sbp"], row["oracle"]) == (2.0, 1.9, 1.5)
    assert row["share_of_oracle_gain"] == pytest.approx(0.2)
    assert not comparison_problems(table)


def test_check_goes_red() -> None:
    same = {arm: {"0": scores(1.0)} for arm in ARMS}
    assert not comparison_problems(compare(same))
    assert "sample counts differ" in comparison_problems(compare({**same, "sbp": {"0": scores(1.0, samples=9)}}))[0]
    lacking = {**same, "baseline": {"0": pl.concat([scores(1.0), scores(2.0, task="sciq")])}}
    assert comparison_problems(compare(lacking)) == ["sciq m: missing for sbp, oracle"]
    assert comparison_problems(compare(same).clear())


def test_an_arm_without_scores_is_an_error() -> None:
    with pytest.raises(ValueError, match="oracle"):
        compare({"baseline": {"0": scores(1.0)}, "sbp": {"0": scores(1.0)}})


def test_rendered_tables_show_every_row() -> None:
    table = compare(
        {arm: {"0": pl.concat([scores(1.0 + i), scores(0.5, True, task="sciq")])} for i, arm in enumerate(ARMS)}
    )
    text, markdown = render_table(table), render_markdown(table)
    assert "Held-out documents" in text and "SciQ" in text and "+1.000" in text and "1 seed." in text
    assert len({len(line) for line in text.splitlines()[1:2]}) == 1
    assert markdown.count("\n") == 3
