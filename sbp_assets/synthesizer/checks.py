"""The checks of the tuning examples and of the synthesizer."""

from pathlib import Path

import dagster as dg
import polars as pl

from sbp_assets.corpus.split import UNIQUE
from sbp_assets.corpus.tokenizer import load_tokenizer, related_id
from sbp_assets.dagster_support.check_results import check_result, problems_result
from sbp_assets.pretraining.assets import ALL_TOKENS, TOKENIZER
from sbp_assets.pretraining.curves import heldout_problems, loss_problems, loss_summary
from sbp_assets.pretraining.model_files import model_problems, weight_problems
from sbp_assets.settings import Settings
from sbp_assets.storage.paths import read_table, scan_table
from sbp_assets.storage.token_arrays import TokenArrays
from sbp_assets.synthesizer.assets import ALL_PAIRS
from sbp_assets.synthesizer.audit import check_contents, check_examples


@dg.asset_check(
    asset=["synthesizer", "tuning_examples"],
    blocking=True,
    additional_ins={"neighbor_pairs": ALL_PAIRS, "tokens": ALL_TOKENS, "tokenizer": TOKENIZER},
    description="There is one example per pair, inside the context, of documents in D; its prompt ends at `<related>`, "
    "and it ends with `<eos>` unless d2 was cut. The tokens of a sample are those of its documents.",
)
def examples_are_well_formed(
    settings: dg.ResourceParam[Settings],
    tuning_examples: Path,
    neighbor_pairs: dict[str, pl.LazyFrame],
    tokens: dict[str, Path],
    tokenizer: Path,
) -> dg.AssetCheckResult:
    arrays = TokenArrays.load(tuning_examples)
    loaded = load_tokenizer(tokenizer)
    pairs = int(pl.concat([frame.select(pl.len()) for frame in neighbor_pairs.values()]).collect()["len"].sum())
    documents = pl.concat([scan_table(path / "documents.parquet") for path in tokens.values()])
    unique = documents.filter(pl.col("split") == UNIQUE).select("id").collect()["id"]
    broken = check_examples(
        arrays,
        pairs,
        unique,
        settings.experiment.model.context_length,
        related_id(loaded),
        loaded.eos_token_id,
    )
    broken |= check_contents(
        arrays,
        neighbor_pairs,
        tokens,
        related_id(loaded),
        settings.experiment.max_document_tokens,
        settings.experiment.synthesizer.partners == "random",
    )
    counts = {"examples": len(arrays.documents), "pairs": pairs}
    return check_result(passed=not broken, metadata={**counts, **broken})


@dg.asset_check(
    asset=["synthesizer", "checkpoint"],
    blocking=True,
    description="The tuning loss is finite and falls; on held-out examples d2 given d1 is likelier than at the start.",
)
def conditional_loss_decreases(checkpoint: Path) -> dg.AssetCheckResult:
    metrics = read_table(checkpoint / "metrics.parquet")
    problems = loss_problems(metrics) + heldout_problems(metrics)
    return problems_result(problems, **loss_summary(metrics))


@dg.asset_check(
    asset=["synthesizer", "checkpoint"],
    blocking=True,
    additional_ins={"tokenizer": TOKENIZER},
    description="The directory loads: every tensor has its shape, and the vocabulary is that of corpus/tokenizer.",
)
def synthesizer_loads(checkpoint: Path, tokenizer: Path) -> dg.AssetCheckResult:
    return problems_result(model_problems(checkpoint, tokenizer))


@dg.asset_check(asset=["synthesizer", "checkpoint"], blocking=True, description="Every weight is a finite number.")
def weights_are_finite(checkpoint: Path) -> dg.AssetCheckResult:
    return problems_result(weight_problems(checkpoint))
