"""Checks of the evaluation tasks, the scores, the contamination and the comparison."""

from pathlib import Path

import dagster as dg
import polars as pl

from sbp_assets.dagster_support.check_results import check_result, problems_result
from sbp_assets.dagster_support.partitions import ALL, seeds
from sbp_assets.dagster_support.preview import table_preview
from sbp_assets.dagster_support.stage import ForSettings, for_settings
from sbp_assets.evaluation import negative_control
from sbp_assets.evaluation.assets import concept_questions, configured_tasks
from sbp_assets.evaluation.audit import data_problems
from sbp_assets.evaluation.comparison import SCORED, Scored, comparison_problems, values_unlike_scores
from sbp_assets.evaluation.contamination import (
    JUDGED,
    above,
    misplaced,
    mostly_unjudged,
    training_documents,
    uncompared,
)
from sbp_assets.evaluation.scores import score_problems, unscored
from sbp_assets.evaluation.tasks import DATA, HELDOUT, QUESTIONS, Tasks
from sbp_assets.settings import FiveTokensSource, Settings
from sbp_assets.storage.paths import read_table
from sbp_assets.training.documents import Documents
from sbp_assets.training.mapped import MappedArrays
from sbp_assets.training.spec import Source

SHOWN = 20
TASKS = dg.AssetIn(["evaluation", "tasks"], dagster_type=Path)
DOCUMENTS = dg.AssetIn(["corpus", "documents"], partition_mapping=ALL)


@dg.asset_check(
    asset=dg.AssetKey(["evaluation", "tasks"]),
    blocking=True,
    additional_ins={"documents": DOCUMENTS},
    description="Every task has all of its rows; the held-out documents and the questions are those of the corpus.",
)
def task_data_matches_corpus(
    settings: dg.ResourceParam[Settings], tasks: Path, documents: dict[str, pl.LazyFrame]
) -> dg.AssetCheckResult:
    return problems_result(
        data_problems(tasks, documents, concept_questions(settings)), tasks=len(Tasks.load(tasks).tasks)
    )


@dg.asset_check(
    asset=dg.AssetKey(["evaluation", "tasks"]),
    description="Every configured task was prepared, with documents to score; the problems name those that were not.",
)
def every_task_is_prepared(settings: dg.ResourceParam[Settings], tasks: Path) -> dg.AssetCheckResult:
    prepared = Tasks.load(tasks)
    return problems_result(prepared.missing(configured_tasks(settings)), tasks=len(prepared.tasks))


def _scores_checks(name: Scored) -> list[ForSettings[dg.AssetChecksDefinition]]:
    @for_settings(
        lambda settings: dg.asset_check(
            asset=dg.AssetKey(["evaluation", f"{name}_scores"]),
            name="scores_are_complete_and_valid",
            partitions_def=seeds(settings),
            blocking=True,
            additional_ins={"tasks_dir": TASKS},
            description="Every task that was scored has all of its metrics: finite, possible, of all of its items, "
            "and equal to what the values of the items give.",
        )
    )
    def valid(scores: pl.LazyFrame, tasks_dir: Path) -> dg.AssetCheckResult:
        table = scores.collect()
        return problems_result(score_problems(table, Tasks.load(tasks_dir).tasks), rows=len(table))

    @for_settings(
        lambda settings: dg.asset_check(
            asset=dg.AssetKey(["evaluation", f"{name}_scores"]),
            name="every_task_is_scored",
            partitions_def=seeds(settings),
            # Blocks nothing: a benchmark that cannot be run must not cost the comparison of the others.
            description="Every configured task has a score.",
        )
    )
    def complete(settings: dg.ResourceParam[Settings], scores: pl.LazyFrame) -> dg.AssetCheckResult:
        table = scores.collect()
        return problems_result(unscored(table, configured_tasks(settings)), tasks=table["task"].n_unique())

    return [valid, complete]


SCORES_CHECKS = [check for name in SCORED for check in _scores_checks(name)]


@dg.asset_check(
    asset=dg.AssetKey(["evaluation", "comparison"]),
    description="The three arms have the same tasks, and scored the same number of examples in each.",
)
def arms_have_the_same_samples(comparison: pl.LazyFrame) -> dg.AssetCheckResult:
    table = comparison.collect()
    return problems_result(comparison_problems(table), rows=len(table))


@dg.asset_check(
    asset=dg.AssetKey(["evaluation", "comparison"]),
    blocking=True,
    additional_ins={
        f"{name}_scores": dg.AssetIn(["evaluation", f"{name}_scores"], partition_mapping=ALL) for name in SCORED
    },
    description="The rows, means, deltas and shares of the comparison are those that the scores give.",
)
def comparison_matches_scores(
    comparison: pl.LazyFrame,
    baseline_scores: dict[str, pl.LazyFrame],
    early_stopped_scores: dict[str, pl.LazyFrame],
    sbp_scores: dict[str, pl.LazyFrame],
    oracle_scores: dict[str, pl.LazyFrame],
) -> dg.AssetCheckResult:
    table = comparison.collect()
    frames = dict(zip(SCORED, (baseline_scores, early_stopped_scores, sbp_scores, oracle_scores), strict=True))
    scores = {str(name): {seed: frame.collect() for seed, frame in of.items()} for name, of in frames.items()}
    return problems_result(values_unlike_scores(table, scores), rows=len(table))


