"""What the page shows of pairs and documents."""

import polars as pl
import pytest

from sbp_assets.report import samples


def test_histogram_counts_every_pair_once() -> None:
    similarities = [0.70, 0.71, 0.72, 0.80, 0.999]
    counts = samples.similarity_counts({"0": pl.LazyFrame({"similarity": similarities})})
    assert counts["count"].sum() == 5
    assert counts.filter(pl.col("count") > 0)["low"].to_list() == pytest.approx([0.70, 0.72, 0.80, 0.98])
    assert samples.similarity_counts({"0": pl.LazyFrame(schema={"similarity": pl.Float64})}).is_empty()
