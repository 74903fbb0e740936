"""Synthesis at scale: documents sampled from the synthesizer for every shard, their tokens, and their quality."""

from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl

from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.corpus.split import UNIQUE
from sbp_assets.corpus.tokenizer import encode_documents, load_tokenizer, related_id
from sbp_assets.dagster_support.partitions import ALL, shards
from sbp_assets.dagster_support.preview import table_preview
from sbp_assets.dagster_support.stage import for_settings
from sbp_assets.pretraining.assets import sampled_model
from sbp_assets.settings import Settings
from sbp_assets.storage.artifacts import content_version, staging
from sbp_assets.storage.column_metadata import lineage, schema
from sbp_assets.storage.progress import Progress
from sbp_assets.storage.token_arrays import TokenArrays, write_token_arrays
from sbp_assets.synthesis.engine import ENGINES, EngineSpec, Generator, named_with_version
from sbp_assets.synthesis.generate import generate_shard, shard_budget
from sbp_assets.synthesis.judge import SCHEMA as JUDGED_SCHEMA
from sbp_assets.synthesis.judge import Endpoint, judge, judged_rows
from sbp_assets.synthesis.ledger import Ledger, engine_of_shard, fingerprint
from sbp_assets.synthesis.posterior import SCHEMA, posterior_over_shards
from sbp_assets.synthesis.quality import (
    JUDGE,
    REAL,
    SYNTHETIC,
    duplicates_over_shards,
    fixed_sample,
    quality_over_shards,
    quality_rows,
    texts_of,
    with_seeds,
)
from sbp_assets.synthesis.questions import prompts_version, questions, sample_documents
from sbp_assets.synthesizer.examples import format_prompt


def sampled_key(settings: Settings) -> dg.AssetKey:
    """Return the key of the model that synthesis samples from."""
    return dg.AssetKey.from_coercible(sampled_model(settings).key or [])


@for_settings(
    lambda settings: dg.asset(
        ins={
            "documents": dg.AssetIn(["corpus", "documents"]),
            "tokens": dg.AssetIn(["corpus", "tokens"]),
            "tokenizer": dg.AssetIn(["corpus", "tokenizer"]),
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
                    dg.TableColumn(
                        "engine",
                        "string",
                        description="vllm or transformers: what sampled it, the same in a whole shard.",
                    ),
                ]
            ),
            **lineage(
                **dict.fromkeys(("id", "seed_id", "sampling_seed"), "corpus/tokens.id corpus/documents.id"),
                **dict.fromkeys(
                    ("text", "n_tokens", "finish_reason"),
                    f"{sampled_key(settings).to_user_string()}.weights"
                    + (" corpus/tokens.tokens" if settings.experiment.conditional else ""),
                ),
                synthesizer_version=f"{sampled_key(settings).to_user_string()}.weights",
            ),
        },
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

    Where synthesis.condition is none, a placebo, they are sampled from the first seed's baseline after `<bos>` alone,
    and a seed document is only the number of a sample.

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
    budget = shard_budget(
        int(lengths.sum()), settings.experiment.pretraining.repetitions, settings.experiment.pretraining.synthetic_share
    )
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
            "synthetic_documents": dg.AssetIn(["synthesis", "synthetic_documents"]),
            "tokenizer": dg.AssetIn(["corpus", "tokenizer"]),
        },
        partitions_def=shards(settings),
        kinds={"huggingface", "numpy"},
        io_manager_key="directory",
        code_version=settings.experiment.version("1"),
        metadata=schema(
            ("id", "string", "Synthetic document; of documents.parquet."),
            ("seed_id", "string", "The document d1 it was sampled from; of documents.parquet."),
            ("tokens", "array[uint]", "Of tokens.npy: `<bos>` ids `<eos>`."),
        )
        | lineage({"synthesis/synthetic_documents": ("id", "seed_id")}, tokens="synthesis/synthetic_documents.text"),
    )
)
def synthetic_tokens(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    synthetic_documents: pl.LazyFrame,
    tokenizer: Path,
) -> dg.MaterializeResult[Path]:
    """Token arrays of a shard's synthetic documents, encoded anew from their text: `<bos>` ids `<eos>`.

    documents.parquet: id, seed_id.
    """
    directory = staging(settings.deployment.work_dir, "synthetic_tokens", context.partition_key)
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
    ("metric", "string", "Defined in quality_table."),
    ("corpus", "string", "synthetic, or real (documents of D)."),
    ("value", "float", "flagged / scored; null where the metric does not exist or nothing was judged."),
    ("flagged", "int", "Documents (for false_statements: statements) found at fault."),
    ("scored", "int", "Documents (statements) that there is a decision on."),
    ("documents", "int", "Documents scored."),
    ("sample", "int", "Documents drawn; those beyond `documents` are unjudged."),
    (
        "method",
        "string",
        "exact, heuristic (repetition and pair_copying: a threshold on word sequences) or judge (a language model).",
    ),
]
_SYNTHESES_AND_SEEDS = "synthesis/synthetic_documents.text synthesis/synthetic_documents.seed_id corpus/documents.text"
_COUNTS = ("value", "flagged", "scored", "documents", "sample")


