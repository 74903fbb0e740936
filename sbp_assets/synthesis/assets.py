"""Synthesis at scale: documents sampled from the synthesizer for every shard, their tokens, and their quality."""

from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl

from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.corpus.split import UNIQUE
from sbp_assets.corpus.tokenizer import encode_documents, load_tokenizer, related_id
from sbp_assets.experiment import ConceptsSource
from sbp_assets.partitions import ALL, DEPLOYMENT, EXPERIMENT, SHARDS
from sbp_assets.storage.artifacts import content_version, staging
from sbp_assets.storage.preview import table_preview
from sbp_assets.storage.progress import Progress
from sbp_assets.storage.token_arrays import TokenArrays, write_token_arrays
from sbp_assets.synthesis.engine import EngineSpec
from sbp_assets.synthesis.generate import Ledger, fingerprint, generate_shard, shard_budget
from sbp_assets.synthesis.quality import fixed_sample, quality_over_shards, quality_rows
from sbp_assets.synthesizer.examples import format_prompt


@dg.asset(
    key=["synthesis", "synthetic_documents"],
    ins={
        "documents": dg.AssetIn(["corpus", "documents"]),
        "tokens": dg.AssetIn(["corpus", "tokens"]),
        "tokenizer": dg.AssetIn(["corpus", "tokenizer"]),
        "checkpoint": dg.AssetIn(["synthesizer", "checkpoint"]),
    },
    partitions_def=SHARDS,
    group_name="synthesis",
    kinds={"vllm", "parquet"},
    io_manager_key="parquet",
    pool="generation",
    code_version=EXPERIMENT.version(
        "1",
        "synthesis.temperature",
        "synthesis.top_p",
        "synthesis.dtype",
        "synthesis.salt",
        "pretraining.repetitions",
        "pretraining.synthetic_share",
        "max_document_tokens",
        "model.context_length",
    ),
    metadata={
        "dagster/column_schema": dg.TableSchema(
            [
                dg.TableColumn("id", "string", description="`syn-{seed_id}-{rollout}`"),
                dg.TableColumn("seed_id", "string", description="The document d1 of D that it was sampled from."),
                dg.TableColumn("rollout", "int", description="0-based number of the synthesis among its seed's."),
                dg.TableColumn("sampling_seed", "int", description="Of this request's random numbers."),
                dg.TableColumn("text", "string"),
                dg.TableColumn(
                    "n_tokens", "int", description="As synthetic_tokens holds it, `<bos>` and `<eos>` included."
                ),
                dg.TableColumn(
                    "finish_reason", "string", description="stop (`<eos>`), or length (the context was full)."
                ),
                dg.TableColumn("synthesizer_version", "string", description="Content of the sampled checkpoint."),
            ]
        )
    },
)
def synthetic_documents(
    context: dg.AssetExecutionContext, documents: pl.LazyFrame, tokens: Path, tokenizer: Path, checkpoint: Path
) -> dg.MaterializeResult[pl.DataFrame]:
    """Documents sampled from the synthesizer, d2 ~ p(· | d1), one row each; d1 is every document of D in this shard.

    Seed documents take turns, rollout by rollout, until the shard's share of the synthetic token budget is reached.
    Finished samples survive a stopped run: running the partition again goes on where it stopped.
    """
    loaded = load_tokenizer(tokenizer)
    arrays = TokenArrays.load(tokens)
    seeds = np.flatnonzero(arrays.documents["split"].to_numpy() == UNIQUE)
    ids = arrays.documents["id"].to_list()
    related = related_id(loaded)
    prompts = {
        ids[i]: format_prompt(
            arrays.tokens[arrays.offsets[i] : arrays.offsets[i + 1]], related, EXPERIMENT.max_document_tokens
        )
        for i in seeds
    }
    lengths = arrays.lengths[seeds]
    settings, length = EXPERIMENT.synthesis, EXPERIMENT.model.context_length
    spec = EngineSpec(
        checkpoint=checkpoint,
        version=content_version(checkpoint),
        context_length=length,
        dtype=settings.dtype,
        device=DEPLOYMENT.device,
        processes=DEPLOYMENT.engine_processes,
        max_sequences=DEPLOYMENT.engine_max_sequences,
        gpu_memory_utilization=DEPLOYMENT.gpu_memory_utilization,
    )
    ledger = Ledger(
        Path(DEPLOYMENT.work_dir)
        / "synthesis"
        / context.partition_key
        / fingerprint(spec.version, settings, EXPERIMENT.max_document_tokens, length),
        lambda texts: [len(encoded) for encoded in encode_documents(loaded, texts)],
    )
    budget = shard_budget(
        int(lengths.sum()), EXPERIMENT.pretraining.repetitions, EXPERIMENT.pretraining.synthetic_share
    )
    done = sum(generation.n_tokens for generation in ledger.finished.values())
    with Progress(f"synthetic_documents {context.partition_key}", "tokens", budget, done) as progress:
        outcome = generate_shard(
            prompts,
            budget,
            float(lengths.mean()) if len(lengths) else 0.0,
            spec,
            settings,
            loaded.eos_token_id,
            ledger,
            progress,
        )
    rows = outcome.rows
    stops = float((rows["finish_reason"] == "stop").mean() or 0.0)  # type: ignore[arg-type]
    metadata: dict[str, dg.RawMetadataValue] = {
        "dagster/row_count": len(rows),
        "documents": len(rows),
        "tokens": int(rows["n_tokens"].sum()),
        "token_budget": budget,
        "seed_documents": len(prompts),
        "rollouts_per_seed": round(outcome.requests / len(prompts), 3) if prompts else 0.0,
        "share_stop": round(stops, 4),
        "share_length": round(1 - stops, 4) if len(rows) else 0.0,
        "empty": outcome.empty,
        "discarded": outcome.discarded,
        "resumed": outcome.resumed,
        **progress.metadata(),
        "preview": dg.MetadataValue.md(_preview(rows, documents)),
    }
    if outcome.startup_seconds is not None:
        metadata["engine_startup_seconds"] = round(outcome.startup_seconds, 2)
        metadata["engine_reused"] = bool(outcome.engine_reused)
        # Of sampling alone, so that it can be compared between runs that started engines and runs that did not.
        metadata["tokens_per_second"] = round(outcome.tokens_per_second, 1)
    return dg.MaterializeResult(value=rows, metadata=metadata)


