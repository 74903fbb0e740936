import math
import re

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbp_assets.evaluation.scores import bootstrap_stderr, score_problems, sums_by_cluster, unscored
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


def test_samples_of_a_cluster_are_drawn_together() -> None:
    rng = np.random.default_rng(7)
    accuracies = rng.integers(0, 2, 400).astype(float)
    copies, ones = np.tile(accuracies, 3), np.ones(1200, dtype=np.int64)
    clusters = np.tile(rng.permutation(400) - 200, 3)
    alone = bootstrap_stderr("acc", accuracies, ones[:400])
    assert bootstrap_stderr("acc", copies, ones, clusters) == pytest.approx(alone, rel=0.1), "copies tell nothing new"
    assert bootstrap_stderr("acc", copies, ones) == pytest.approx(alone / 3**0.5, rel=0.1)
    assert bootstrap_stderr("acc", copies, ones, np.zeros(1200, dtype=int)) is None


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 9)), min_size=1))
def test_sums_by_cluster_are_those_of_polars(rows: list[tuple[int, int]]) -> None:
    table = pl.DataFrame(rows, schema=["cluster", "value"], orient="row")
    expected = table.group_by("cluster").agg(pl.col("value").sum()).sort("cluster")["value"].to_list()
    values, clusters = np.array([table["value"], -table["value"]]), table["cluster"].to_numpy()
    assert sums_by_cluster(values, clusters).tolist() == [expected, [-value for value in expected]]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"value": math.nan}, "finite"),
        ({"value": 1.5}, r"\[0, 1\]"),
        ({"value": 0.75}, "its samples give 0.5"),
        ({"samples": 3}, "the task has 4"),
        ({"sample_values": [1.0], "sample_weights": [1]}, "the task has 4"),
        ({"sample_clusters": [0, 1, 2, 3]}, "not in the clusters"),
        ({"metric": "acc_norm"}, "arc acc is missing"),
    ],
)
def test_problems_of_the_scores_are_found(changed: dict[str, object], reason: str) -> None:
    row = {"task": "arc", "metric": "acc", "value": 0.5, "stderr": 0.1, "samples": 4, "higher_is_better": True,
           "sample_values": [1.0, 0.0, 1.0, 0.0], "sample_weights": [1] * 4,
           "sample_clusters": [0, 0, 1, 1]}  # fmt: skip
    tasks = [Task("arc", 4, 0, ("acc",), rolling=False, clusters=(0, 0, 1, 1))]
    assert not score_problems(pl.DataFrame([row]), tasks)
    problems = score_problems(pl.DataFrame([{**row, **changed}]), tasks)
    assert problems and re.search(reason, " ".join(problems))
    assert unscored(pl.DataFrame([row]), ["arc", "sciq"]) == ["sciq was configured but has no score"]
