"""Evaluation: the tasks, the arms' scores, their contamination and their comparison."""

from pathlib import Path

import dagster as dg
import polars as pl

from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.dagster_support.partitions import ALL, seeds
from sbp_assets.dagster_support.preview import table_preview
from sbp_assets.dagster_support.stage import ForSettings, for_settings
from sbp_assets.evaluation import benchmarks, contamination, suite, task_files, tasks
from sbp_assets.evaluation.comparison import SCORED, Scored, compare, seed_count, with_samples
from sbp_assets.evaluation.comparison_table import render_markdown
from sbp_assets.pretraining.budget import ARMS
from sbp_assets.settings import Settings
from sbp_assets.storage.artifacts import staging
from sbp_assets.storage.column_metadata import lineage, schema
from sbp_assets.storage.progress import Progress
from sbp_assets.training.checkpoint import best_model

SCORE_COLUMNS = [
    dg.TableColumn("task", "string", "heldout, concept_questions, or a stock benchmark"),
    dg.TableColumn(
        "metric",
        "string",
        "perplexity is per token: of the text (heldout, openwebtext2), of the right answer (mmlu, concept_questions); "
        "of lambada, per last word. nats_per_token is its logarithm. bits_per_byte does not depend on the tokenizer",
    ),
    dg.TableColumn("value", "float", "The score; accuracies in [0, 1]"),
    dg.TableColumn("stderr", "float", "Standard error: bootstrap of the documents or questions, 1000 resamples"),
    dg.TableColumn("samples", "int", "Documents or questions scored"),
    dg.TableColumn("higher_is_better", "bool", "Direction of the metric"),
    dg.TableColumn("sample_values", "list[float]", "Per document or question; the value is their weighted mean, of "
                   "perplexities its exponential"),
    dg.TableColumn("sample_weights", "list[int]", "Of the sample values: tokens, bytes, or one per question"),
]  # fmt: skip
SCORED_MODELS: dict[Scored, str] = {
    "baseline": "the baseline model",
    "early_stopped": "the baseline at its lowest held-out loss along training, what early stopping would keep,",
    "sbp": "the SBP model",
    "oracle": "the oracle model",
}
SAMPLES = ("sample_values", "sample_weights")
# Scores that a column of the comparison is made of, by the name that its columns begin with.
BASELINES: tuple[Scored, ...] = ("baseline", "early_stopped")
COMPARED: dict[str, tuple[Scored, ...]] = {
    "baseline": BASELINES,
    "sbp": ("sbp",),
    "oracle": ("oracle",),
    "delta_sbp": (*BASELINES, "sbp"),
    "delta_oracle": (*BASELINES, "oracle"),
    "share": SCORED,
}

TEXTS_COMPARED = "evaluation/tasks.text corpus/documents.text synthesis/synthetic_documents.text"


def _of_scores(name: str, *columns: str) -> str:
    return " ".join(f"evaluation/{scored}_scores.{column}" for scored in COMPARED[name] for column in columns)


def _benchmarks_dir(settings: Settings) -> Path | None:
    return Path(settings.deployment.benchmarks_dir) if settings.deployment.benchmarks_dir else None


def configured_tasks(settings: Settings) -> list[str]:
    """Return the tasks that every score table must hold."""
    questions = [tasks.CONCEPT_QUESTIONS] if settings.experiment.evaluation.concept_questions else []
    return [tasks.HELDOUT, *questions, *settings.experiment.evaluation.benchmarks]


def concept_questions(settings: Settings) -> list[dict[str, str | int | list[str]]]:
    """Return the configured questions about the corpus' own facts; none where the ground truth is not known."""
    count, source = settings.experiment.evaluation.concept_questions, settings.experiment.truth
    return ConceptWorld(source).questions(count, seed=suite.SEED) if count and source else []