@dg.asset(
    key=["synthesis", "synthetic_tokens"],
    ins={
        "synthetic_documents": dg.AssetIn(["synthesis", "synthetic_documents"]),
        "tokenizer": dg.AssetIn(["corpus", "tokenizer"]),
    },
    partitions_def=SHARDS,
    group_name="synthesis",
    kinds={"huggingface", "numpy"},
    io_manager_key="directory",
    code_version=EXPERIMENT.version("1"),
)
def synthetic_tokens(
    context: dg.AssetExecutionContext, synthetic_documents: pl.LazyFrame, tokenizer: Path
) -> dg.MaterializeResult[Path]:
    """Token arrays of a shard's synthetic documents, encoded anew from their text: `<bos>` ids `<eos>`.

    documents.parquet: id, seed_id.
    """
    directory = staging(DEPLOYMENT.work_dir, "synthetic_tokens", context.partition_key)
    loaded = load_tokenizer(tokenizer)
    rows = synthetic_documents.select("id", "seed_id", "text").collect()
    with Progress(f"synthetic_tokens {context.partition_key}", "documents", len(rows)) as progress:
        encoded = encode_documents(loaded, rows["text"].to_list())
        total = write_token_arrays(directory, rows.select("id", "seed_id"), encoded, len(loaded))
        progress.advance(len(rows))
    return dg.MaterializeResult(
        value=directory, metadata={"documents": len(rows), "tokens": total, **progress.metadata()}
    )


QUALITY_COLUMNS = [
    dg.TableColumn("metric", "string"),
    dg.TableColumn("corpus", "string", description="synthetic, or real (documents of D)."),
    dg.TableColumn("value", "float", description="Share of documents; null where the metric does not exist."),
    dg.TableColumn("documents", "int", description="Documents scored."),
]


