"""The asset of the filter before training. It is here and not in synthesis because it reads what models are scored on.

It exists only where a criterion of `synthesis.filter` is set.
"""

from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from sbp_assets.corpus.split import UNIQUE
from sbp_assets.dagster_support.partitions import ALL
from sbp_assets.dagster_support.stage import for_settings
from sbp_assets.evaluation.contamination import Comparison, evaluation_items
from sbp_assets.pairing.embed import Embedder
from sbp_assets.pairing.quantizer import Quantizer
from sbp_assets.pretraining.assets import ALL_SYNTHETIC_DOCUMENTS
from sbp_assets.settings import Filter, Settings
from sbp_assets.storage.artifacts import release_staging, staging
from sbp_assets.storage.column_metadata import column_metadata
from sbp_assets.storage.progress import Progress
from sbp_assets.synthesis.filter import DECISION_COLUMNS, write_decisions
from sbp_assets.synthesis.similarity import EMBEDDING_SETTINGS, Similarity

ALL_DOCUMENTS = dg.AssetIn(["corpus", "documents"], partition_mapping=ALL, dagster_type=dict[str, pl.LazyFrame])
KEY = dg.AssetKey(["synthesis", "filter_decisions"])


def _inputs(criteria: Filter) -> dict[str, dg.AssetIn]:
    """Return what the criteria that are set are measured with: nothing else makes the decisions stale."""
    ins = {"synthetic_documents": ALL_SYNTHETIC_DOCUMENTS}
    if criteria.max_copying is not None:
        ins["documents"] = ALL_DOCUMENTS
    if criteria.contamination_words is not None:
        ins["tasks"] = dg.AssetIn(["evaluation", "tasks"], dagster_type=Path)
    if criteria.min_seed_similarity is not None:
        ins["embeddings"] = dg.AssetIn(
            ["pairing", "embeddings"], partition_mapping=ALL, dagster_type=dict[str, pl.LazyFrame]
        )
        ins["quantizer"] = dg.AssetIn(["pairing", "quantizer"], dagster_type=Path)
    return ins


@for_settings(
    lambda settings: (
        dg.asset(
            key=KEY,
            ins=_inputs(settings.experiment.synthesis.filter),
            kinds={"duckdb", "parquet"},
            io_manager_key="directory",
            pool="device",
            code_version=settings.experiment.version(
                "1", "synthesis.filter", "contamination.min_words", "pairing.shingle_tokens", *EMBEDDING_SETTINGS
            ),
            metadata=column_metadata(DECISION_COLUMNS),
        )
        if settings.experiment.synthesis.filter.drops
        else None
    )
)
def filter_decisions(
    settings: dg.ResourceParam[Settings], embedder: dg.ResourceParam[Embedder], **inputs: Any
) -> dg.MaterializeResult[Path]:
    """A directory with a table per shard: which of its synthetic documents are kept out of training, and what for.

    Documents are dropped that repeat themselves, copy D (any document of it), share a run of words with an item of the
    evaluation, or are not about what their seed is about, each only where its setting of synthesis.filter is not null.
    The tokens are made up for by D, so that all arms still read equally many.
    """
    experiment, deployment = settings.experiment, settings.deployment
    criteria, pairing = experiment.synthesis.filter, experiment.pairing
    directory = staging(deployment.work_dir, "filter_decisions")
    scratch = staging(deployment.work_dir, "filter_decisions_measured")
    contaminated = seed_similarity = None
    if "tasks" in inputs:
        limits = experiment.contamination.model_copy(update={"words": criteria.contamination_words})
        contaminated = Comparison(evaluation_items(inputs["tasks"]), limits).sharing
    if "quantizer" in inputs:
        engine = embedder.load(pairing.embedding_model, pairing.embedding_dtype, deployment.device)
        similarity = Similarity(engine, pairing, deployment.embedding_batch_size, Quantizer.load(inputs["quantizer"]))
        seed_similarity = similarity.to_seeds(inputs["embeddings"])
    documents = inputs.get("documents", {})
    with Progress("filter_decisions", "documents") as progress:
        counts = write_decisions(
            directory,
            inputs["synthetic_documents"],
            {shard: frame.filter(pl.col("split") == UNIQUE) for shard, frame in documents.items()},
            criteria,
            pairing.shingle_tokens,
            contaminated,
            seed_similarity,
            scratch,
            deployment.memory_limit,
            progress,
        )
    release_staging(scratch)
    share = counts["dropped_tokens"] / max(counts["tokens"], 1)
    return dg.MaterializeResult(
        value=directory, metadata={**counts, "dropped_token_share": share, **progress.metadata()}
    )
