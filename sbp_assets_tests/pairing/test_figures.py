from __future__ import annotations

import polars as pl

from sbp_assets.pairing.figures import histogram, histogram_markdown


def test_histogram_counts_every_similarity() -> None:
    table = histogram(pl.Series([0.0, 0.51, 0.52, 1.0, -0.2], dtype=pl.Float32))
    assert table["pairs"].sum() == 5 and table["pairs"][19] == 1 and table["pairs"][0] == 2
    assert "| 0.500 – 0.550 | 2 |" in histogram_markdown(table)
    assert histogram_markdown(histogram(pl.Series([], dtype=pl.Float32))) == "No pairs."
