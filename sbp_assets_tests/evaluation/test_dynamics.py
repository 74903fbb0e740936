from pathlib import Path

import polars as pl
import pytest

from sbp_assets.evaluation import dynamics


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


def test_check_goes_red() -> None:
    assert not dynamics.dynamics_problems(curves())
    assert "ends at 900" in dynamics.dynamics_problems(curves(sbp=[0, 900]))[0]
    assert "starts at 100" in dynamics.dynamics_problems(curves(oracle=[100, 1000]))[0]
    assert "no measurements of oracle" in dynamics.dynamics_problems(curves(oracle=[]))
    assert "not finite" in dynamics.dynamics_problems(curves().with_columns(heldout_loss=pl.lit(float("nan"))))[0]


def test_plot_has_a_line_per_arm_and_seed() -> None:
    (axes,) = dynamics.plot(curves()).axes
    assert len(axes.lines) == 3 * (2 + 1)
    assert dynamics.png(curves()).startswith(b"\x89PNG")
    svg = dynamics.svg(curves())
    assert svg.startswith("<svg") and "currentColor" in svg and "DOCTYPE" not in svg and "#123456" not in svg
    assert svg == dynamics.svg(curves()), "the same numbers must give the same page"
