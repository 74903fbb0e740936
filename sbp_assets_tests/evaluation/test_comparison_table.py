"""The comparison as text and as markdown."""

import polars as pl

from sbp_assets.evaluation.comparison import compare
from sbp_assets.evaluation.comparison_table import render_markdown, render_table
from sbp_assets_tests.evaluation.test_comparison import ARMS, models, scores


def test_rendered_tables_show_every_row() -> None:
    both = [pl.concat([scores([1.0 + i, 2.0]), scores([0, 1], "acc", "sciq")]) for i in range(3)]
    table = compare(models(**{arm: [frame] for arm, frame in zip(ARMS, both, strict=True)}))
    text, markdown = render_table(table), render_markdown(table)
    assert "Held-out documents" in text and "SciQ" in text and "early-stopped" in text and "1 seed." in text
    assert markdown.count("\n") == 1 + len(table)


def test_dashes_are_explained_where_there_are_any() -> None:
    same = models(**{arm: [scores([1.0, 2.0])] for arm in ARMS})
    assert "–: not defined" in render_table(compare(same)), "the same scores have no share of a gain"
    gains = {"baseline": 3.0, "early_stopped": 2.5, "sbp": 2.0, "oracle": 1.5}
    assert "–" not in render_table(compare(models(**{arm: [scores([value] * 4)] for arm, value in gains.items()})))
