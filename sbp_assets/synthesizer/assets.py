"""The assets of synthesizer-tuning: examples of neighbour pairs, and the model tuned on them (paper section 2.2)."""

from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl

from sbp_assets.corpus.tokenizer import decode, load_tokenizer, related_id
from sbp_assets.dagster_support.partitions import ALL, first_seed, shards
from sbp_assets.dagster_support.preview import escape
from sbp_assets.dagster_support.stage import for_settings
from sbp_assets.pretraining.assets import ALL_TOKENS, TOKENIZER, execution_fields, model_columns, optimizer_of, train
from sbp_assets.settings import Optimizer, Settings
from sbp_assets.storage.artifacts import release_staging, staging
from sbp_assets.storage.column_metadata import column_metadata
from sbp_assets.storage.paths import scan_table
from sbp_assets.storage.progress import Progress
from sbp_assets.synthesizer.earlier_round import COLUMNS as EARLIER_COLUMNS
from sbp_assets.synthesizer.earlier_round import PAIRS, write_earlier_pairs
from sbp_assets.synthesizer.examples import EXAMPLE_COLUMNS, HELDOUT, TRAIN, write_examples
from sbp_assets.training.checkpoint import best_model
from sbp_assets.training.spec import ExamplesData, Source, TrainingSpec
from sbp_assets.training.trainer import Trainer

ALL_PAIRS = dg.AssetIn(["pairing", "neighbor_pairs"], partition_mapping=ALL)


def earlier_round_of(settings: Settings) -> dict[str, dg.AssetIn]:
    """Return the input that has the pairs of an earlier round: none where synthesizer.earlier_round is null."""
    if settings.experiment.synthesizer.earlier_round is None:
        return {}
    key = ["synthesizer", "earlier_pairs"]
    return {"earlier_pairs": dg.AssetIn(key, partition_mapping=ALL, dagster_type=dict[str, Path])}


def by_round(shards: dict[str, Path]) -> dict[str, Path]:
    """Return pairs or tokens of an earlier round by keys of their own, to stand beside this round's."""
    return {f"earlier-{shard}": path for shard, path in shards.items()}


def _seed_if_set(settings: Settings) -> list[str]:
    """Return the key of the tuning seed; nothing where it is null, so that stores from before the setting are kept."""
    return [] if settings.experiment.synthesizer.seed is None else ["synthesizer.seed"]


@for_settings(
    lambda settings: (
        dg.asset(
            ins={
                "neighbor_pairs": dg.AssetIn(["pairing", "neighbor_pairs"]),
                "tokens": dg.AssetIn(["corpus", "tokens"]),
                "tokenizer": TOKENIZER,
            },
            partitions_def=shards(settings),
            kinds={"huggingface", "numpy"},
            io_manager_key="directory",
            code_version=settings.experiment.version("1", "synthesizer.earlier_round"),
            metadata=column_metadata(EARLIER_COLUMNS),
        )
        if settings.experiment.synthesizer.earlier_round is not None
        else None
    )
)
def earlier_pairs(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    neighbor_pairs: pl.LazyFrame,
    tokens: Path,
    tokenizer: Path,
) -> dg.MaterializeResult[Path]:
    """Pairs of an earlier round: synthetic documents of another run, each with its seed document, in either order.

    The directory holds the pairs, as many as the shard has neighbour pairs, and the tokens of the synthetic documents.
    It exists where synthesizer.earlier_round names that run. What changes there is read when this is materialised
    again.
    """
    artifacts = settings.experiment.synthesizer.earlier_round
    assert artifacts is not None
    directory = staging(settings.deployment.work_dir, "earlier_pairs", context.partition_key)
    counts = write_earlier_pairs(
        directory,
        Path(artifacts),
        context.partition_key,
        tokens,
        neighbor_pairs.select(pl.len()).collect().item(),
        load_tokenizer(tokenizer),
    )
    return dg.MaterializeResult(value=directory, metadata=counts)


