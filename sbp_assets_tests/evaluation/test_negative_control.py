"""The negative control's check: floors against models of known loss, and planted gains, which must fail it."""

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from sbp_assets.corpus.five_tokens import LETTERS, MIN_LETTERS, document, end_probability, surprisal
from sbp_assets.evaluation.checks import negative_control_shows_no_gain
from sbp_assets.evaluation.negative_control import Floor, judge, measured_floor, scored_floor
from sbp_assets.evaluation.task_files import write_tasks
from sbp_assets.pretraining.budget import ARMS
from sbp_assets.settings import FiveTokensSource
from sbp_assets.storage.token_arrays import write_token_arrays
from sbp_assets_tests.tiny import tiny_settings

SOURCE = FiveTokensSource(documents=300, tokens_per_document=48)
TEXTS = [document(SOURCE, number)["text"] for number in range(SOURCE.documents)]
LENGTHS = [len(text.split()) + 2 for text in TEXTS]
SCORED, MEASURED = scored_floor(TEXTS), measured_floor(SOURCE, LENGTHS, 10**9)
CHANCE = MEASURED.allowed(9)


def comparison(**excess: float) -> pl.DataFrame:
    finals = {arm: SCORED.nats + excess.get(arm, 0.02) for arm in ARMS}
    rows = [
        {"task": "heldout", "metric": "nats_per_token", "against": "final", **finals},
        {"task": "heldout", "metric": "nats_per_token", "against": "early_stopped", **finals,
            "baseline": SCORED.nats + excess.get("early_stopped", 0.01)},
        {"task": "heldout", "metric": "bits_per_byte", "against": "final", **dict.fromkeys(ARMS, 0.0)},
    ]  # fmt: skip
    return pl.DataFrame(rows)


def dynamics(**lowest: float) -> pl.DataFrame:
    curves = {arm: (1.0, lowest.get(arm, 0.001), 0.05) for arm in ARMS}
    return pl.DataFrame([
        {"arm": arm, "seed": "0", "tokens": tokens, "heldout_loss": MEASURED.nats + excess}
        for arm, curve in curves.items()
        for tokens, excess in enumerate(curve)
    ])  # fmt: skip


def verdict(table: pl.DataFrame, curves: pl.DataFrame) -> list[str]:
    return judge(table, curves, SCORED, MEASURED).problems


def test_the_floor_is_the_loss_of_the_true_distribution_on_the_same_tokens() -> None:
    assert math.log(5) == SCORED.nats
    assert SCORED.tokens == sum(LENGTHS) - 2 * len(LENGTHS)
    assert MEASURED.tokens == sum(LENGTHS) - len(LENGTHS)
    assert MEASURED.nats * MEASURED.tokens == pytest.approx(sum(surprisal(SOURCE, n - 2) for n in LENGTHS))


def test_a_document_that_the_measurement_cuts_counts_as_far_as_it_is_read() -> None:
    # <bos> and 20 letters of a document of 30: its end is not among the labels.
    floor = measured_floor(SOURCE, [32], max_tokens=20)
    assert floor.tokens == 20
    assert floor.nats * 20 == pytest.approx(surprisal(SOURCE, 20, ended=False))
    # All letters but not the end; then all; then the next document's <bos>, which nothing predicts.
    assert measured_floor(SOURCE, [32], 30).nats * 30 == pytest.approx(surprisal(SOURCE, 30, ended=False))
    assert measured_floor(SOURCE, [32, 40], 31) == measured_floor(SOURCE, [32, 40], 32)
    assert measured_floor(SOURCE, [32, 40], 33).tokens == 32
    with pytest.raises(ValueError, match="heldout_tokens"):
        measured_floor(SOURCE, [], 10)


def test_no_model_gets_below_the_floor_by_more_than_chance() -> None:
    """Models of all kinds of wrongness, tried on as many letters: the lowest stays within what chance is allowed."""
    rng = np.random.default_rng(0)
    letters = np.array([LETTERS.index(letter) for text in TEXTS for letter in text.split()])
    models = np.concatenate([rng.dirichlet([scale] * 5, 200) for scale in (3, 100, 1e4, 1e6)])
    losses = -np.log(models)[:, letters].mean(axis=1)
    assert losses.min() > SCORED.nats - SCORED.allowed(len(models))
    # The allowance is not idle: some do get below.
    assert losses.min() < SCORED.nats


