"""The checks of the token budget and of the three arms' models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from sbp_assets.corpus.split import HELDOUT
from sbp_assets.dagster_support.check_results import check_result, problems_result
from sbp_assets.dagster_support.partitions import seeds, shards
from sbp_assets.dagster_support.stage import ForSettings, for_settings
from sbp_assets.pretraining.assets import ALL_SYNTHETIC_TOKENS, ALL_TOKENS, TOKENIZER
from sbp_assets.pretraining.audit import foreign_seeds, leaked_documents, repeated_ids
from sbp_assets.pretraining.budget import ARMS, SYNTHETIC, Arm, budget_problems, plan_arm, training_problems
from sbp_assets.pretraining.curves import loss_problems, loss_summary
from sbp_assets.pretraining.model_files import model_problems, weight_problems
from sbp_assets.settings import Settings
from sbp_assets.storage.artifacts import staging
from sbp_assets.storage.checks import all_partitions
from sbp_assets.storage.io_managers import DirectoryIOManager
from sbp_assets.storage.paths import read_table
from sbp_assets.training.spec import Source


@dg.asset_check(
    asset=["pretraining", "token_budget"],
    blocking=True,
    description="The three arms train on exactly equal numbers of tokens.",
)
def arms_train_on_equal_tokens(token_budget: pl.LazyFrame) -> dg.AssetCheckResult:
    table = token_budget.collect()
    per_arm = table.filter(pl.col("arm").is_in(ARMS)).group_by("arm").agg(pl.col("tokens_read").sum())
    return problems_result(budget_problems(table), **dict(per_arm.iter_rows()))


@dg.asset_check(
    asset=["pretraining", "token_budget"],
    blocking=True,
    additional_ins={"synthetic_tokens": ALL_SYNTHETIC_TOKENS},
    description="The SBP arm reads no synthetic document twice: none is begun twice, and no two have the same id.",
)
def synthetic_documents_are_read_once(
    settings: dg.ResourceParam[Settings], token_budget: pl.LazyFrame, synthetic_tokens: dict[str, Path]
) -> dg.AssetCheckResult:
    row = token_budget.filter(pl.col("source") == SYNTHETIC).collect()
    most_reads = int(row["most_reads"].max() or 0)  # type: ignore[arg-type]
    repeated = repeated_ids(synthetic_tokens, *_scratch(settings))
    return check_result(
        passed=len(row) == 1 and most_reads <= 1 and not repeated,
        metadata={"most_reads": most_reads, "repeated": len(repeated), "repeated_ids": repeated[:10]},
    )


@dg.asset_check(
    asset=["pretraining", "token_budget"],
    blocking=True,
    additional_ins={"tokens": ALL_TOKENS, "synthetic_tokens": ALL_SYNTHETIC_TOKENS},
    description="No arm trains on a held-out document, nor on a synthetic document sampled from one: every seed "
    "document is in D.",
)
def heldout_documents_are_not_trained_on(
    settings: dg.ResourceParam[Settings],
    tokens: dict[str, Path],
    synthetic_tokens: dict[str, Path],
) -> dg.AssetCheckResult:
    heldout = [Source(directory=tokens[shard], split=HELDOUT) for shard in sorted(tokens)]
    plans = {arm: plan_arm(arm, settings.experiment.pretraining, tokens, synthetic_tokens) for arm in ARMS}
    leaked = {arm: leaked_documents(plan.data, heldout, *_scratch(settings)) for arm, plan in plans.items()}
    foreign = foreign_seeds(synthetic_tokens, tokens, *_scratch(settings))
    return check_result(
        passed=not foreign and not any(leaked.values()),
        metadata={
            **{f"leaked_{arm}": len(ids) for arm, ids in leaked.items()},
            "leaked_ids": sorted({id_ for ids in leaked.values() for id_ in ids})[:10],
            "seeds_outside_d": len(foreign),
            "seeds_outside_d_ids": foreign[:10],
        },
    )


def _scratch(settings: Settings) -> tuple[Path, str]:
    """Return where DuckDB may spill, and the memory that it may take."""
    return staging(settings.deployment.work_dir, "token_budget_checks"), settings.deployment.memory_limit


def _model_checks(arm: Arm) -> list[ForSettings[dg.AssetChecksDefinition]]:
    def model_check(description: str, **options: Any) -> Callable[..., ForSettings[dg.AssetChecksDefinition]]:
        """Return the decorator of a blocking check of each seed's model."""
        return for_settings(
            lambda settings: dg.asset_check(
                asset=["pretraining", f"{arm}_model"],
                partitions_def=seeds(settings),
                blocking=True,
                description=description,
                **options,
            )
        )

    @model_check("The training loss is finite at every step, and lower at the end than at the start.")
    def training_loss_decreases(model: Path) -> dg.AssetCheckResult:
        metrics = read_table(model / "metrics.parquet")
        return problems_result(loss_problems(metrics), **loss_summary(metrics))

    @model_check(
        "The directory loads: every tensor has its shape, and the vocabulary is that of corpus/tokenizer.",
        additional_ins={"tokenizer": TOKENIZER},
    )
    def model_loads(model: Path, tokenizer: Path) -> dg.AssetCheckResult:
        return problems_result(model_problems(model, tokenizer))

    @model_check("Every weight is a finite number, also those of the lowest held-out loss.")
    def weights_are_finite(model: Path) -> dg.AssetCheckResult:
        return problems_result(weight_problems(model))

    @model_check(
        "The model was trained on exactly the tokens of the budget, step by step.",
        additional_deps=[["corpus", "tokens"], *([["synthesis", "synthetic_tokens"]] if arm == "sbp" else [])],
    )
    def training_tokens_match_budget(
        settings: dg.ResourceParam[Settings],
        directory: dg.ResourceParam[DirectoryIOManager],
        model: Path,
    ) -> dg.AssetCheckResult:
        tokens = all_partitions(directory, "corpus/tokens", shards(settings))
        synthetic = all_partitions(directory, "synthesis/synthetic_tokens", shards(settings)) if arm == "sbp" else None
        plan = plan_arm(arm, settings.experiment.pretraining, tokens, synthetic)
        metrics = read_table(model / "metrics.parquet")
        return problems_result(training_problems(metrics, plan), trained=int(metrics["tokens"][-1]), budget=plan.tokens)

    return [training_loss_decreases, model_loads, weights_are_finite, training_tokens_match_budget]


MODEL_CHECKS = [check for arm in ARMS for check in _model_checks(arm)]