@for_settings(
    lambda settings: (
        None
        if not isinstance(settings.experiment.corpus.source, FiveTokensSource)
        else dg.asset_check(
            asset=dg.AssetKey(["evaluation", "comparison"]),
            # With every other source there is something to learn, and nothing to check.
            additional_ins={
                "training_dynamics": dg.AssetIn(["evaluation", "training_dynamics"]),
                "tokens": dg.AssetIn(["corpus", "tokens"], partition_mapping=ALL),
                "tasks_dir": TASKS,
            },
            description="In the five-token world nothing can be learned: no arm goes below the entropy on held-out "
            "documents, and SBP not below the early-stopped baseline, beyond the sampling error.",
        )
    )
)
def negative_control_shows_no_gain(
    settings: dg.ResourceParam[Settings],
    comparison: pl.LazyFrame,
    training_dynamics: pl.LazyFrame,
    tokens: dict[str, Path],
    tasks_dir: Path,
) -> dg.AssetCheckResult:
    source = settings.experiment.corpus.source
    assert isinstance(source, FiveTokensSource)
    heldout = next(task for task in Tasks.load(tasks_dir).tasks if task.name == HELDOUT)
    texts = read_table(tasks_dir / DATA / f"{heldout.lm_eval}.test.parquet")["text"]
    scratch = MappedArrays(scratch=Path(settings.deployment.work_dir))
    measured = Documents([Source(directory=tokens[shard], split=HELDOUT) for shard in sorted(tokens)], scratch)
    verdict = negative_control.judge(
        comparison.collect(),
        training_dynamics.collect(),
        negative_control.scored_floor(texts),
        negative_control.measured_floor(
            source, measured.lengths.tolist(), settings.experiment.pretraining.heldout_tokens
        ),
    )
    return problems_result(verdict.problems, **verdict.numbers)


@dg.asset_check(
    asset=dg.AssetKey(["evaluation", "contamination"]),
    blocking=True,
    additional_ins={"tasks_dir": TASKS, "contaminated_items": dg.AssetIn(["evaluation", "contaminated_items"])},
    description="Every evaluation set is compared in full with D, the oracle's documents and the synthetic documents, "
    f"has items long enough for it, and as many hits as are listed. Less than {JUDGED:.0%} of long enough items are a "
    "warning.",
)
def every_evaluation_set_is_compared(
    contamination: pl.LazyFrame, contaminated_items: pl.LazyFrame, tasks_dir: Path
) -> dg.AssetCheckResult:
    table = contamination.collect()
    problems, short = uncompared(table, contaminated_items.collect(), tasks_dir), mostly_unjudged(table)
    return check_result(
        passed=not problems and not short,
        # What is not compared is not known to be clean; what is short stays short, and a person has to decide.
        severity=dg.AssetCheckSeverity.ERROR if problems else dg.AssetCheckSeverity.WARN,
        metadata={"rows": len(table), "problems": problems, "mostly_unjudged": short},
    )


@for_settings(
    lambda settings: dg.asset_check(
        asset=dg.AssetKey(["evaluation", "contamination"]),
        additional_ins={"contaminated_items": dg.AssetIn(["evaluation", "contaminated_items"])},
        description=f"At most {settings.experiment.contamination.max_share:.0%} of the items of any evaluation set "
        "are contained in a training document. Items that share single n-grams, and questions about the corpus' own "
        "facts that a document answers word for word, are a warning.",
    )
)
def evaluation_items_are_not_in_training_documents(
    settings: dg.ResourceParam[Settings], contamination: pl.LazyFrame, contaminated_items: pl.LazyFrame
) -> dg.AssetCheckResult:
    table, listed = contamination.collect(), contaminated_items.collect()
    # Documents state the facts that these questions ask for, in the same words: that is the task, and no leak.
    own = pl.col("evaluation_set").is_in(QUESTIONS)
    leaks = above(table.filter(~own), "contained", settings.experiment.contamination.max_share)
    hints = [
        *above(table, "hit", settings.experiment.contamination.max_share),
        *above(table.filter(own), "contained", settings.experiment.contamination.max_share),
    ]
    return check_result(
        passed=not leaks and not hints,
        severity=dg.AssetCheckSeverity.ERROR if leaks else dg.AssetCheckSeverity.WARN,
        metadata={
            "leaks": leaks,
            "shared": hints,
            "contained": int(listed["contained"].sum()),
            "hit": int(listed["hit"].sum()),
            "offending": dg.MetadataValue.md(
                table_preview(listed.sort(own, maintain_order=True).head(SHOWN)) if len(listed) else "None."
            ),
        },
    )


@dg.asset_check(
    asset=dg.AssetKey(["evaluation", "contaminated_items"]),
    additional_ins={
        "documents": DOCUMENTS,
        "synthetic_documents": dg.AssetIn(["synthesis", "synthetic_documents"], partition_mapping=ALL),
    },
    description="The listed documents contain the listed n-grams, word for word.",
)
def listed_documents_contain_ngrams(
    contaminated_items: pl.LazyFrame,
    documents: dict[str, pl.LazyFrame],
    synthetic_documents: dict[str, pl.LazyFrame],
) -> dg.AssetCheckResult:
    listed = contaminated_items.collect()
    documents_read = training_documents(documents, synthetic_documents)
    return problems_result(misplaced(listed, documents_read), items=len(listed))
