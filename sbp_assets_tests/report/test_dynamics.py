from pathlib import Path

import polars as pl
import pytest

from sbp_assets.report import dynamics


def curves(**changed: list[int]) -> pl.DataFrame:
    rows = [
        {"arm": arm, "seed": seed, "tokens": tokens, "heldout_loss": 3 - tokens / 1000}
        for arm in dynamics.ARMS
        for seed in "01"
        for tokens in changed.get(arm, [0, 500, 1000])
    ]
    return pl.DataFrame(rows, schema=dynamics.SCHEMA)


def test_collect_reads_measured_points_only(tmp_path: Path) -> None:
    pl.DataFrame({"tokens": [0, 10, 20], "heldout_loss": [5.0, None, 4.0], "step": [0, 1, 2]}).write_parquet(
        tmp_path / "metrics.parquet"
    )
    table = dynamics.collect({"sbp": {"7": tmp_path}})
    assert table.rows() == [("sbp", "7", 0, 5.0), ("sbp", "7", 20, 4.0)]
    with pytest.raises(FileNotFoundError, match="oracle_model"):
        dynamics.collect({"oracle": {"7": tmp_path / "none"}})


def test_problems_of_the_curves_are_found() -> None:
    assert not dynamics.dynamics_problems(curves())
    assert "ends at 900" in dynamics.dynamics_problems(curves(sbp=[0, 900]))[0]
    assert "starts at 100" in dynamics.dynamics_problems(curves(oracle=[100, 1000]))[0]
    assert "no measurements of oracle" in dynamics.dynamics_problems(curves(oracle=[]))
    assert "not finite" in dynamics.dynamics_problems(curves().with_columns(heldout_loss=pl.lit(float("nan"))))[0]


def test_seeds_become_a_mean_and_a_spread() -> None:
    spread = pl.when(pl.col("seed") == "1").then(0.5).otherwise(0.0)
    table = curves(oracle=[0, 1000]).with_columns(pl.col("heldout_loss") + spread)
    means = dynamics.over_seeds(table)
    assert means["arm"].unique(maintain_order=True).to_list() == list(dynamics.ARMS)
    assert means.filter(arm="oracle").rows() == [("oracle", 0, 2, 3.25, 3.0, 3.5), ("oracle", 1000, 2, 2.25, 2.0, 2.5)]
    (axes,) = dynamics.plot(table).axes
    drawn = {line.get_label(): line for line in axes.lines}
    assert drawn["oracle"].get_ydata().tolist() == [3.25, 2.25]
    assert len(axes.collections) == 3, "a band per arm"
    (alone,) = dynamics.plot(table.filter(seed="0")).axes
    assert not alone.collections, "one seed has no spread"


def test_early_stop_is_marked_where_each_seed_of_the_baseline_is_lowest() -> None:
    losses = {("0", 500): 1.0, ("1", 500): 1.5, ("1", 1000): 1.5}
    rows = [(*row[:3], losses.get(row[1:3], row[3]) if row[0] == "baseline" else 0.1) for row in curves().rows()]
    table = pl.DataFrame(rows, schema=dynamics.SCHEMA, orient="row")
    assert dynamics.early_stops(table).rows() == [("baseline", "0", 500, 1.0), ("baseline", "1", 500, 1.5)]
    (axes,) = dynamics.plot(table).axes
    (rings,) = [line for line in axes.lines if line.get_label() == "baseline, stopped early"]
    assert rings.get_xydata().tolist() == [[500, 1.0], [500, 1.5]]


def test_plot_of_nothing_and_plot_for_a_page() -> None:
    assert dynamics.png(curves().clear()).startswith(b"\x89PNG")
    assert dynamics.png(curves()).startswith(b"\x89PNG")
    svg = dynamics.svg(curves())
    assert svg.startswith("<svg") and "currentColor" in svg and "DOCTYPE" not in svg and "#123456" not in svg
    assert svg == dynamics.svg(curves()), "the same numbers must give the same page"