@for_settings(
    lambda settings: dg.asset(
        ins={
            "synthetic_documents": dg.AssetIn(["synthesis", "synthetic_documents"]),
            "documents": dg.AssetIn(["corpus", "documents"]),
        },
        partitions_def=shards(settings),
        kinds={"polars", "duckdb", "parquet"},
        io_manager_key="parquet",
        code_version=settings.experiment.version(
            "3", "truth", "corpus.dedup", "pairing.shingle_tokens", "synthesis.quality_sample"
        ),
        metadata=schema(*QUALITY_COLUMNS) | lineage({}, **dict.fromkeys(_COUNTS, _SYNTHESES_AND_SEEDS)),
    )
)
def quality(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    synthetic_documents: pl.LazyFrame,
    documents: pl.LazyFrame,
) -> dg.MaterializeResult[pl.DataFrame]:
    """Quality of a sample of this shard's synthetic documents and, by the same metrics, of its documents of D.

    One row per metric and corpus: repetition, duplicates (within the shard's sample), non_factual, pair_irrelevance,
    pair_copying, and for `concepts` false_statements and no_concept (definitions in quality_table). What only a judge
    can tell is null here: it judges one sample of the whole corpus.
    """
    size = settings.experiment.synthesis.quality_sample
    real = documents.filter(pl.col("split") == UNIQUE)
    samples = {
        name: texts_of(frame, fixed_sample({name: frame.select("id").collect()["id"]}, size).get(name, []), *columns)
        for name, frame, columns in ((SYNTHETIC, synthetic_documents, ("seed_id",)), (REAL, real, ()))
    }
    with Progress("quality", "documents", sum(map(len, samples.values()))) as progress:
        rows = quality_rows(
            with_seeds(samples[SYNTHETIC], real),
            samples[REAL],
            settings.experiment.corpus.dedup,
            settings.experiment.pairing.shingle_tokens,
            ConceptWorld(settings.experiment.truth) if settings.experiment.truth else None,
            staging(settings.deployment.work_dir, "quality", context.partition_key),
            settings.deployment.memory_limit,
        )
        progress.advance(sum(map(len, samples.values())))
    return dg.MaterializeResult(
        value=rows,
        metadata={
            "dagster/row_count": len(rows),
            "sampled_documents": len(samples[SYNTHETIC]),
            **_values(rows),
            **progress.metadata(),
            "preview": dg.MetadataValue.md(table_preview(rows)),
        },
    )


