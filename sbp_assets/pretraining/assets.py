"""The assets of pretraining: the three arms' models, and the token budget that proves their compute equal."""

import json
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from sbp_assets.corpus.split import HELDOUT
from sbp_assets.dagster_support.partitions import ALL, first_seed, seeds
from sbp_assets.dagster_support.preview import table_preview
from sbp_assets.dagster_support.stage import ForSettings, for_settings
from sbp_assets.pretraining.budget import (
    BUDGET_COLUMNS,
    SYNTHETIC,
    Arm,
    BudgetError,
    arm_rows,
    equal_total_compute,
    generation_cost,
    plan_arm,
    plan_mismatch,
    tuning_cost,
)
from sbp_assets.pretraining.curves import loss_curve, loss_summary
from sbp_assets.pretraining.model_files import MODEL_COLUMNS
from sbp_assets.settings import Deployment, Optimizer, Settings
from sbp_assets.storage.artifacts import release_staging, staging
from sbp_assets.storage.column_metadata import column_metadata
from sbp_assets.storage.paths import read_table
from sbp_assets.storage.progress import Progress
from sbp_assets.training.spec import Source, TrainingSpec
from sbp_assets.training.trainer import Trainer

TRAINING_SETTINGS = (
    "model",
    "pretraining.repetitions",
    "pretraining.evaluations",
    "pretraining.heldout_tokens",
    *(f"pretraining.{field}" for field in Optimizer.model_fields),
)
ALL_TOKENS = dg.AssetIn(["corpus", "tokens"], partition_mapping=ALL, dagster_type=dict[str, Path])
ALL_SYNTHETIC_TOKENS = dg.AssetIn(
    ["synthesis", "synthetic_tokens"], partition_mapping=ALL, dagster_type=dict[str, Path]
)
ALL_SYNTHETIC_DOCUMENTS = dg.AssetIn(
    ["synthesis", "synthetic_documents"], partition_mapping=ALL, dagster_type=dict[str, pl.LazyFrame]
)
TOKENIZER = dg.AssetIn(["corpus", "tokenizer"], dagster_type=Path)

DESCRIPTIONS: dict[Arm, str] = {
    "baseline": "The repetition arm: `repetitions` epochs over D. The synthesizer is tuned from the first seed's "
    "model. `best/` is the model at the lowest held-out loss along training, which early stopping would keep, unless "
    "that is the last one.",
    "sbp": "The SBP arm: every synthetic document once, and D repeated for the rest of the budget.",
    "oracle": "The oracle arm: D and the oracle split, as many unique real documents as the budget asks for.",
}
DIRECTORY = """

A Hugging Face model directory (safetensors, config, tokenizer) with metrics.parquet (step, tokens, train_loss,
heldout_loss, learning_rate, gradient_norm) and run.json (what was run, where, how long). Trained from random weights on
exactly the token budget that the other arms have. A run that was interrupted resumes from its last checkpoint."""


def sampled_model(settings: Settings) -> dg.AssetIn:
    """Return what synthetic documents are made from, as an asset's input: the model that they are sampled from.

    The unconditional placebo takes the synthesizer's starting point itself. Where real pairs stand in one document,
    nothing is sampled, and the synthesizer's examples are read instead.
    """
    if not settings.experiment.sampled:
        return dg.AssetIn(["synthesizer", "tuning_examples"])
    return charged_model(settings)


def charged_model(settings: Settings) -> dg.AssetIn:
    """Return the synthesizer, whose tuning is charged, or where there is none the first seed's baseline."""
    if settings.experiment.conditional:
        return dg.AssetIn(["synthesizer", "checkpoint"])
    return dg.AssetIn(["pretraining", "baseline_model"], partition_mapping=first_seed(settings))


def model_columns(*read: str) -> dict[str, Any]:
    """Return the column metadata of a model directory that is made of the columns `read`, as "stage/asset.column"."""
    made_of_all = ("weights", "train_loss", "heldout_loss", "gradient_norm")
    return column_metadata(MODEL_COLUMNS, **dict.fromkeys(made_of_all, " ".join(read)))


def optimizer_of(section: Optimizer) -> Optimizer:
    """Return the optimizer's own fields of a settings section that extends it."""
    return Optimizer.model_validate({field: getattr(section, field) for field in Optimizer.model_fields})


