"""The assets of synthesis: documents sampled from the synthesizer for every shard, and their tokens."""

from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
import numpy as np
import polars as pl

from sbp_assets.corpus.split import UNIQUE
from sbp_assets.corpus.tokenizer import encode_documents, load_tokenizer, related_id
from sbp_assets.dagster_support.partitions import shards
from sbp_assets.dagster_support.preview import table_preview
from sbp_assets.dagster_support.stage import for_settings
from sbp_assets.pretraining.assets import TOKENIZER, sampled_model
from sbp_assets.settings import Settings
from sbp_assets.storage.artifacts import content_version, staging
from sbp_assets.storage.column_metadata import column_metadata
from sbp_assets.storage.progress import Progress
from sbp_assets.storage.token_arrays import TokenArrays, write_token_arrays
from sbp_assets.synthesis.engine import ENGINES, EngineSpec, Generator, named_with_version
from sbp_assets.synthesis.filter import kept
from sbp_assets.synthesis.generate import DOCUMENT_COLUMNS, TOKEN_COLUMNS, generate_shard, shard_budget
from sbp_assets.synthesis.ledger import Ledger, engine_of_shard, fingerprint
from sbp_assets.synthesis.real_pairs import concatenated_pairs
from sbp_assets.synthesizer.examples import format_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Of the same shard.
DOCUMENTS = dg.AssetIn(["corpus", "documents"])
TOKENS = dg.AssetIn(["corpus", "tokens"])
SYNTHETIC_DOCUMENTS = dg.AssetIn(["synthesis", "synthetic_documents"])


def filtered_by(settings: Settings) -> dict[str, dg.AssetIn]:
    """Return the input that says which synthetic documents are kept out of training; none where there is no filter."""
    if not settings.experiment.synthesis.filter.drops:
        return {}
    return {"filter_decisions": dg.AssetIn(["synthesis", "filter_decisions"], dagster_type=Path)}


def sampled_key(settings: Settings) -> dg.AssetKey:
    """Return the key of the model that synthesis samples from, or of the pairs that it takes instead."""
    return dg.AssetKey.from_coercible(sampled_model(settings).key or [])


def _read_column(settings: Settings) -> str:
    return f"{sampled_key(settings).to_user_string()}.{'weights' if settings.experiment.sampled else 'tokens'}"


