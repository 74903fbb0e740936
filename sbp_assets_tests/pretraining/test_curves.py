import base64
import math

import polars as pl
import pytest

from sbp_assets.pretraining.curves import heldout_problems, loss_curve, loss_problems, loss_summary


def metrics(train: list[float | None], heldout: list[float | None]) -> pl.DataFrame:
    steps = list(range(len(train)))
    return pl.DataFrame(
        {"step": steps, "tokens": [64 * step for step in steps], "train_loss": train, "heldout_loss": heldout},
        schema={"step": pl.Int64, "tokens": pl.Int64, "train_loss": pl.Float64, "heldout_loss": pl.Float64},
    )


GOOD = metrics([None, 5.0, 4.0, 3.0], [5.1, None, 4.2, 4.5])


def test_summary_finds_the_best_held_out_loss_and_when_it_was() -> None:
    assert loss_summary(GOOD) == {
        "steps": 3,
        "tokens": 192,
        "train_loss": 3.0,
        "heldout_loss": 4.5,
        "best_heldout_loss": 4.2,
        "best_heldout_tokens": 128,
    }
    assert "heldout_loss" not in loss_summary(metrics([5.0, 4.0], [None, None]))


def test_a_good_run_has_no_problems() -> None:
    assert loss_problems(GOOD) == heldout_problems(GOOD) == []


@pytest.mark.parametrize(
    ("train", "heldout", "problem"),
    [
        ([5.0, math.nan, 3.0], [5.0, None, 4.0], "train_loss is nan at step 1"),
        ([5.0, 4.0, 3.0], [5.0, None, math.inf], "heldout_loss is inf at step 2"),
        ([5.0, 4.0, 5.0], [5.0, None, 4.0], "did not fall"),
        ([None, None], [5.0, 4.0], "no training loss"),
    ],
)
def test_check_sees_a_run_that_did_not_train(
    train: list[float | None], heldout: list[float | None], problem: str
) -> None:
    assert problem in loss_problems(metrics(train, heldout))[0]


@pytest.mark.parametrize(
    ("heldout", "problem"),
    [([5.0, 5.0], "did not fall"), ([5.0, math.nan], "did not fall"), ([5.0, None], "measured 1 times")],
)
def test_check_sees_a_synthesizer_that_did_not_learn(heldout: list[float | None], problem: str) -> None:
    assert problem in heldout_problems(metrics([5.0, 4.0], heldout))[0]


def test_curve_is_a_small_inline_png() -> None:
    image = loss_curve(GOOD, "baseline_model seed 0")
    head, data = image.removesuffix(")").split("base64,")
    assert head == "![baseline_model seed 0](data:image/png;"
    assert base64.b64decode(data)[:4] == b"\x89PNG"
    assert len(data) < 50_000