def vocab_size(model: Path) -> int:
    """Return the vocabulary size of a model directory."""
    return int(json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def execution_fields(deployment: Deployment, asset: str, partition: str) -> dict[str, Any]:
    """Return the deployment's part of a training spec: how and where it runs."""
    return {
        "device": deployment.device,
        "sharding": deployment.training_sharding,
        "microbatch_tokens": deployment.microbatch_tokens,
        "activation_checkpointing": deployment.activation_checkpointing,
        "compile": deployment.compile,
        "checkpoint_minutes": deployment.checkpoint_minutes,
        "tensorboard_dir": deployment.tensorboard_dir and f"{deployment.tensorboard_dir}/{asset}/{partition}",
        "wandb_project": deployment.wandb_project,
        "work_dir": Path(deployment.work_dir) / asset / partition,
        # Not emptied: the worker replaces another run's model, and returns its own if only the publication failed.
        "output_dir": Path(deployment.work_dir) / "staging" / asset / partition,
    }


def train(
    context: dg.AssetExecutionContext, trainer: Trainer, spec: TrainingSpec, processes: int
) -> tuple[Path, dict[str, Any]]:
    """Run `spec` in worker processes, and return the model directory and its metadata.

    The worker's progress lines appear in the run's log. Raises where a worker fails; its checkpoints stay in
    `work_dir`.
    """
    with Progress(spec.name, "tokens") as progress:
        trainer.train(context, spec, processes)
    metrics = read_table(spec.output_dir / "metrics.parquet")
    record = json.loads((spec.output_dir / "run.json").read_text(encoding="utf-8"))
    evenly = metrics.gather_every(max(1, len(metrics) // 10))
    return spec.output_dir, {
        **progress.metadata(),
        **loss_summary(metrics),
        # The worker's own rate: without start-up, and without what an earlier, interrupted run did.
        "tokens_per_second": float(record["tokens_per_second"]),
        "parameters": spec.model.parameters(vocab_size(spec.output_dir)),
        "flops": float(record["flops"]),
        "loss_curve": dg.MetadataValue.md(loss_curve(metrics, spec.name)),
        "preview": dg.MetadataValue.md(table_preview(evenly)),
    }


def _arm_model(arm: Arm) -> ForSettings[dg.AssetsDefinition]:
    ins = {"tokens": ALL_TOKENS, "tokenizer": TOKENIZER}
    if arm == "sbp":
        ins["synthetic_tokens"] = ALL_SYNTHETIC_TOKENS
        # The other arms need no budget table: what they read follows from the corpus alone.
        ins["token_budget"] = dg.AssetIn(["pretraining", "token_budget"], dagster_type=pl.LazyFrame)

    @for_settings(
        lambda settings: dg.asset(
            name=f"{arm}_model",
            description=DESCRIPTIONS[arm] + DIRECTORY,
            ins=ins,
            partitions_def=seeds(settings),
            kinds={"pytorch", "huggingface"},
            io_manager_key="directory",
            pool="device",
            code_version=settings.experiment.version("3", *TRAINING_SETTINGS),
            metadata=model_columns(
                "corpus/tokens.tokens", *(["synthesis/synthetic_tokens.tokens"] if arm == "sbp" else [])
            ),
        )
    )
    def model(
        context: dg.AssetExecutionContext,
        settings: dg.ResourceParam[Settings],
        trainer: dg.ResourceParam[Trainer],
        **inputs: Any,
    ) -> dg.MaterializeResult[Path]:
        tokens = inputs["tokens"]
        plan = plan_arm(arm, settings.experiment.pretraining, tokens, inputs.get("synthetic_tokens"))
        if "token_budget" in inputs and (mismatch := plan_mismatch(inputs["token_budget"].collect(), plan)):
            raise BudgetError(f"{mismatch}: re-materialise pretraining/token_budget before the {arm} model")
        spec = TrainingSpec(
            name=f"{arm}_model seed {context.partition_key}",
            model=settings.experiment.model,
            optimizer=optimizer_of(settings.experiment.pretraining),
            tokenizer_dir=inputs["tokenizer"],
            data=plan.data,
            steps=plan.steps,
            seed=int(context.partition_key),
            heldout=[Source(directory=tokens[shard], split=HELDOUT) for shard in sorted(tokens)],
            heldout_tokens=settings.experiment.pretraining.heldout_tokens,
            evaluations=settings.experiment.pretraining.evaluations,
            keep_best=arm == "baseline",
            **execution_fields(settings.deployment, f"{arm}_model", context.partition_key),
        )
        directory, metadata = train(context, trainer, spec, settings.deployment.training_processes)
        return dg.MaterializeResult(value=directory, metadata=metadata)

    return model


baseline_model = _arm_model("baseline")
sbp_model = _arm_model("sbp")
oracle_model = _arm_model("oracle")


@for_settings(
    lambda settings: dg.asset(
        ins={
            "tokens": ALL_TOKENS,
            "synthetic_tokens": ALL_SYNTHETIC_TOKENS,
            "checkpoint": charged_model(settings),
            # What a filter drops has been sampled all the same.
            **({"synthetic_documents": ALL_SYNTHETIC_DOCUMENTS} if settings.experiment.synthesis.filter.drops else {}),
        },
        kinds={"polars", "parquet"},
        io_manager_key="parquet",
        code_version=settings.experiment.version(
            "1",
            "model",
            "pretraining.repetitions",
            "pretraining.tokens_per_step",
            "pretraining.synthetic_share",
            "first_seed",
            "max_document_tokens",
            "conditional",
            *([] if settings.experiment.sampled else ["sampled"]),
        ),
        metadata=column_metadata(
            BUDGET_COLUMNS,
            **dict.fromkeys(
                ("unique_tokens", "passes", "tokens_read", "steps", "flops", "most_reads"),
                "corpus/tokens.tokens synthesis/synthetic_tokens.tokens"
                # The ledger of tuning, which documents without a synthesizer do not have.
                + (" synthesizer/checkpoint.tokens" if settings.experiment.conditional else ""),
            ),
        ),
    )
)
def token_budget(
    settings: dg.ResourceParam[Settings],
    tokens: dict[str, Path],
    synthetic_tokens: dict[str, Path],
    checkpoint: Path,
    **sampled: dict[str, pl.LazyFrame],
) -> dg.MaterializeResult[pl.DataFrame]:
    """What each arm reads and how often, one row per arm and source: the proof that their compute is matched.

    The tokens read are counted along the training order itself. Two more rows (arm 'synthesizer') are the ledger of
    what synthesis costs beyond the arms: synthesizer-tuning and generation. Real pairs in one document cost neither.
    """
    pretraining = settings.experiment.pretraining
    vocabulary = vocab_size(checkpoint)
    flops = settings.experiment.model.flops_per_token(vocabulary)
    scratch = staging(settings.deployment.work_dir, "token_budget")
    with Progress("token_budget", "arms", 3) as progress:
        frames = []
        arms: tuple[Arm, ...] = ("baseline", "sbp", "oracle")
        for arm in arms:
            plan = plan_arm(arm, pretraining, tokens, synthetic_tokens if arm == "sbp" else None)
            context = settings.experiment.model.context_length
            frames.append(arm_rows(plan, context, pretraining.seeds[0], flops, scratch))
            progress.advance()
        if settings.experiment.conditional:
            frames.append(tuning_cost(checkpoint))
        if settings.experiment.sampled:
            prompt = settings.experiment.max_document_tokens if settings.experiment.conditional else None
            frames.append(
                generation_cost(
                    tokens,
                    synthetic_tokens,
                    prompt,
                    settings.experiment.model,
                    vocabulary,
                    sampled.get("synthetic_documents"),
                )
            )
    release_staging(scratch)
    table = pl.concat(frames)
    budget, equal = plan.tokens, equal_total_compute(table)
    return dg.MaterializeResult(
        value=table,
        metadata={
            "dagster/row_count": len(table),
            "tokens_per_arm": budget,
            "steps_per_arm": plan.steps,
            **({"baseline_repetitions_at_equal_total_compute": equal.repetitions} if equal else {}),
            "synthetic_share": float(table.filter(pl.col("source") == SYNTHETIC)["tokens_read"].sum() / budget),
            **progress.metadata(),
            "preview": dg.MetadataValue.md(table_preview(table)),
        },
    )
