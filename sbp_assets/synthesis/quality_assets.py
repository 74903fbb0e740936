"""The assets that measure synthetic documents: quality, novelty, a judge's verdicts, the exact posterior."""

from pathlib import Path

import dagster as dg
import polars as pl

from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.corpus.split import HELDOUT, UNIQUE
from sbp_assets.corpus.tokenizer import load_tokenizer
from sbp_assets.dagster_support.partitions import ALL, shards
from sbp_assets.dagster_support.preview import table_preview
from sbp_assets.dagster_support.stage import for_settings
from sbp_assets.pairing.embed import Embedder
from sbp_assets.pairing.quantizer import Quantizer
from sbp_assets.pretraining.assets import ALL_SYNTHETIC_DOCUMENTS, ALL_TOKENS, TOKENIZER
from sbp_assets.settings import Settings
from sbp_assets.storage.artifacts import release_staging, staging
from sbp_assets.storage.column_metadata import column_metadata
from sbp_assets.storage.progress import Progress
from sbp_assets.synthesis.assets import DOCUMENTS, SYNTHETIC_DOCUMENTS
from sbp_assets.synthesis.endpoint import Endpoint
from sbp_assets.synthesis.judge import JUDGEMENT_COLUMNS, JUDGEMENT_SCHEMA, judge, judged_rows
from sbp_assets.synthesis.novelty import NOVELTY_COLUMNS, novelty_table, sampled_similarities, sampled_texts, tracked
from sbp_assets.synthesis.posterior_table import POSTERIOR_COLUMNS, POSTERIOR_SCHEMA, posterior_over_shards
from sbp_assets.synthesis.quality import (
    JUDGE,
    QUALITY_COLUMNS,
    QUALITY_TABLE_COLUMNS,
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
from sbp_assets.synthesis.similarity import EMBEDDING_SETTINGS, Similarity

ALL_DOCUMENTS = dg.AssetIn(["corpus", "documents"], partition_mapping=ALL)


@for_settings(
    lambda settings: dg.asset(
        ins={
            "synthetic_documents": SYNTHETIC_DOCUMENTS,
            "documents": DOCUMENTS,
        },
        partitions_def=shards(settings),
        kinds={"polars", "duckdb", "parquet"},
        io_manager_key="parquet",
        code_version=settings.experiment.version(
            "4", "truth", "corpus.dedup", "pairing.shingle_tokens", "synthesis.quality_sample"
        ),
        metadata=column_metadata(QUALITY_COLUMNS),
    )
)
def quality(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    synthetic_documents: pl.LazyFrame,
    documents: pl.LazyFrame,
) -> dg.MaterializeResult[pl.DataFrame]:
    """Quality of a sample of this shard's synthetic documents and, by the same metrics, of its documents of D.

    One row per metric and corpus (definitions in quality_table); duplicates are those within the shard's sample. What
    only a judge can tell is null here: it judges one sample of the whole corpus.
    """
    size = settings.experiment.synthesis.quality_sample
    real = documents.filter(pl.col("split") == UNIQUE)
    samples = {
        name: texts_of(frame, fixed_sample({name: frame.select("id").collect()["id"]}, size).get(name, []), *columns)
        for name, frame, columns in ((SYNTHETIC, synthetic_documents, ("seed_id",)), (REAL, real, ()))
    }
    scratch = staging(settings.deployment.work_dir, "quality", context.partition_key)
    with Progress("quality", "documents", sum(map(len, samples.values()))) as progress:
        rows = quality_rows(
            with_seeds(samples[SYNTHETIC], real),
            samples[REAL],
            settings.experiment.corpus.dedup,
            settings.experiment.pairing.shingle_tokens,
            ConceptWorld(settings.experiment.ground_truth) if settings.experiment.ground_truth else None,
            scratch,
            settings.deployment.memory_limit,
        )
        progress.advance(sum(map(len, samples.values())))
    release_staging(scratch)
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
            "synthetic_documents": ALL_SYNTHETIC_DOCUMENTS,
            "documents": ALL_DOCUMENTS,
        },
        kinds={"openai", "parquet"},
        io_manager_key="parquet",
        # Changed wording gives other verdicts, though the revision's name stays.
        code_version=settings.experiment.version("1", "synthesis.judge")
        + (
            f"-{prompts_version(settings.experiment.synthesis.judge.prompts)}"
            if settings.experiment.synthesis.judge
            else ""
        ),
        metadata=column_metadata(JUDGEMENT_COLUMNS),
    )
)
def judgements(
    settings: dg.ResourceParam[Settings],
    judge_endpoint: dg.ResourceParam[Endpoint],
    synthetic_documents: dict[str, pl.LazyFrame],
    documents: dict[str, pl.LazyFrame],
) -> dg.MaterializeResult[pl.DataFrame]:
    """What a language model says of a fixed sample of synthetic documents and documents of D.

    There is one row per document and question; none where experiment.synthesis.judge is null, as nothing is asked then.
    Otherwise deployment.judge_url answers. What it failed to answer is unjudged, and is asked again when this asset is
    re-materialised; what it did answer is kept.
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
            rows = pl.DataFrame(schema=JUDGEMENT_SCHEMA)
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
            "synthetic_documents": ALL_SYNTHETIC_DOCUMENTS,
            "documents": ALL_DOCUMENTS,
        },
        kinds={"polars", "duckdb", "parquet"},
        io_manager_key="parquet",
        pool="memory",
        code_version=settings.experiment.version("4", "corpus.dedup", "synthesis.duplicate_sample", "synthesis.judge"),
        metadata=column_metadata(
            QUALITY_TABLE_COLUMNS,
            **dict.fromkeys(("metric", "corpus", "method"), "synthesis/quality"),
            **dict.fromkeys(
                ("value", "flagged", "scored", "documents", "sample"),
                "synthesis/quality synthesis/judgements.verdict synthesis/synthetic_documents.text "
                "corpus/documents.text",
            ),
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
    """The quality metrics over all shards, synthetic beside real: a row per metric, corpus and method.

    Duplicates are those of one fixed sample of all shards together. For `concepts`, two more rows explain non_factual
    and pair_irrelevance; with a judge, its verdicts stand beside the exact figures.
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
        judged = judged_rows(judgements.collect() if configured else pl.DataFrame(schema=JUDGEMENT_SCHEMA))
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
            "synthetic_documents": ALL_SYNTHETIC_DOCUMENTS,
            "documents": ALL_DOCUMENTS,
            "embeddings": dg.AssetIn(["pairing", "embeddings"], partition_mapping=ALL),
            "quantizer": dg.AssetIn(["pairing", "quantizer"], dagster_type=Path),
        },
        kinds={"polars", "huggingface", "parquet"},
        io_manager_key="parquet",
        pool="device",
        code_version=settings.experiment.version(
            "1",
            *EMBEDDING_SETTINGS,
            "pairing.min_similarity",
            "pairing.shingle_tokens",
            "synthesis.quality_sample",
        ),
        metadata=column_metadata(NOVELTY_COLUMNS),
    )
)
def novelty(
    settings: dg.ResourceParam[Settings],
    embedder: dg.ResourceParam[Embedder],
    synthetic_documents: dict[str, pl.LazyFrame],
    documents: dict[str, pl.LazyFrame],
    embeddings: dict[str, pl.LazyFrame],
    quantizer: Path,
) -> dg.MaterializeResult[pl.DataFrame]:
    """A sample of synthetic documents against all of D, beside held-out documents: novel n-grams, copying, lengths.

    N-gram novelty is that of McCoy et al. (2023): the share of n-grams that stand nowhere in D, beside that of real
    documents which no model has read. Copying is the share of a document's n-grams of pairing.shingle_tokens words (the
    paper's pair filter; a shorter document is one n-gram) that stand anywhere in D, and the longest run that does.

    Synthetic documents are also compared, by the embedding model and as pairs are (with pairing.centring), with the
    held-out document nearest to their seed, and with random ones. Held-out documents are sound partners: no model has
    read them, so that a document near to them has not been copied from them.
    """
    pairing, deployment = settings.experiment.pairing, settings.deployment
    size = settings.experiment.synthesis.quality_sample
    engine = embedder.load(pairing.embedding_model, pairing.embedding_dtype, deployment.device)
    similarity = Similarity(engine, pairing, deployment.embedding_batch_size, Quantizer.load(quantizer))
    heldout = {shard: frame.filter(pl.col("split") == HELDOUT) for shard, frame in documents.items()}
    unique = {shard: frame.filter(pl.col("split") == UNIQUE) for shard, frame in documents.items()}
    with Progress("novelty", "documents") as progress:
        written, real = (sampled_texts(frames, size) for frames in (synthetic_documents, heldout))
        similarities = sampled_similarities(synthetic_documents, embeddings, real, similarity, progress)
        texts = (unique[shard].select("text").collect()["text"] for shard in sorted(unique))
        rows = novelty_table(written, real, tracked(texts, progress), pairing.shingle_tokens, similarities)
    measured = rows.filter(pl.col("mean").is_not_null()).select("measure", "words", "corpus", "mean")
    return dg.MaterializeResult(
        value=rows,
        metadata={
            "dagster/row_count": len(rows),
            **{
                f"{measure}_{corpus}" + (f"_{words}" if measure == "novel_ngrams" else ""): mean
                for measure, words, corpus, mean in measured.iter_rows()
            },
            **progress.metadata(),
            "preview": dg.MetadataValue.md(table_preview(rows.drop("definition"))),
        },
    )


