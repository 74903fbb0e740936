"""The assets of the report: the training curves, and the page that shows the experiment to a person."""

from base64 import b64encode
from pathlib import Path

import dagster as dg
import polars as pl

from sbp_assets.dagster_support.partitions import ALL
from sbp_assets.dagster_support.preview import table_preview
from sbp_assets.dagster_support.stage import for_settings
from sbp_assets.pretraining.budget import ARMS
from sbp_assets.report import dynamics, samples
from sbp_assets.report.page import render
from sbp_assets.settings import Experiment, Settings
from sbp_assets.storage.artifacts import staging
from sbp_assets.storage.column_metadata import column_metadata
from sbp_assets.storage.progress import Progress


@for_settings(
    lambda settings: dg.asset(
        key=["evaluation", "training_dynamics"],
        ins={f"{arm}_model": dg.AssetIn(["pretraining", f"{arm}_model"], partition_mapping=ALL) for arm in ARMS},
        kinds={"polars", "parquet"},
        io_manager_key="parquet",
        code_version=settings.experiment.version("1", "pretraining.seeds"),
        metadata=column_metadata(dynamics.COLUMNS),
    )
)
def training_dynamics(
    baseline_model: dict[str, Path], sbp_model: dict[str, Path], oracle_model: dict[str, Path]
) -> dg.MaterializeResult[pl.DataFrame]:
    """Held-out loss along training, one row per arm, seed and measurement.

    The plot and the means over the seeds are in the metadata.
    """
    with Progress("training dynamics", "rows") as progress:
        table = dynamics.collect(dict(zip(ARMS, (baseline_model, sbp_model, oracle_model), strict=True)))
        progress.advance(len(table))
    image = b64encode(dynamics.png(table)).decode()
    means = dynamics.over_seeds(table)
    stops = dynamics.early_stops(table)
    ends = means.group_by("arm", maintain_order=True).last()
    side_by_side = means.pivot("arm", index="tokens", values="mean").sort("tokens")
    return dg.MaterializeResult(
        value=table,
        metadata={
            "dagster/row_count": len(table),
            **{f"{arm}_final_heldout_loss": loss for arm, loss in ends.select("arm", "mean").iter_rows()},
            **({"baseline_lowest_heldout_loss": float(stops["heldout_loss"].mean())} if len(stops) else {}),  # type: ignore[arg-type]
            **progress.metadata(),
            "mean_over_seeds": dg.MetadataValue.md(table_preview(side_by_side)),
            "plot": dg.MetadataValue.md(f"![held-out loss against training tokens](data:image/png;base64,{image})"),
        },
    )


@for_settings(
    lambda settings: dg.asset(
        key=["evaluation", "report"],
        ins={
            "comparison": dg.AssetIn(["evaluation", "comparison"]),
            "training_dynamics": dg.AssetIn(["evaluation", "training_dynamics"]),
            "token_budget": dg.AssetIn(["pretraining", "token_budget"]),
            "quality_table": dg.AssetIn(["synthesis", "quality_table"]),
            "novelty": dg.AssetIn(["synthesis", "novelty"]),
            "posterior_predictive": dg.AssetIn(["synthesis", "posterior_predictive"]),
            "pair_truth": dg.AssetIn(["pairing", "pair_truth"]),
            "contamination": dg.AssetIn(["evaluation", "contamination"]),
            "neighbor_pairs": dg.AssetIn(["pairing", "neighbor_pairs"], partition_mapping=ALL),
            "documents": dg.AssetIn(["corpus", "documents"], partition_mapping=ALL),
            "synthetic_documents": dg.AssetIn(["synthesis", "synthetic_documents"], partition_mapping=ALL),
        },
        kinds={"jinja", "html"},
        io_manager_key="directory",
        # The page prints all of the experiment.
        code_version=settings.experiment.version("5", *Experiment.model_fields),
    )
)
def report(
    settings: dg.ResourceParam[Settings],
    comparison: pl.LazyFrame,
    training_dynamics: pl.LazyFrame,
    token_budget: pl.LazyFrame,
    quality_table: pl.LazyFrame,
    novelty: pl.LazyFrame,
    posterior_predictive: pl.LazyFrame,
    pair_truth: pl.LazyFrame,
    contamination: pl.LazyFrame,
    neighbor_pairs: dict[str, pl.LazyFrame],
    documents: dict[str, pl.LazyFrame],
    synthetic_documents: dict[str, pl.LazyFrame],
) -> dg.MaterializeResult[Path]:
    """A directory with index.html: the experiment on one self-contained page, for a person to read."""
    directory = staging(settings.deployment.work_dir, "report")
    with Progress("report", "pages", 1) as progress:
        page = render(
            settings.experiment,
            comparison=comparison.collect(),
            dynamics=training_dynamics.collect(),
            token_budget=token_budget.collect(),
            quality=quality_table.collect(),
            novelty=novelty.collect(),
            posterior=posterior_predictive.collect(),
            pair_truth=pair_truth.collect(),
            contamination=contamination.collect(),
            similarities=samples.similarity_counts(neighbor_pairs),
            pairs=samples.example_pairs(neighbor_pairs, documents),
            synthetic=samples.example_synthetic_documents(synthetic_documents, documents),
        )
        (directory / "index.html").write_text(page, encoding="utf-8")
        progress.advance()
    return dg.MaterializeResult(value=directory, metadata={"characters": len(page), **progress.metadata()})