@for_settings(
    lambda settings: dg.asset(
        name="tasks",
        ins={"documents": dg.AssetIn(["corpus", "documents"], partition_mapping=ALL)},
        kinds={"yaml", "parquet"},
        io_manager_key="directory",
        code_version=f"{settings.experiment.version('2', 'evaluation', 'truth')}-"
        + benchmarks.data_version(settings.experiment.evaluation.benchmarks, _benchmarks_dir(settings)),
        metadata=schema(("id", "string", "Held-out document."), ("text", "string", "What is scored of it."))
        | lineage({"corpus/documents": ("id", "text")}),
    )
)
def evaluation_tasks(
    context: dg.AssetExecutionContext, settings: dg.ResourceParam[Settings], documents: dict[str, pl.LazyFrame]
) -> dg.MaterializeResult[Path]:
    """A directory of lm-eval task files with their data: what every model is scored on, here or by anyone.

    Held-out documents, questions about the corpus' own facts where the truth is known, and the configured stock
    benchmarks. README.md has the `lm_eval` commands that give any model directory the scores that ours have.
    """
    evaluation = settings.experiment.evaluation
    directory = staging(settings.deployment.work_dir, "evaluation_tasks")
    with Progress("evaluation tasks", "documents") as progress:
        made = task_files.write_tasks(
            directory,
            task_files.sample_heldout(documents, evaluation.heldout_documents),
            questions=concept_questions(settings),
            benchmarks=evaluation.benchmarks,
            benchmarks_dir=_benchmarks_dir(settings),
            benchmark_limit=evaluation.benchmark_limit,
        )
        progress.advance(sum(task.documents for task in made.tasks))
    for problem in made.problems:
        context.log.warning(f"not made: {problem}")
    return dg.MaterializeResult(
        value=directory,
        metadata={
            "tasks": len(made.tasks),
            **{f"{task.name}_documents": task.documents for task in made.tasks},
            **progress.metadata(),
            "tasks_not_made": list(made.problems),
            "notes": list(made.notes),
            "preview": dg.MetadataValue.md((directory / tasks.README).read_text(encoding="utf-8")),
        },
    )


def _scores(name: Scored) -> ForSettings[dg.AssetsDefinition]:
    @for_settings(
        lambda settings: dg.asset(
            name=f"{name}_scores",
            description=f"One row per task and metric: what {SCORED_MODELS[name]} of this seed scores in "
            "lm-eval.\n\n"
            "All arms answer the same held-out documents, questions and few-shot prompts on the same backend. Each "
            "text "
            "starts with `<bos>`, as in training. A document's perplexity counts its own tokens, without `<bos>` and "
            "`<eos>`. "
            "Five-shot MMLU perplexity is exp of the mean negative log-likelihood per token of the right answer's "
            "letter.",
            ins={
                "model": dg.AssetIn(["pretraining", "baseline_model" if name == "early_stopped" else f"{name}_model"]),
                "tasks_dir": dg.AssetIn(["evaluation", "tasks"], dagster_type=Path),
            },
            partitions_def=seeds(settings),
            kinds={"huggingface", "parquet"},
            io_manager_key="parquet",
            pool="device",
            code_version=settings.experiment.version("3"),
            metadata={
                "dagster/column_schema": dg.TableSchema(SCORE_COLUMNS),
                **lineage(
                    **dict.fromkeys(
                        ("value", "stderr", "samples", *SAMPLES),
                        f"pretraining/{'baseline' if name in BASELINES else name}_model.weights evaluation/tasks.text",
                    )
                ),
            },
        )
    )
    def scores(
        context: dg.AssetExecutionContext, settings: dg.ResourceParam[Settings], model: Path, tasks_dir: Path
    ) -> dg.MaterializeResult[pl.DataFrame]:
        result = suite.evaluate(
            best_model(model) if name == "early_stopped" else model,
            tasks_dir,
            device=settings.deployment.device,
            batch_size=settings.deployment.evaluation_batch_size,
            name=f"{name} model, seed {context.partition_key}",
        )
        for problem in result.problems:
            context.log.warning(f"not scored: {problem}")
        # Numeric, one entry per score: Dagster plots them over time.
        values = {f"{row['task']}_{row['metric']}": row["value"] for row in result.table.iter_rows(named=True)}
        return dg.MaterializeResult(
            value=with_samples(result.table, result.samples),
            metadata={
                "dagster/row_count": len(result.table),
                **values,
                **result.run,
                "tasks_not_scored": result.problems,
                "notes": result.notes,
                "batch_size": settings.deployment.evaluation_batch_size,
                "scores": dg.MetadataValue.md(table_preview(result.table)),
            },
        )

    return scores


baseline_scores, early_stopped_scores, sbp_scores, oracle_scores = map(_scores, SCORED)