@for_settings(
    lambda settings: dg.asset(
        ins={
            "synthetic_documents": ALL_SYNTHETIC_DOCUMENTS,
            "tokens": ALL_TOKENS,
            "tokenizer": TOKENIZER,
        },
        kinds={"polars", "parquet"},
        io_manager_key="parquet",
        code_version=settings.experiment.version("1", "truth", "max_document_tokens", "conditional"),
        metadata=column_metadata(POSTERIOR_COLUMNS),
    )
)
def posterior_predictive(
    settings: dg.ResourceParam[Settings],
    synthetic_documents: dict[str, pl.LazyFrame],
    tokens: dict[str, Path],
    tokenizer: Path,
) -> dg.MaterializeResult[pl.DataFrame]:
    """The synthetic documents against the exact Bayesian posterior predictive over D, and against chance.

    One row per group says how many of the facts that synthetic documents state are right. Facts are grouped by whether
    d1 states them, D does, or neither (nobody who read only D can know those), and by whether they are about d1's
    concept. There are no rows where the ground truth is not known.
    """
    source, table = settings.experiment.ground_truth, pl.DataFrame(schema=POSTERIOR_SCHEMA)
    with Progress("posterior_predictive", "shards", len(tokens)) as progress:
        if source:
            scratch = staging(settings.deployment.work_dir, "posterior_predictive")
            table = posterior_over_shards(
                ConceptWorld(source),
                synthetic_documents,
                tokens,
                load_tokenizer(tokenizer),
                settings.experiment.max_document_tokens,
                scratch,
                settings.deployment.memory_limit,
                settings.experiment.conditional,
                progress,
            )
            release_staging(scratch)
    measured = table.filter(pl.col("statements") > 0)
    metadata: dict[str, dg.RawMetadataValue] = {
        f"{row['group']}_{name}": row[name]
        for row in measured.iter_rows(named=True)
        for name in ("statements", "accuracy", "posterior_mode", "chance")
    }
    note = "The ground truth is known of source `concepts` alone: there is nothing to compare with."
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
    """Return {metric}_{corpus}, and {metric}_{corpus}_judge: numbers that Dagster plots over time."""
    found = rows.filter(pl.col("value").is_not_null()).select("metric", "corpus", "method", "value")
    return {
        f"{metric}_{corpus}" + ("_judge" if method == JUDGE else ""): value
        for metric, corpus, method, value in found.iter_rows()
    }