@for_settings(
    lambda settings: dg.asset(
        ins={
            "synthetic_documents": dg.AssetIn(["synthesis", "synthetic_documents"], partition_mapping=ALL),
            "documents": dg.AssetIn(["corpus", "documents"], partition_mapping=ALL),
        },
        kinds={"openai", "parquet"},
        io_manager_key="parquet",
        # Changed wording makes other verdicts, though the revision's name stays.
        code_version=settings.experiment.version("1", "synthesis.judge")
        + (
            f"-{prompts_version(settings.experiment.synthesis.judge.prompts)}"
            if settings.experiment.synthesis.judge
            else ""
        ),
        metadata=schema(
            ("id", "string", "Document that was judged."),
            ("corpus", "string", "synthetic, or real (documents of D)."),
            ("metric", "string", "non_factual, or pair_irrelevance (syntheses only)."),
            ("verdict", "bool", "Whether the judge found that fault; null where unjudged."),
            (
                "unjudged",
                "string",
                "timeout, connection, http_<status>, unparseable, not_asked or client_error; or null.",
            ),
            ("answer", "string", "The judge's words, the last ones where it was asked again."),
            ("prompt_tokens", "int", "As the endpoint counted them, over all answers to this question."),
            ("completion_tokens", "int", "Likewise."),
        )
        | lineage(
            {},
            id="synthesis/synthetic_documents.id corpus/documents.id",
            **dict.fromkeys(
                ("verdict", "unjudged", "answer", "prompt_tokens", "completion_tokens"), _SYNTHESES_AND_SEEDS
            ),
        ),
    )
)
def judgements(
    settings: dg.ResourceParam[Settings],
    judge_endpoint: dg.ResourceParam[Endpoint],
    synthetic_documents: dict[str, pl.LazyFrame],
    documents: dict[str, pl.LazyFrame],
) -> dg.MaterializeResult[pl.DataFrame]:
    """What a language model says of a fixed sample of syntheses and documents of D: one row per document and question.

    Empty where experiment.synthesis.judge is null: nothing is asked. Otherwise deployment.judge_url answers. What it
    failed to answer is unjudged, and asked again when this is materialised again; what it did answer is kept.
    """
    configured = settings.experiment.synthesis.judge
    counts: dict[str, int | float] = {"judged": 0, "unjudged": 0}
    with Progress("judgements", "questions") as progress:
        if configured:
            real = {shard: frame.filter(pl.col("split") == UNIQUE) for shard, frame in documents.items()}
            asked = questions(*sample_documents(synthetic_documents, real, configured.documents), configured)
            progress.total = len(asked)
            ledger = Path(settings.deployment.work_dir) / "judge.jsonl"
            rows, counts = judge(asked, configured, judge_endpoint, ledger, progress)
        else:
            rows = pl.DataFrame(schema=JUDGED_SCHEMA)
    preview = rows.select("metric", "corpus", "verdict", "unjudged", "answer").sample(min(len(rows), 8), seed=0)
    return dg.MaterializeResult(
        value=rows,
        metadata={
            "dagster/row_count": len(rows),
            **counts,
            **progress.metadata(),
            "preview": dg.MetadataValue.md(
                table_preview(preview) if configured else "No judge is configured (experiment.synthesis.judge)."
            ),
        },
    )


@for_settings(
    lambda settings: dg.asset(
        ins={
            "quality": dg.AssetIn(["synthesis", "quality"], partition_mapping=ALL),
            "judgements": dg.AssetIn(["synthesis", "judgements"]),
            "synthetic_documents": dg.AssetIn(["synthesis", "synthetic_documents"], partition_mapping=ALL),
            "documents": dg.AssetIn(["corpus", "documents"], partition_mapping=ALL),
        },
        kinds={"polars", "duckdb", "parquet"},
        io_manager_key="parquet",
        pool="memory",
        code_version=settings.experiment.version("3", "corpus.dedup", "synthesis.duplicate_sample", "synthesis.judge"),
        metadata=schema(*QUALITY_COLUMNS, ("definition", "string", "Of the metric."))
        | lineage(
            {"synthesis/quality": ("metric", "corpus", "method")},
            **{
                name: f"synthesis/quality.{name} synthesis/judgements.verdict synthesis/synthetic_documents.text "
                "corpus/documents.text"
                for name in _COUNTS
            },
        ),
    )
)
def quality_table(
    settings: dg.ResourceParam[Settings],
    quality: dict[str, pl.LazyFrame],
    judgements: pl.LazyFrame,
    synthetic_documents: dict[str, pl.LazyFrame],
    documents: dict[str, pl.LazyFrame],
) -> dg.MaterializeResult[pl.DataFrame]:
    """The five quality metrics over all shards, synthetic beside real: a row per metric, corpus and method.

    Duplicates are those of one fixed sample of all shards together. For `concepts`, two rows more tell what lies behind
    non_factual and pair_irrelevance; with a judge, its verdicts stand beside the exact figures.
    """
    configured = settings.experiment.synthesis.judge
    real = {shard: frame.filter(pl.col("split") == UNIQUE) for shard, frame in documents.items()}
    with Progress("quality_table", "shards", len(quality)) as progress:
        duplicates = duplicates_over_shards(
            {SYNTHETIC: synthetic_documents, REAL: real},
            settings.experiment.synthesis.duplicate_sample,
            settings.experiment.corpus.dedup,
            staging(settings.deployment.work_dir, "quality_table"),
            settings.deployment.memory_limit,
        )
        judged = judged_rows(judgements.collect() if configured else pl.DataFrame(schema=JUDGED_SCHEMA))
        name = f"{configured.model}, prompts {configured.prompts}" if configured else None
        table = quality_over_shards(quality, duplicates, judged if configured else judged.clear(), name)
        progress.advance(len(quality))
    sizes = {corpus: sample for corpus, sample in duplicates.select("corpus", "sample").iter_rows()}
    return dg.MaterializeResult(
        value=table,
        metadata={
            "dagster/row_count": len(table),
            **_values(table),
            **{f"duplicate_sample_{corpus}": size for corpus, size in sizes.items()},
            **progress.metadata(),
            "preview": dg.MetadataValue.md(table_preview(table)),
        },
    )


