"""The assets of the evaluation: the tasks, the models' scores, the contamination and the comparison."""

from pathlib import Path

import dagster as dg
import polars as pl

from sbp_assets.corpus.concept_texts import VIEWS
from sbp_assets.corpus.concepts import ConceptWorld, Question
from sbp_assets.dagster_support.partitions import ALL, seeds
from sbp_assets.dagster_support.preview import table_preview
from sbp_assets.dagster_support.stage import ForSettings, for_settings
from sbp_assets.evaluation import contamination, suite
from sbp_assets.evaluation.benchmarks import data_version
from sbp_assets.evaluation.comparison import COMPARISON_COLUMNS, SCORED, Scored, compare, seed_count
from sbp_assets.evaluation.comparison_table import render_markdown
from sbp_assets.evaluation.contamination import CONTAMINATED_ITEM_COLUMNS, CONTAMINATION_COLUMNS
from sbp_assets.evaluation.scores import SAMPLE_COLUMNS, SCORE_COLUMNS, SEED, with_samples
from sbp_assets.evaluation.task_files import HELDOUT_COLUMNS, sample_heldout, write_tasks
from sbp_assets.evaluation.tasks import HELDOUT, QUESTIONS, README
from sbp_assets.evaluation.views import (
    Groups,
    clusters_of_documents,
    groups_of_documents,
    groups_of_questions,
    views_in_d,
)
from sbp_assets.settings import Settings
from sbp_assets.storage.artifacts import staging
from sbp_assets.storage.column_metadata import column_metadata
from sbp_assets.storage.progress import Progress
from sbp_assets.training.checkpoint import best_model

SCORED_MODELS: dict[Scored, str] = {
    "baseline": "the baseline model",
    "early_stopped": "the baseline at its lowest held-out loss along training, what early stopping would keep,",
    "sbp": "the SBP model",
    "oracle": "the oracle model",
}


def _benchmarks_dir(settings: Settings) -> Path | None:
    return Path(settings.deployment.benchmarks_dir) if settings.deployment.benchmarks_dir else None


def configured_tasks(settings: Settings) -> list[str]:
    """Return the names of the tasks that every score table must hold."""
    questions = QUESTIONS if settings.experiment.evaluation.concept_questions else ()
    return [HELDOUT, *questions, *settings.experiment.evaluation.benchmarks]


def concept_questions(settings: Settings) -> dict[str, list[Question]]:
    """Return the configured questions about the corpus' own facts, by task; none without a known ground truth."""
    count, source = settings.experiment.evaluation.concept_questions, settings.experiment.ground_truth
    if not count or not source:
        return {}
    questions = ConceptWorld(source).questions(count, seed=SEED)
    return {
        task: [question for question in questions if question["view"] == view]
        for task, view in zip(QUESTIONS, VIEWS, strict=True)
    }


def _groups_and_clusters(
    settings: Settings,
    documents: dict[str, pl.LazyFrame],
    heldout: pl.DataFrame,
    questions: dict[str, list[Question]],
) -> tuple[dict[str, Groups], dict[str, tuple[int, ...]]]:
    """Return by task the groups of rows that are scored apart, and each row's concept.

    There are none where the ground truth is not known.
    """
    if not (source := settings.experiment.ground_truth):
        return {}, {}
    world, texts = ConceptWorld(source), heldout["text"].to_list()
    clusters = {task: tuple(question["concept"] for question in own) for task, own in questions.items()}
    clusters[HELDOUT] = clusters_of_documents(world, texts)
    seen = views_in_d(world, documents)
    groups = {task: groups_of_questions(own, seen) for task, own in questions.items()}
    return {HELDOUT: groups_of_documents(texts, clusters[HELDOUT]), **groups}, clusters