@for_settings(
    lambda settings: dg.multi_asset(
        outs={
            "contamination": dg.AssetOut(
                key="contamination",
                dagster_type=dg.Any,
                io_manager_key="parquet",
                kinds={"polars", "parquet"},
                code_version=settings.experiment.version("1", "contamination"),
                description="One row per evaluation set and training corpus: how many items share text with it.\n\n"
                "D, the oracle's documents and the syntheses are compared with every item that is scored, by runs of "
                "words; a question with its right answer. Short items are not judged.",
                metadata=schema(
                    ("evaluation_set", "string", "A task of evaluation/tasks"),
                    ("corpus", "string", "unique (D), oracle or synthetic"),
                    ("documents", "int", "Documents of the corpus"),
                    ("words", "int", "n of the n-grams; an item of fewer words is one n-gram"),
                    ("items", "int", "Items of the set"),
                    ("judged", "int", "Items that are long enough"),
                    ("hit", "int", f"Items with an n-gram that 1 to {contamination.COMMON} documents hold"),
                    ("hit_share", "float", "Of the judged items; null where there are none"),
                    (
                        "contained",
                        "int",
                        f"Items of whose n-grams one document holds {contamination.CONTAINED:.0%} or more",
                    ),
                    ("contained_share", "float", "Of the judged items; null where there are none"),
                )
                | lineage(**dict.fromkeys(("hit", "hit_share", "contained", "contained_share"), TEXTS_COMPARED)),
            ),
            "contaminated_items": dg.AssetOut(
                key="contaminated_items",
                dagster_type=dg.Any,
                io_manager_key="parquet",
                kinds={"polars", "parquet"},
                code_version=settings.experiment.version("1", "contamination"),
                description="One row per evaluation item and corpus that holds of it: hits and contained items, the "
                "largest overlap first, with the document that holds most.",
                metadata=schema(
                    ("evaluation_set", "string", "A task of evaluation/tasks"),
                    ("item", "string", "Document id, or row of the task's data, from 0"),
                    ("corpus", "string", "unique (D), oracle or synthetic"),
                    ("hit", "bool", "As in contamination"),
                    ("contained", "bool", "As in contamination"),
                    ("ngrams", "int", "Different n-grams of the item"),
                    ("shared_ngrams", "int", "Of these, in any document of the corpus"),
                    ("document", "string", "The document that holds most of them; of equals, the first"),
                    ("document_share", "float", "Share of the item's n-grams that this document holds"),
                    ("ngram", "string", "The first that the two share, as compared: lower case, no punctuation"),
                )
                | lineage(
                    item="evaluation/tasks.id",
                    document="corpus/documents.id synthesis/synthetic_documents.id",
                    **dict.fromkeys(("hit", "contained", "shared_ngrams", "document_share", "ngram"), TEXTS_COMPARED),
                ),
            ),
        },
        ins={
            "tasks_dir": dg.AssetIn(["evaluation", "tasks"], dagster_type=Path),
            "documents": dg.AssetIn(["corpus", "documents"], partition_mapping=ALL),
            "synthetic_documents": dg.AssetIn(["synthesis", "synthetic_documents"], partition_mapping=ALL),
        },
        name="evaluation_contamination",
        pool="memory",
    )
)
def evaluation_contamination(
    settings: dg.ResourceParam[Settings],
    tasks_dir: Path,
    documents: dict[str, pl.LazyFrame],
    synthetic_documents: dict[str, pl.LazyFrame],
) -> tuple[dg.MaterializeResult, dg.MaterializeResult]:
    """Every evaluation item against every training document."""
    with Progress("contamination", "documents") as progress:
        summary, listed = contamination.compare(
            contamination.evaluation_items(tasks_dir),
            contamination.training_documents(documents, synthetic_documents),
            settings.experiment.contamination,
            progress,
        )
    shares = {
        f"{row['evaluation_set']}_{kind}_in_{row['corpus']}": row[f"{kind}_share"]
        for row in summary.iter_rows(named=True)
        for kind in ("hit", "contained")
        if row["judged"]
    }
    return (
        dg.MaterializeResult(
            asset_key=["evaluation", "contamination"],
            value=summary,
            metadata={
                "dagster/row_count": len(summary),
                **shares,
                **progress.metadata(),
                "preview": dg.MetadataValue.md(table_preview(summary)),
            },
        ),
        dg.MaterializeResult(
            asset_key=["evaluation", "contaminated_items"],
            value=listed,
            metadata={
                "dagster/row_count": len(listed),
                "contained": int(listed["contained"].sum()),
                "preview": dg.MetadataValue.md(table_preview(listed.head(20))),
            },
        ),
    )