@dg.asset(
    key=["synthesis", "quality"],
    ins={
        "synthetic_documents": dg.AssetIn(["synthesis", "synthetic_documents"]),
        "documents": dg.AssetIn(["corpus", "documents"]),
    },
    partitions_def=SHARDS,
    group_name="synthesis",
    kinds={"polars", "parquet"},
    io_manager_key="parquet",
    code_version=EXPERIMENT.version("1", "truth", "corpus.dedup", "pairing.shingle_tokens", "synthesis.quality_sample"),
    metadata={"dagster/column_schema": dg.TableSchema(QUALITY_COLUMNS)},
)
def quality(synthetic_documents: pl.LazyFrame, documents: pl.LazyFrame) -> dg.MaterializeResult[pl.DataFrame]:
    """Quality of a sample of this shard's synthetic documents and, by the same metrics, of its documents of D.

    One row per metric and corpus: repetition, duplicates, non_factual, pair_irrelevance, pair_copying (definitions
    in quality_table).
    """
    source, size = EXPERIMENT.corpus.source, EXPERIMENT.synthesis.quality_sample
    real = documents.filter(pl.col("split") == UNIQUE).select("id", "text").collect()
    synthetic_ids = fixed_sample(synthetic_documents.select("id").collect()["id"].to_list(), size)
    with Progress("quality", "documents") as progress:
        sample = synthetic_documents.filter(pl.col("id").is_in(synthetic_ids)).select("seed_id", "text").collect()
        seeds = real.select(seed_id="id", seed_text="text")
        rows = quality_rows(
            sample.join(seeds, on="seed_id", how="inner", maintain_order="left"),
            real.filter(pl.col("id").is_in(fixed_sample(real["id"].to_list(), size))),
            EXPERIMENT.corpus.dedup.shingle_words,
            EXPERIMENT.corpus.dedup.threshold,
            EXPERIMENT.pairing.shingle_tokens,
            ConceptWorld(source) if isinstance(source, ConceptsSource) else None,
        )
        progress.advance(len(sample))
    return dg.MaterializeResult(
        value=rows,
        metadata={
            "dagster/row_count": len(rows),
            "sampled_documents": len(sample),
            **_values(rows),
            **progress.metadata(),
            "preview": dg.MetadataValue.md(table_preview(rows)),
        },
    )


@dg.asset(
    key=["synthesis", "quality_table"],
    ins={"quality": dg.AssetIn(["synthesis", "quality"], partition_mapping=ALL)},
    group_name="synthesis",
    kinds={"polars", "parquet"},
    io_manager_key="parquet",
    code_version=EXPERIMENT.version("1"),
    metadata={
        "dagster/column_schema": dg.TableSchema(
            [*QUALITY_COLUMNS, dg.TableColumn("definition", "string", description="Of the metric.")]
        )
    },
)
def quality_table(quality: dict[str, pl.LazyFrame]) -> dg.MaterializeResult[pl.DataFrame]:
    """The five quality metrics over all shards, synthetic beside real: one row per metric and corpus."""
    with Progress("quality_table", "shards", len(quality)) as progress:
        table = quality_over_shards(quality)
        progress.advance(len(quality))
    return dg.MaterializeResult(
        value=table,
        metadata={
            "dagster/row_count": len(table),
            **_values(table),
            **progress.metadata(),
            "preview": dg.MetadataValue.md(table_preview(table)),
        },
    )


def _values(rows: pl.DataFrame) -> dict[str, float]:
    """{metric}_{corpus}: numbers that Dagster plots over time."""
    found = rows.filter(pl.col("value").is_not_null())
    return {f"{metric}_{corpus}": value for metric, corpus, value in found["metric", "corpus", "value"].iter_rows()}


def _preview(rows: pl.DataFrame, documents: pl.LazyFrame, seeds: int = 3, syntheses: int = 2) -> str:
    """A few seed documents, each beside its first two syntheses."""
    chosen = rows["seed_id"].unique(maintain_order=True).head(seeds)
    real = dict(documents.filter(pl.col("id").is_in(chosen.to_list())).select("id", "text").collect().iter_rows())
    table = []
    for seed_id in chosen:
        texts = rows.filter(pl.col("seed_id") == seed_id)["text"].head(syntheses).to_list()
        row = {"seed document": seed_id, "text": real.get(seed_id, "")}
        table.append(
            row | {f"synthesis {i + 1}": text for i, text in enumerate(texts + [""] * (syntheses - len(texts)))}
        )
    return table_preview(pl.DataFrame(table), max_chars=600) if table else "No synthetic documents."