@for_settings(
    lambda settings: dg.asset(
        ins={
            "documents": DOCUMENTS,
            "tokens": TOKENS,
            "tokenizer": TOKENIZER,
            "checkpoint": sampled_model(settings),
        },
        partitions_def=shards(settings),
        kinds={"vllm", "huggingface", "parquet"},
        io_manager_key="parquet",
        pool="device",
        code_version=settings.experiment.version(
            "2",
            "synthesis.temperature",
            "synthesis.top_p",
            "synthesis.dtype",
            "synthesis.salt",
            "conditional",
            "pretraining.repetitions",
            "pretraining.synthetic_share",
            "max_document_tokens",
            "model.context_length",
            *([] if settings.experiment.sampled else ["sampled"]),
            # Documents that took turns before the setting existed stay as they are.
            *(["synthesis.seed_order"] if settings.experiment.synthesis.seed_order != "in_turn" else []),
        ),
        metadata=column_metadata(
            DOCUMENT_COLUMNS,
            **dict.fromkeys(
                ("text", "n_tokens", "finish_reason"),
                _read_column(settings) + (" corpus/tokens.tokens" if settings.experiment.conditional else ""),
            ),
            synthesizer_version=_read_column(settings),
        ),
    )
)
def synthetic_documents(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    generator: dg.ResourceParam[Generator],
    documents: pl.LazyFrame,
    tokens: Path,
    tokenizer: Path,
    checkpoint: Path,
) -> dg.MaterializeResult[pl.DataFrame]:
    """Documents sampled from the synthesizer, d2 ~ p(· | d1), one row each; d1 is every document of D in this shard.

    Where synthesis.condition is none, which is a placebo, they are sampled from the first seed's baseline after `<bos>`
    alone, and a seed document is only the number of a sample. Where it is pairs, a control, they are real pairs, d1 and
    d2 in one document, in rounds over the seed documents; where the budget asks for more than there are, all of them
    come again.

    Seed documents take turns, rollout by rollout, or are drawn at random (synthesis.seed_order), until the shard's
    share of the synthetic token budget is reached. Finished samples survive a stopped run: re-materialising the
    partition resumes it.
    """
    loaded = load_tokenizer(tokenizer)
    arrays = TokenArrays.load(tokens)
    seeds = np.flatnonzero(arrays.documents["split"].to_numpy() == UNIQUE)
    ids = arrays.documents["id"].to_list()
    if not settings.experiment.sampled:
        own = [ids[i] for i in seeds]
        return _real_pairs(context, settings, documents, own, arrays.lengths[seeds], loaded, checkpoint)
    related = related_id(loaded)
    prompts = {
        ids[i]: format_prompt(
            arrays.tokens[arrays.offsets[i] : arrays.offsets[i + 1]], related, settings.experiment.max_document_tokens
        )
        if settings.experiment.conditional
        else [loaded.bos_token_id]
        for i in seeds
    }
    lengths = arrays.lengths[seeds]
    sampling, length = settings.experiment.synthesis, settings.experiment.model.context_length
    version = content_version(checkpoint)
    ledgers = Path(settings.deployment.work_dir) / "synthesis" / context.partition_key
    fingerprints = {
        engine: fingerprint(version, sampling, settings.experiment.max_document_tokens, length, engine)
        for engine in ENGINES
    }
    spec = EngineSpec(
        engine=engine_of_shard(ledgers, settings.deployment.generation_engine, fingerprints),
        checkpoint=checkpoint,
        version=version,
        context_length=length,
        dtype=sampling.dtype,
        device=settings.deployment.device,
        processes=settings.deployment.engine_processes,
        max_sequences=settings.deployment.engine_max_sequences,
        gpu_memory_utilization=settings.deployment.gpu_memory_utilization,
    )
    ledger = Ledger(
        ledgers / fingerprints[spec.engine],
        lambda texts: [len(encoded) for encoded in encode_documents(loaded, texts)],
    )
    budget = _budget(settings, lengths)
    done = sum(generation.n_tokens for generation in ledger.finished.values())
    with Progress(f"synthetic_documents {context.partition_key}", "tokens", budget, done) as progress:
        outcome = generate_shard(
            prompts,
            budget,
            float(lengths.mean()) if len(lengths) else 0.0,
            generator,
            spec,
            sampling,
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
        "seed_documents_used": rows["seed_id"].n_unique(),
        "share_stop": round(stops, 4),
        "share_length": round(1 - stops, 4) if len(rows) else 0.0,
        "empty": outcome.empty,
        "discarded": outcome.discarded,
        "resumed": outcome.resumed,
        "engine": named_with_version(spec.engine),
        **progress.metadata(),
        "preview": dg.MetadataValue.md(_preview(rows, documents)),
    }
    if outcome.startup_seconds is not None:
        metadata["engine_startup_seconds"] = round(outcome.startup_seconds, 2)
        metadata["engine_reused"] = bool(outcome.engine_reused)
        # Of sampling alone, so that it can be compared between runs that started engines and runs that did not.
        metadata["tokens_per_second"] = round(outcome.tokens_per_second, 1)
    return dg.MaterializeResult(value=rows, metadata=metadata)


