import math
import re

import numpy as np
import polars as pl
import pytest

from sbp_assets.evaluation.scores import bootstrap_stderr, score_problems, unscored
from sbp_assets.evaluation.tasks import Task


def test_standard_errors_resample_documents() -> None:
    rng = np.random.default_rng(7)
    accuracies, ones = rng.integers(0, 2, 400).astype(float), np.ones(400, dtype=np.int64)
    of_the_mean = accuracies.std(ddof=1) / 20
    assert bootstrap_stderr("acc", accuracies, ones) == pytest.approx(of_the_mean, rel=0.1)
    assert bootstrap_stderr("acc", accuracies, ones) == bootstrap_stderr("acc", accuracies, ones)
    losses = rng.normal(3, 0.2, 400)
    perplexity = bootstrap_stderr("perplexity", losses, ones)
    assert perplexity == pytest.approx(math.exp(3) * losses.std(ddof=1) / 20, rel=0.15), "delta method"
    assert bootstrap_stderr("acc", accuracies[:1], ones[:1]) is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"value": math.nan}, "finite"),
        ({"value": 1.5}, r"\[0, 1\]"),
        ({"value": 0.75}, "its samples give 0.5"),
        ({"samples": 3}, "the task has 4"),
        ({"sample_values": [1.0], "sample_weights": [1]}, "the task has 4"),
        ({"metric": "acc_norm"}, "arc acc is missing"),
    ],
)
def test_problems_of_the_scores_are_found(changed: dict[str, object], reason: str) -> None:
    row = {"task": "arc", "metric": "acc", "value": 0.5, "stderr": 0.1, "samples": 4, "higher_is_better": True,
           "sample_values": [1.0, 0.0, 1.0, 0.0], "sample_weights": [1] * 4}  # fmt: skip
    tasks = [Task("arc", 4, 0, ("acc",), rolling=False)]
    assert not score_problems(pl.DataFrame([row]), tasks)
    problems = score_problems(pl.DataFrame([{**row, **changed}]), tasks)
    assert problems and re.search(reason, " ".join(problems))
    assert unscored(pl.DataFrame([row]), ["arc", "sciq"]) == ["sciq was configured but has no score"]
