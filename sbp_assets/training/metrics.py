"""What a training run records of its steps, as metrics.parquet in the model's directory."""

from __future__ import annotations

import polars as pl

from sbp_assets.storage.columns import Column, table_schema

# One row per step, row 0 before any. Losses are nats per supervised token.
METRIC_COLUMNS = [
    Column("step", pl.Int64, "Of metrics.parquet, as all that follow: optimizer steps taken."),
    Column("tokens", pl.Int64, "Tokens trained on so far."),
    Column("train_loss", pl.Float64, "Nats per token."),
    Column("heldout_loss", pl.Float64, "Nats per token; null where not measured."),
    Column("learning_rate", pl.Float64, "At this step."),
    Column("gradient_norm", pl.Float64, "Before clipping."),
]
METRIC_SCHEMA = table_schema(METRIC_COLUMNS)
