"""What a training run's metrics say: loss summary, problems, and the loss curve as a small picture."""

from __future__ import annotations

import base64
import io
import math

import polars as pl


def loss_summary(metrics: pl.DataFrame) -> dict[str, float]:
    """Return the numbers of metrics.parquet for the UI: steps, tokens, final and best losses (nats per token).

    `best_heldout_tokens` is how many tokens had been trained at the lowest held-out loss: well before the end, the
    run overfits. Held-out entries are missing where none was measured.
    """
    last = metrics.row(-1, named=True)
    summary = {
        "steps": int(last["step"]),
        "tokens": int(last["tokens"]),
        "train_loss": float(metrics["train_loss"].drop_nulls()[-1]),
    }
    measured = metrics.drop_nulls("heldout_loss")
    if len(measured):
        best = measured.sort("heldout_loss", "tokens").row(0, named=True)
        summary |= {
            "heldout_loss": float(measured["heldout_loss"][-1]),
            "best_heldout_loss": float(best["heldout_loss"]),
            "best_heldout_tokens": int(best["tokens"]),
        }
    return summary


def loss_problems(metrics: pl.DataFrame) -> list[str]:
    """Return why this run did not train: a loss that is missing or not finite, or did not fall. Empty where it did.

    The loss has fallen where the mean training loss over the last tenth of the steps is below that of the first step.
    """
    trained = metrics.drop_nulls("train_loss")
    if trained.is_empty():
        return ["no training loss was recorded"]
    problems = []
    for column in ("train_loss", "heldout_loss"):
        bad = metrics.filter(pl.col(column).is_not_null() & ~pl.col(column).is_finite())
        if len(bad):
            step, value = bad.select("step", column).row(0)
            problems.append(f"{column} is {value} at step {step}, and not finite at {len(bad)} steps")
    first = trained["train_loss"][0]
    last = trained["train_loss"].tail(max(1, len(trained) // 10)).mean()
    if isinstance(last, float) and math.isfinite(first) and not last < first:
        problems.append(f"training loss did not fall: {first:.4f} at the first step, {last:.4f} over the last ones")
    return problems


def heldout_problems(metrics: pl.DataFrame) -> list[str]:
    """Return why the held-out loss at the end is not below that at the start; empty where it is."""
    measured = metrics.drop_nulls("heldout_loss")
    if len(measured) < 2:
        return [f"held-out loss was measured {len(measured)} times: start and end cannot be compared"]
    first, last = measured["heldout_loss"][0], measured["heldout_loss"][-1]
    return [] if last < first else [f"held-out loss did not fall: {first:.4f} at the start, {last:.4f} at the end"]


def loss_curve(metrics: pl.DataFrame, title: str) -> str:
    """Return a Markdown image (PNG in a data URI) of training and held-out loss against tokens."""
    # The object interface draws without pyplot's global state or a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 2.8), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for column, label, style in (("train_loss", "training", "-"), ("heldout_loss", "held-out", "o-")):
        measured = metrics.drop_nulls(column)
        if len(measured):
            axes.plot(measured["tokens"], measured[column], style, label=label, markersize=3, linewidth=1)
    axes.set(title=title, xlabel="tokens", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return f"![{title}](data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()})"
