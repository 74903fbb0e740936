"""Synthesizer-tuning: the examples made from neighbour pairs, and the model tuned on them (paper section 2.2)."""

from pathlib import Path

import dagster as dg
import polars as pl

from sbp_assets.corpus.tokenizer import decode, load_tokenizer, related_id
from sbp_assets.dagster_support.partitions import ALL, first_seed
from sbp_assets.dagster_support.preview import escape
from sbp_assets.dagster_support.stage import for_settings
from sbp_assets.pretraining.assets import execution_fields, model_columns, optimizer_of, train
from sbp_assets.settings import Optimizer, Settings
from sbp_assets.storage.artifacts import staging
from sbp_assets.storage.column_metadata import lineage, schema
from sbp_assets.storage.progress import Progress
from sbp_assets.storage.token_arrays import TokenArrays
from sbp_assets.synthesizer.examples import HELDOUT, TRAIN, write_examples
from sbp_assets.training.checkpoint import best_model
from sbp_assets.training.spec import ExamplesData, Source, TrainingSpec
from sbp_assets.training.trainer import Trainer


@for_settings(
    lambda settings: dg.asset(
        ins={
            "neighbor_pairs": dg.AssetIn(["pairing", "neighbor_pairs"], partition_mapping=ALL),
            "tokens": dg.AssetIn(["corpus", "tokens"], partition_mapping=ALL),
            "tokenizer": dg.AssetIn(["corpus", "tokenizer"]),
        },
        kinds={"polars", "numpy"},
        io_manager_key="directory",
        code_version=settings.experiment.version("1", "max_document_tokens", "synthesizer.partners"),
        metadata=schema(
            ("id", "string", "`d1->d2`; of documents.parquet, as all but the last."),
            ("d1", "string", "Seed document."),
            ("d2", "string", "Related document."),
            ("prompt_tokens", "int", "Leading tokens, up to and with `<related>`, that take no loss."),
            ("cut", "bool", "Whether d2 was cut, so that there is no `<eos>`."),
            ("split", "string", "train or heldout."),
            ("tokens", "array[uint]", "Of tokens.npy: `<bos>` d1 `<related>` d2 `<eos>`."),
        )
        | lineage(
            {"pairing/neighbor_pairs": ("d1", "d2")},
            id="pairing/neighbor_pairs.d1 pairing/neighbor_pairs.d2",
            split="pairing/neighbor_pairs.d1",
            **dict.fromkeys(
                ("prompt_tokens", "cut", "tokens"),
                "pairing/neighbor_pairs.d1 pairing/neighbor_pairs.d2 corpus/tokens.tokens",
            ),
        ),
    )
)
def tuning_examples(
    settings: dg.ResourceParam[Settings],
    neighbor_pairs: dict[str, pl.LazyFrame],
    tokens: dict[str, Path],
    tokenizer: Path,
) -> dg.MaterializeResult[Path]:
    """Token arrays of `<bos> d1 <related> d2 <eos>`, one per neighbour pair; the loss is on d2 alone.

    Where synthesizer.partners is random, a placebo, the same d1 and d2 stand in pairs dealt at random.

    documents.parquet: id ("d1->d2"), d1, d2, prompt_tokens (tokens up to and with `<related>`), cut (d2 was cut, so
    there is no `<eos>`), split ("train", or "heldout": the pairs of 2% of the seed documents, to measure the
    conditional loss on; their d2 may be in other pairs of "train", so that it is no measure of unseen text).
    """
    directory = staging(settings.deployment.work_dir, "tuning_examples")
    loaded = load_tokenizer(tokenizer)
    with Progress("tuning_examples", "examples") as progress:
        documents = write_examples(
            directory,
            neighbor_pairs,
            tokens,
            related_id(loaded),
            settings.experiment.max_document_tokens,
            len(loaded),
            progress,
            settings.experiment.first_seed if settings.experiment.synthesizer.partners == "random" else None,
        )
    arrays = TokenArrays.load(directory)
    first = decode(loaded, arrays.tokens[: arrays.offsets[1]])
    return dg.MaterializeResult(
        value=directory,
        metadata={
            "examples": len(documents),
            "heldout_examples": int((documents["split"] == HELDOUT).sum()),
            "seed_documents": documents["d1"].n_unique(),
            "cut_share": float(documents["cut"].cast(pl.Float64).mean()),  # type: ignore[arg-type]
            "tokens": len(arrays.tokens),
            "loss_tokens": int(len(arrays.tokens) - documents["prompt_tokens"].sum()),
            **progress.metadata(),
            "preview": dg.MetadataValue.md(escape(first, 2000)),
        },
    )


@for_settings(
    lambda settings: dg.asset(
        ins={
            "baseline_model": dg.AssetIn(["pretraining", "baseline_model"], partition_mapping=first_seed(settings)),
            "tuning_examples": dg.AssetIn(["synthesizer", "tuning_examples"]),
            "tokenizer": dg.AssetIn(["corpus", "tokenizer"]),
        },
        kinds={"pytorch", "huggingface"},
        io_manager_key="directory",
        pool="device",
        code_version=settings.experiment.version(
            "1",
            "model",
            "synthesizer.epochs",
            "synthesizer.start",
            "first_seed",
            "pretraining.evaluations",
            "pretraining.heldout_tokens",
            *(f"synthesizer.{field}" for field in Optimizer.model_fields),
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

    synthesizer.start says from which of the baseline's weights, or (an ablation) from random ones.

    A Hugging Face model directory like the arms', with the same records. Held-out loss is that of d2 given d1 on the
    held-out examples.
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
        seed=settings.experiment.pretraining.seeds[0],
        heldout=[Source(directory=tuning_examples, split=HELDOUT)],
        heldout_tokens=settings.experiment.pretraining.heldout_tokens,
        evaluations=settings.experiment.pretraining.evaluations,
        **execution_fields(settings.deployment, "synthesizer", "checkpoint"),
    )
    directory, metadata = train(context, trainer, spec, settings.deployment.training_processes)
    return dg.MaterializeResult(value=directory, metadata=metadata)