@for_settings(
    lambda settings: dg.asset(
        ins={
            "neighbor_pairs": ALL_PAIRS,
            "tokens": ALL_TOKENS,
            "tokenizer": TOKENIZER,
            **earlier_round_of(settings),
        },
        kinds={"polars", "numpy"},
        io_manager_key="directory",
        code_version=settings.experiment.version(
            "1",
            "max_document_tokens",
            "synthesizer.partners",
            *(_seed_if_set(settings) if settings.experiment.synthesizer.partners == "random" else []),
            *(["synthesizer.earlier_round"] if earlier_round_of(settings) else []),
        ),
        metadata=column_metadata(
            EXAMPLE_COLUMNS,
            **(
                {
                    column.name: f"{column.sources} synthesizer/earlier_pairs.d1 synthesizer/earlier_pairs.d2"
                    for column in EXAMPLE_COLUMNS
                }
                if earlier_round_of(settings)
                else {}
            ),
        ),
    )
)
def tuning_examples(
    settings: dg.ResourceParam[Settings],
    neighbor_pairs: dict[str, pl.LazyFrame],
    tokens: dict[str, Path],
    tokenizer: Path,
    **earlier_pairs: dict[str, Path],
) -> dg.MaterializeResult[Path]:
    """Token arrays of `<bos> d1 <related> d2 <eos>`, one per pair; the loss is on d2 alone.

    The pairs are neighbours and, where synthesizer.earlier_round is set, those of synthesizer/earlier_pairs. Where
    synthesizer.partners is random, which is a placebo, the same d1 and d2 stand in pairs dealt at random.

    The split is "train", or "heldout" for the pairs of 2% of the seed documents, on which the conditional loss is
    measured. Their d2 may stand in other pairs of "train", so this loss does not measure unseen text.
    """
    directory = staging(settings.deployment.work_dir, "tuning_examples")
    scratch = staging(settings.deployment.work_dir, "tuning_examples_joined")
    loaded = load_tokenizer(tokenizer)
    for earlier in map(by_round, earlier_pairs.values()):
        neighbor_pairs = neighbor_pairs | {shard: scan_table(path / PAIRS) for shard, path in earlier.items()}
        tokens = tokens | earlier
    with Progress("tuning_examples", "examples") as progress:
        counts = write_examples(
            directory,
            neighbor_pairs,
            tokens,
            related_id(loaded),
            settings.experiment.max_document_tokens,
            len(loaded),
            scratch,
            settings.deployment.memory_limit,
            progress,
            settings.experiment.tuning_seed if settings.experiment.synthesizer.partners == "random" else None,
        )
    release_staging(scratch)
    written, offsets = (
        np.load(directory / name, mmap_mode="r", allow_pickle=False) for name in ("tokens.npy", "offsets.npy")
    )
    first = decode(loaded, written[: offsets[1]])
    return dg.MaterializeResult(
        value=directory,
        metadata={
            "examples": counts["examples"],
            "heldout_examples": counts["heldout_examples"],
            "seed_documents": counts["seed_documents"],
            "cut_share": counts["cut_examples"] / counts["examples"],
            "tokens": counts["tokens"],
            "loss_tokens": counts["tokens"] - counts["prompt_tokens"],
            **progress.metadata(),
            "preview": dg.MetadataValue.md(escape(first, 2000)),
        },
    )


@for_settings(
    lambda settings: dg.asset(
        ins={
            "baseline_model": dg.AssetIn(["pretraining", "baseline_model"], partition_mapping=first_seed(settings)),
            "tuning_examples": dg.AssetIn(["synthesizer", "tuning_examples"]),
            "tokenizer": TOKENIZER,
        },
        kinds={"pytorch", "huggingface"},
        io_manager_key="directory",
        pool="device",
        code_version=settings.experiment.version(
            "2",
            "model",
            "synthesizer.epochs",
            "synthesizer.start",
            "first_seed",
            "pretraining.evaluations",
            "pretraining.heldout_tokens",
            *(f"synthesizer.{field}" for field in Optimizer.model_fields),
            *_seed_if_set(settings),
        ),
        metadata=model_columns(
            "synthesizer/tuning_examples.tokens",
            *([] if settings.experiment.synthesizer.start == "scratch" else ["pretraining/baseline_model.weights"]),
        ),
    )
)
def checkpoint(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    trainer: dg.ResourceParam[Trainer],
    baseline_model: Path,
    tuning_examples: Path,
    tokenizer: Path,
) -> dg.MaterializeResult[Path]:
    """The synthesizer: the first seed's baseline, tuned to continue a seed document with a related one, p(d2 | d1).

    The setting synthesizer.start chooses the weights to start from: the baseline's, its best ones, or (an ablation)
    random ones.

    It is a Hugging Face model directory with metrics.parquet and run.json, like the arms' models. The held-out loss
    is that of d2 given d1 on the held-out examples.
    """
    starts = {"final": baseline_model, "early_stopped": best_model(baseline_model), "scratch": None}
    spec = TrainingSpec(
        name="synthesizer",
        model=settings.experiment.model,
        optimizer=optimizer_of(settings.experiment.synthesizer),
        tokenizer_dir=tokenizer,
        initial_model=starts[settings.experiment.synthesizer.start],
        data=ExamplesData(
            source=Source(directory=tuning_examples, split=TRAIN), epochs=settings.experiment.synthesizer.epochs
        ),
        seed=settings.experiment.tuning_seed,
        heldout=[Source(directory=tuning_examples, split=HELDOUT)],
        heldout_tokens=settings.experiment.pretraining.heldout_tokens,
        evaluations=settings.experiment.pretraining.evaluations,
        **execution_fields(settings.deployment, "synthesizer", "checkpoint"),
    )
    directory, metadata = train(context, trainer, spec, settings.deployment.training_processes)
    return dg.MaterializeResult(value=directory, metadata=metadata)