@for_settings(
    lambda settings: dg.asset(
        ins={
            "synthetic_documents": SYNTHETIC_DOCUMENTS,
            "tokenizer": TOKENIZER,
            **filtered_by(settings),
        },
        partitions_def=shards(settings),
        kinds={"huggingface", "numpy"},
        io_manager_key="directory",
        # Without a filter nothing that it depends on has a name.
        code_version=settings.experiment.version("1", *(["synthesis.filter"] if filtered_by(settings) else [])),
        metadata=column_metadata(TOKEN_COLUMNS),
    )
)
def synthetic_tokens(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    synthetic_documents: pl.LazyFrame,
    tokenizer: Path,
    **filter_decisions: Path,
) -> dg.MaterializeResult[Path]:
    """Token arrays of a shard's synthetic documents, encoded from their text: `<bos>` ids `<eos>`.

    Where synthesis.filter drops any, they are left out.
    """
    directory = staging(settings.deployment.work_dir, "synthetic_tokens", context.partition_key)
    loaded = load_tokenizer(tokenizer)
    rows = synthetic_documents.select("id", "seed_id", "text").collect()
    for decisions in filter_decisions.values():
        rows = kept(rows, decisions, context.partition_key)
    with Progress(f"synthetic_tokens {context.partition_key}", "documents", len(rows)) as progress:
        encoded = encode_documents(loaded, rows["text"].to_list())
        total = write_token_arrays(directory, rows.select("id", "seed_id"), encoded, len(loaded))
        progress.advance(len(rows))
    return dg.MaterializeResult(
        value=directory, metadata={"documents": len(rows), "tokens": total, **progress.metadata()}
    )


def _budget(settings: Settings, lengths: np.ndarray) -> int:
    """Return the synthetic tokens of a shard whose documents of D have these `lengths` in tokens."""
    pretraining = settings.experiment.pretraining
    return shard_budget(int(lengths.sum()), pretraining.repetitions, pretraining.synthetic_share)


def _real_pairs(
    context: dg.AssetExecutionContext,
    settings: Settings,
    documents: pl.LazyFrame,
    seeds: list[str],
    lengths: np.ndarray,
    tokenizer: "PreTrainedTokenizerFast",
    examples: Path,
) -> dg.MaterializeResult[pl.DataFrame]:
    """Return the rows of the control in which nothing is sampled (`synthesis.real_pairs`)."""
    budget = _budget(settings, lengths)
    salt, length = settings.experiment.synthesis.salt, settings.experiment.model.context_length
    with Progress(f"synthetic_documents {context.partition_key}", "tokens", budget) as progress:
        rows, pairs = concatenated_pairs(
            examples, seeds, tokenizer, budget, salt, length, content_version(examples), progress
        )
    return dg.MaterializeResult(
        value=rows,
        metadata={
            "dagster/row_count": len(rows),
            "documents": len(rows),
            "tokens": int(rows["n_tokens"].sum()),
            "token_budget": budget,
            "seed_documents": len(seeds),
            "pairs": pairs,
            "passes_over_pairs": round(len(rows) / pairs, 3) if pairs else 0.0,
            "share_cut": float((rows["finish_reason"] == "length").mean() or 0.0),  # type: ignore[arg-type]
            **progress.metadata(),
            "preview": dg.MetadataValue.md(_preview(rows, documents)),
        },
    )


def _preview(rows: pl.DataFrame, documents: pl.LazyFrame, seeds: int = 3, shown: int = 2) -> str:
    """Return a Markdown table of a few seed documents, each beside the first of its synthetic documents."""
    chosen = rows["seed_id"].unique(maintain_order=True).head(seeds)
    real = dict(documents.filter(pl.col("id").is_in(chosen.to_list())).select("id", "text").collect().iter_rows())
    table = []
    for seed_id in chosen:
        texts = rows.filter(pl.col("seed_id") == seed_id)["text"].head(shown).to_list()
        row = {"seed document": seed_id, "text": real.get(seed_id, "")}
        table.append(
            row | {f"synthetic document {i + 1}": text for i, text in enumerate(texts + [""] * (shown - len(texts)))}
        )
    return table_preview(pl.DataFrame(table), max_chars=600) if table else "No synthetic documents."
