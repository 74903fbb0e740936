"""Training dynamics: held-out loss against training tokens, three arms, their means and spread over the seeds."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from sbp_assets.pretraining.budget import ARMS
from sbp_assets.storage.columns import Column, table_schema
from sbp_assets.storage.paths import read_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _of_models(column: str) -> str:
    return " ".join(f"pretraining/{arm}_model.{column}" for arm in sorted(ARMS))


COLUMNS = (
    Column("arm", pl.String, "baseline, sbp or oracle"),
    Column("seed", pl.String, "Training seed"),
    Column("tokens", pl.Int64, "Training tokens read so far", _of_models("tokens")),
    Column("heldout_loss", pl.Float64, "Mean loss on held-out documents, nats per token", _of_models("heldout_loss")),
)
SCHEMA = table_schema(COLUMNS)
# Okabe-Ito: told apart under the common colour-vision deficiencies; dashes and labels tell them apart without colour.
STYLES = {"baseline": ("#D55E00", "--"), "sbp": ("#0072B2", "-"), "oracle": ("#009E73", "-.")}
LABELS = {"baseline": "baseline", "sbp": "SBP", "oracle": "oracle"}


def collect(models: Mapping[str, Mapping[str, Path]]) -> pl.DataFrame:
    """Return the held-out losses measured along training, in nats per token, from {arm: {seed: model directory}}.

    The table (COLUMNS) has a row per arm, seed and measurement, read from each directory's metrics.parquet. Raises
    FileNotFoundError when a directory has none.
    """
    frames = []
    for arm, seeds in models.items():
        for seed, directory in seeds.items():
            path = directory / "metrics.parquet"
            if not path.is_file():
                raise FileNotFoundError(f"{path} does not exist: re-materialise pretraining/{arm}_model")
            frames.append(
                read_table(path, columns=["tokens", "heldout_loss"])
                .drop_nulls()
                .select(
                    arm=pl.lit(arm), seed=pl.lit(seed), tokens=pl.col("tokens").cast(pl.Int64),
                    heldout_loss=pl.col("heldout_loss").cast(pl.Float64),
                )
                .sort("tokens")
            )  # fmt: skip
    return pl.concat(frames) if frames else pl.DataFrame(schema=SCHEMA)


def dynamics_problems(table: pl.DataFrame) -> list[str]:
    """Return why the curves cannot be compared: an arm is absent, token counts differ, or a loss is not finite."""
    problems = [f"no measurements of {arm}" for arm in ARMS if arm not in set(table["arm"])]
    ends = (
        table.group_by("arm", "seed").agg(first=pl.col("tokens").min(), last=pl.col("tokens").max()).sort("arm", "seed")
    )
    for column, verb in (("first", "starts"), ("last", "ends")):
        if ends[column].n_unique() > 1:
            counts = ", ".join(
                f"{row['arm']} seed {row['seed']} {verb} at {row[column]:,}" for row in ends.iter_rows(named=True)
            )
            problems.append(f"token counts differ: {counts}")
    if bad := table.filter(~pl.col("heldout_loss").is_finite()).height:
        problems.append(f"{bad} held-out losses are not finite")
    return problems


def over_seeds(table: pl.DataFrame) -> pl.DataFrame:
    """Return the mean, lowest and highest loss over the seeds, in nats per token, in order of arm and tokens.

    The columns are arm, tokens, seeds (their number), mean, low and high.
    """
    loss = pl.col("heldout_loss")
    return (
        table.group_by("arm", "tokens")
        .agg(seeds=pl.len().cast(pl.Int64), mean=loss.mean(), low=loss.min(), high=loss.max())
        .sort(pl.col("arm").cast(pl.Enum(ARMS)), "tokens")
    )


def early_stops(table: pl.DataFrame) -> pl.DataFrame:
    """Return the rows at which early stopping would keep the baseline: each seed's lowest loss, the first of equals."""
    return (
        table.filter(arm="baseline")
        .sort("heldout_loss", "tokens")
        .unique("seed", keep="first", maintain_order=True)
        .sort("seed")
    )


def plot(table: pl.DataFrame, ink: str = "#333333") -> Figure:
    """Return a plot of held-out loss (nats per token) against tokens: means over seeds, bands from lowest to highest.

    Rings are where early stopping would keep the baseline, one per seed. `ink` is the colour of text and axes.
    """
    # The object interface draws without pyplot's global state or a display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    for (arm,), rows in over_seeds(table).group_by("arm", maintain_order=True):
        colour, dashes = STYLES[str(arm)]
        if rows["seeds"].max() > 1:  # type: ignore[operator]
            axes.fill_between(rows["tokens"], rows["low"], rows["high"], color=colour, alpha=0.22, linewidth=0)
        axes.plot(rows["tokens"], rows["mean"], dashes, color=colour, linewidth=2, label=LABELS[str(arm)])
    if len(stops := early_stops(table)):
        axes.plot(
            stops["tokens"], stops["heldout_loss"], "o", color=STYLES["baseline"][0], fillstyle="none", markersize=7,
            markeredgewidth=1.5, label="baseline, stopped early",
        )  # fmt: skip
    axes.set_xlabel("training tokens", color=ink)
    axes.set_ylabel("held-out loss, nats per token", color=ink)
    axes.tick_params(colors=ink, length=3)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(ink)
    axes.grid(axis="y", color=ink, alpha=0.12, linewidth=0.8)
    late = pl.concat([table.filter(pl.col("tokens") >= 0.1 * pl.col("tokens").max()), stops])["heldout_loss"]
    if len(late) > 1 and late.max() > late.min():  # type: ignore[operator]
        # The fall from the untrained model would flatten everything that sets the arms apart.
        low, high = float(late.min()), float(late.max())  # type: ignore[arg-type]
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    if not table.is_empty():
        axes.legend(frameon=False, labelcolor=ink, handlelength=3)
    return figure


def png(table: pl.DataFrame) -> bytes:
    """Return the plot as the bytes of a PNG on white."""
    figure = plot(table)
    figure.patch.set(alpha=1, facecolor="white")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def svg(table: pl.DataFrame) -> str:
    """Return the plot as an SVG element: transparent, ink in the page's text colour, arms in its CSS colours --arm-*.

    The text is the same for the same table. It names no external address.
    """
    import matplotlib

    sentinel = "#123456"
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sbp", "font.family": "sans-serif"}):
        plot(table, ink=sentinel).savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    # From the element on: the XML declaration and doctype do not belong in a page, and name an external address.
    text = text[text.index("<svg") :]
    metadata_start, metadata_end = text.find("<metadata>"), text.find("</metadata>")
    if metadata_start >= 0:
        text = text[:metadata_start] + text[metadata_end + len("</metadata>") :]
    for arm, (colour, _) in STYLES.items():
        text = text.replace(colour.lower(), f"var(--arm-{arm}, {colour})")
    return text.replace(sentinel, "currentColor")