@for_settings(
    lambda settings: dg.asset(
        ins={f"{name}_scores": dg.AssetIn(["evaluation", f"{name}_scores"], partition_mapping=ALL) for name in SCORED},
        kinds={"polars", "parquet"},
        io_manager_key="parquet",
        code_version=settings.experiment.version("3", "pretraining.seeds"),
        metadata={
            "dagster/column_schema": dg.TableSchema(
                [
                    dg.TableColumn("task", "string", "As in the scores"),
                    dg.TableColumn("metric", "string", "As in the scores"),
                    dg.TableColumn("higher_is_better", "bool", "Direction of the metric"),
                    dg.TableColumn(
                        "against", "string", "The baseline: final, or early_stopped at its lowest held-out loss"
                    ),
                    *(dg.TableColumn(arm, "float", f"Mean of the {arm} arm over the seeds") for arm in ARMS),
                    dg.TableColumn("delta_sbp", "float", "sbp - baseline"),
                    dg.TableColumn("delta_oracle", "float", "oracle - baseline"),
                    dg.TableColumn(
                        "share_of_oracle_gain", "float", "delta_sbp / delta_oracle; null where the oracle gains nothing"
                    ),
                    dg.TableColumn("seeds", "int", "Seeds that all arms have"),
                    *(
                        dg.TableColumn(
                            f"{name}_stderr", "float", f"Standard error of {name}: bootstrap of examples and seeds"
                        )
                        for name in (*ARMS, "delta_sbp", "delta_oracle")
                    ),
                    *(
                        dg.TableColumn(
                            f"{name}_{end}", "float", f"{end.title()} end of the 95% bootstrap interval of {name}"
                        )
                        for name in ("delta_sbp", "delta_oracle", "share")
                        for end in ("low", "high")
                    ),
                    *(dg.TableColumn(f"{arm}_samples", "int", f"Examples scored per seed of {arm}") for arm in ARMS),
                ]
            ),
            **lineage(
                {f"evaluation/{name}_scores": ("task", "metric", "higher_is_better") for name in SCORED},
                share_of_oracle_gain=_of_scores("share", "value"),
                **{name: _of_scores(name, "value") for name in (*ARMS, "delta_sbp", "delta_oracle")},
                **{f"{name}_stderr": _of_scores(name, *SAMPLES) for name in (*ARMS, "delta_sbp", "delta_oracle")},
                **{
                    f"{name}_{end}": _of_scores(name, *SAMPLES)
                    for name in ("delta_sbp", "delta_oracle", "share")
                    for end in ("low", "high")
                },
                **{f"{arm}_samples": _of_scores(arm, "samples") for arm in ARMS},
            ),
        },
    )
)
def comparison(
    baseline_scores: dict[str, pl.LazyFrame],
    early_stopped_scores: dict[str, pl.LazyFrame],
    sbp_scores: dict[str, pl.LazyFrame],
    oracle_scores: dict[str, pl.LazyFrame],
) -> dg.MaterializeResult[pl.DataFrame]:
    """The three arms side by side, one row per task, metric and baseline: deltas, and the share of the oracle's gain.

    The baseline stands in it twice: as trained, and at its lowest held-out loss along training.
    """
    models: dict[str, dict[str, pl.LazyFrame]] = dict(
        zip(SCORED, (baseline_scores, early_stopped_scores, sbp_scores, oracle_scores), strict=True)
    )
    with Progress("comparison", "rows") as progress:
        table = compare({name: {s: frame.collect() for s, frame in seeds.items()} for name, seeds in models.items()})
        progress.advance(len(table))
    shares = {
        f"{row['task']}_{row['metric']}_share_{row['against']}": row["share_of_oracle_gain"]
        for row in table.iter_rows(named=True)
        if row["share_of_oracle_gain"] is not None
    }
    return dg.MaterializeResult(
        value=table,
        metadata={
            "dagster/row_count": len(table),
            "seeds": seed_count(table),
            **shares,
            **progress.metadata(),
            "comparison": dg.MetadataValue.md(render_markdown(table)),
        },
    )