@for_settings(
    lambda settings: dg.asset(
        ins={
            "synthetic_documents": dg.AssetIn(["synthesis", "synthetic_documents"], partition_mapping=ALL),
            "tokens": dg.AssetIn(["corpus", "tokens"], partition_mapping=ALL),
            "tokenizer": dg.AssetIn(["corpus", "tokenizer"]),
        },
        kinds={"polars", "parquet"},
        io_manager_key="parquet",
        code_version=settings.experiment.version("1", "truth", "max_document_tokens", "conditional"),
        metadata=schema(
            ("group", "string", "Which facts, or concept; see definition."),
            ("statements", "int", "Facts stated, each once per synthesis."),
            ("facts", "int", "Different (concept, attribute) among them."),
            ("seed_documents", "int", "Seed documents whose syntheses state them."),
            ("accuracy", "float", "Share of the statements that are right; null where there are none."),
            ("stderr", "float", "Standard error of accuracy: bootstrap over the seed documents."),
            ("posterior_sampling", "float", "Accuracy expected of values sampled from the exact posterior predictive."),
            ("posterior_mode", "float", "Accuracy of its most probable values: the best that D allows."),
            ("chance", "float", "Accuracy of guessing: one in as many values as the attribute has."),
            (
                "p_above_chance",
                "float",
                "Probability of such an accuracy or a higher one by chance (randomisation test).",
            ),
            ("definition", "string", "Of the group."),
        )
        | lineage(
            **dict.fromkeys(
                [name for name in SCHEMA if name not in ("group", "definition")],
                "synthesis/synthetic_documents.seed_id synthesis/synthetic_documents.text corpus/tokens.tokens",
            )
        ),
    )
)
def posterior_predictive(
    settings: dg.ResourceParam[Settings],
    synthetic_documents: dict[str, pl.LazyFrame],
    tokens: dict[str, Path],
    tokenizer: Path,
) -> dg.MaterializeResult[pl.DataFrame]:
    """The syntheses against the exact Bayesian posterior predictive over D and against chance, one row per group.

    Of the facts that syntheses state: how many are right, by whether d1 states them, D does, or neither (nobody who
    read only D can know those), and whether they are about d1's concept. Empty where the truth is not known.
    """
    source, table = settings.experiment.truth, pl.DataFrame(schema=SCHEMA)
    with Progress("posterior_predictive", "shards", len(tokens)) as progress:
        if source:
            table = posterior_over_shards(
                ConceptWorld(source),
                synthetic_documents,
                tokens,
                load_tokenizer(tokenizer),
                settings.experiment.max_document_tokens,
                settings.experiment.conditional,
                progress,
            )
    measured = table.filter(pl.col("statements") > 0)
    metadata: dict[str, dg.RawMetadataValue] = {
        f"{row['group']}_{name}": row[name]
        for row in measured.iter_rows(named=True)
        for name in ("statements", "accuracy", "posterior_mode", "chance")
    }
    note = "The truth is known of source `concepts` alone: there is nothing to compare with."
    return dg.MaterializeResult(
        value=table,
        metadata={
            "dagster/row_count": len(table),
            **metadata,
            **progress.metadata(),
            "preview": dg.MetadataValue.md(table_preview(table) if source else note),
        },
    )


def _values(rows: pl.DataFrame) -> dict[str, float]:
    """{metric}_{corpus}, and {metric}_{corpus}_judge: numbers that Dagster plots over time."""
    found = rows.filter(pl.col("value").is_not_null()).select("metric", "corpus", "method", "value")
    return {
        f"{metric}_{corpus}" + ("_judge" if method == JUDGE else ""): value
        for metric, corpus, method, value in found.iter_rows()
    }


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