def test_a_run_at_the_floor_passes() -> None:
    found = judge(comparison(), dynamics(sbp=0.0008, baseline=0.0012), SCORED, MEASURED)
    assert found.problems == []
    assert found.numbers["sbp_gain"] == pytest.approx(0.0004)
    assert found.numbers["scored_excess_of_early_stopped"] == pytest.approx(0.01)
    # The baseline memorises more than SBP: no gain over the early-stopped baseline.
    assert verdict(comparison(baseline=0.5), dynamics()) == []


@pytest.mark.parametrize("model", [*ARMS, "early_stopped"])
def test_a_score_below_the_entropy_fails(model: str) -> None:
    slack = SCORED.allowed(4)
    assert verdict(comparison(**{model: -0.9 * slack}), dynamics()) == []
    (problem,) = verdict(comparison(**{model: -1.1 * slack}), dynamics())
    assert problem.startswith(f"{model}, scored") if model != "early_stopped" else "early stopped, scored" in problem


def test_a_loss_below_the_entropy_along_training_fails() -> None:
    assert verdict(comparison(), dynamics(oracle=-0.9 * CHANCE)) == []
    (problem,) = verdict(comparison(), dynamics(oracle=-1.1 * CHANCE))
    assert "oracle, along training" in problem


def test_a_planted_gain_fails_though_no_arm_is_below_the_entropy() -> None:
    (problem,) = verdict(comparison(), dynamics(baseline=0.04, sbp=0.0))
    assert "SBP's lowest loss" in problem
    assert verdict(comparison(), dynamics(baseline=0.0, sbp=0.04)) == []


def test_missing_losses_and_losses_that_are_no_number_fail() -> None:
    assert verdict(comparison(), dynamics().filter(pl.col("arm") != "sbp")) == ["no held-out loss of sbp"]
    assert verdict(comparison().clear(), dynamics())
    assert any("sbp, scored" in problem for problem in verdict(comparison(sbp=math.nan), dynamics()))


def test_chance_shrinks_with_tokens_and_grows_with_losses() -> None:
    assert Floor(1000, 1.6).allowed(1) == pytest.approx(math.log(1000) / 1000)
    assert Floor(2000, 1.6).allowed(1) < Floor(1000, 1.6).allowed(1) < Floor(1000, 1.6).allowed(9)
    assert end_probability(SOURCE) == 1 / (48 - MIN_LETTERS + 1)


def test_the_check_takes_its_floors_from_the_tokens_that_the_run_measured(tmp_path: Path) -> None:
    names = pl.DataFrame({"id": [f"d{number}" for number in range(len(TEXTS))], "text": TEXTS})
    tokens, tasks = tmp_path / "tokens", tmp_path / "tasks"
    tasks.mkdir()
    write_tasks(tasks, names)
    splits = names.select("id", split=pl.when(pl.int_range(pl.len()) % 2 == 0).then(pl.lit("heldout")).otherwise(None))
    write_token_arrays(tokens, splits, (np.zeros(length, np.int64) for length in LENGTHS), 10)
    settings = tiny_settings(tmp_path, {"experiment.corpus.source": SOURCE})
    floor = measured_floor(SOURCE, LENGTHS[::2], settings.experiment.pretraining.heldout_tokens)
    check = negative_control_shows_no_gain.function

    def evaluated(below: float):
        curves = dynamics(baseline=floor.nats - MEASURED.nats, sbp=floor.nats - MEASURED.nats - below)
        return check(settings, comparison().lazy(), curves.lazy(), tokens={"00000": tokens}, tasks_dir=tasks)

    assert evaluated(0).passed
    assert evaluated(0).metadata["lowest_along_training_tokens"].value == floor.tokens
    assert evaluated(0).metadata["scored_tokens"].value == SCORED.tokens
    assert not evaluated(2 * floor.allowed(9)).passed