@for_settings(
    lambda settings: dg.asset(
        ins={"documents": dg.AssetIn(["corpus", "documents"], partition_mapping=ALL)},
        kinds={"yaml", "parquet"},
        io_manager_key="directory",
        code_version=f"{settings.experiment.version('4', 'evaluation', 'truth')}-"
        + data_version(settings.experiment.evaluation.benchmarks, _benchmarks_dir(settings)),
        metadata=column_metadata(HELDOUT_COLUMNS),
    )
)
def tasks(
    context: dg.AssetExecutionContext, settings: dg.ResourceParam[Settings], documents: dict[str, pl.LazyFrame]
) -> dg.MaterializeResult[Path]:
    """A directory of lm-eval task files with their data: what every model is scored on, here or by anyone.

    The tasks are held-out documents, questions about the corpus' own facts where the ground truth is known, forward and
    reversed, and the configured stock benchmarks. The `lm_eval` commands in README.md score any model directory as this
    evaluation does.
    """
    evaluation = settings.experiment.evaluation
    directory = staging(settings.deployment.work_dir, "evaluation_tasks")
    with Progress("evaluation tasks", "documents") as progress:
        heldout, questions = sample_heldout(documents, evaluation.heldout_documents), concept_questions(settings)
        groups, clusters = _groups_and_clusters(settings, documents, heldout, questions)
        written = write_tasks(
            directory,
            heldout,
            questions=questions,
            groups=groups,
            clusters=clusters,
            benchmarks=evaluation.benchmarks,
            benchmarks_dir=_benchmarks_dir(settings),
            benchmark_limit=evaluation.benchmark_limit,
        )
        progress.advance(sum(task.documents for task in written.tasks))
    for problem in written.problems:
        context.log.warning(f"a task was not prepared: {problem}")
    return dg.MaterializeResult(
        value=directory,
        metadata={
            "tasks": len(written.tasks),
            **{f"{task.name}_documents": task.documents for task in written.tasks},
            **progress.metadata(),
            "tasks_not_prepared": list(written.problems),
            "notes": list(written.notes),
            "preview": dg.MetadataValue.md((directory / README).read_text(encoding="utf-8")),
        },
    )


def _scores(name: Scored) -> ForSettings[dg.AssetsDefinition]:
    model_asset = "baseline_model" if name == "early_stopped" else f"{name}_model"

    @for_settings(
        lambda settings: dg.asset(
            name=f"{name}_scores",
            description=f"One row per task and metric: what {SCORED_MODELS[name]} of this seed scores in lm-eval.\n\n"
            "All arms answer the same held-out documents, questions and few-shot prompts on the same backend. Each "
            "text starts with `<bos>`, as in training. A document's perplexity counts its own tokens, without `<bos>` "
            "and `<eos>`. Five-shot MMLU perplexity is exp of the mean negative log-likelihood per token of the right "
            "answer's letter.",
            ins={
                "model": dg.AssetIn(["pretraining", model_asset]),
                "tasks_dir": dg.AssetIn(["evaluation", "tasks"], dagster_type=Path),
            },
            partitions_def=seeds(settings),
            kinds={"huggingface", "parquet"},
            io_manager_key="parquet",
            pool="device",
            code_version=settings.experiment.version("5"),
            metadata=column_metadata(
                [*SCORE_COLUMNS, *SAMPLE_COLUMNS],
                **dict.fromkeys(
                    ("value", "stderr", "samples", *(column.name for column in SAMPLE_COLUMNS)),
                    f"evaluation/tasks.text pretraining/{model_asset}.weights",
                ),
            ),
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
            context.log.warning(f"a task was not scored: {problem}")
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
                code_version=settings.experiment.version("2", "contamination"),
                description="One row per evaluation set and training corpus: how many items share text with it.\n\n"
                "D, the oracle's documents and the synthetic documents are compared with every item that is scored, by "
                "runs of words; a question with its right answer. Short items are not judged.",
                metadata=column_metadata(CONTAMINATION_COLUMNS),
            ),
            "contaminated_items": dg.AssetOut(
                key="contaminated_items",
                dagster_type=dg.Any,
                io_manager_key="parquet",
                kinds={"polars", "parquet"},
                code_version=settings.experiment.version("2", "contamination"),
                description="One row per evaluation item and corpus that shares text with it: hits and contained "
                "items, the largest overlap first, with the document that holds most of the item.",
                metadata=column_metadata(CONTAMINATED_ITEM_COLUMNS),
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
    """Compares every evaluation item with every training document."""
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
        code_version=settings.experiment.version("5", "pretraining.seeds"),
        metadata=column_metadata(COMPARISON_COLUMNS),
    )
)
def comparison(
    baseline_scores: dict[str, pl.LazyFrame],
    early_stopped_scores: dict[str, pl.LazyFrame],
    sbp_scores: dict[str, pl.LazyFrame],
    oracle_scores: dict[str, pl.LazyFrame],
) -> dg.MaterializeResult[pl.DataFrame]:
    """The three arms side by side, one row per task, metric and baseline: deltas, and the share of the oracle's gain.

    There are rows against two baselines: the one as trained, and the one at its lowest held-out loss along training.
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
