"""The checks of the tuning examples and of the synthesizer."""

from pathlib import Path
from typing import Any

import dagster as dg

from sbp_assets.corpus.tokenizer import load_tokenizer, related_id
from sbp_assets.dagster_support.check_results import check_result, problems_result
from sbp_assets.dagster_support.partitions import shards
from sbp_assets.dagster_support.stage import for_settings
from sbp_assets.pretraining.assets import ALL_TOKENS, TOKENIZER
from sbp_assets.pretraining.curves import heldout_problems, loss_problems, loss_summary
from sbp_assets.pretraining.model_files import model_problems, weight_problems
from sbp_assets.settings import Settings
from sbp_assets.storage.artifacts import release_staging, staging
from sbp_assets.storage.paths import read_table, row_count
from sbp_assets.synthesizer.assets import ALL_PAIRS, by_round, earlier_round_of
from sbp_assets.synthesizer.audit import check_contents, check_examples
from sbp_assets.synthesizer.earlier_round import PAIRS, earlier_pairs_problems

WELL_FORMED: dict[str, Any] = {
    "name": "examples_are_well_formed",
    "asset": ["synthesizer", "tuning_examples"],
    "blocking": True,
    "description": "There is one example per pair, inside the context, of documents in D; its prompt ends at "
    "`<related>`, and it ends with `<eos>` unless d2 was cut. The tokens of a sample are those of its documents.",
}
INS = {"neighbor_pairs": ALL_PAIRS, "tokens": ALL_TOKENS, "tokenizer": TOKENIZER}


@for_settings(
    lambda settings: None if earlier_round_of(settings) else dg.asset_check(**WELL_FORMED, additional_ins=INS)
)
def examples_are_well_formed(
    settings: dg.ResourceParam[Settings],
    tuning_examples: Path,
    neighbor_pairs: dict[str, Path],
    tokens: dict[str, Path],
    tokenizer: Path,
) -> dg.AssetCheckResult:
    return _well_formed(settings, tuning_examples, neighbor_pairs, tokens, tokenizer)


@for_settings(
    lambda settings: (
        dg.asset_check(
            asset=["synthesizer", "earlier_pairs"],
            blocking=True,
            partitions_def=shards(settings),
            additional_ins={"tokens": dg.AssetIn(["corpus", "tokens"]), "tokenizer": TOKENIZER},
            description="Each pair joins a synthetic document of the earlier round with a document of D; none is there "
            "twice.",
        )
        if earlier_round_of(settings)
        else None
    )
)
def earlier_pairs_are_of_seed_documents(earlier_pairs: Path, tokens: Path, tokenizer: Path) -> dg.AssetCheckResult:
    loaded = load_tokenizer(tokenizer)
    return problems_result(earlier_pairs_problems(earlier_pairs, tokens, loaded.bos_token_id, loaded.eos_token_id))


# Dagster's checks take each input by its name, and so this one, of the same check, has one input more.
@for_settings(
    lambda settings: (
        dg.asset_check(**WELL_FORMED, additional_ins=INS | earlier) if (earlier := earlier_round_of(settings)) else None
    )
)
def examples_of_both_rounds_are_well_formed(
    settings: dg.ResourceParam[Settings],
    tuning_examples: Path,
    neighbor_pairs: dict[str, Path],
    tokens: dict[str, Path],
    tokenizer: Path,
    earlier_pairs: dict[str, Path],
) -> dg.AssetCheckResult:
    earlier = by_round(earlier_pairs)
    pairs = neighbor_pairs | {shard: path / PAIRS for shard, path in earlier.items()}
    return _well_formed(settings, tuning_examples, pairs, tokens | earlier, tokenizer)


def _well_formed(
    settings: Settings, examples: Path, pair_tables: dict[str, Path], tokens: dict[str, Path], tokenizer: Path
) -> dg.AssetCheckResult:
    loaded, experiment = load_tokenizer(tokenizer), settings.experiment
    pairs = sum(row_count(path) for path in pair_tables.values())
    scratch = staging(settings.deployment.work_dir, "tuning_examples_check")
    broken = check_examples(
        examples,
        tokens,
        pairs,
        experiment.model.context_length,
        related_id(loaded),
        loaded.eos_token_id,
        scratch,
        settings.deployment.memory_limit,
    )
    broken |= check_contents(
        examples,
        pair_tables,
        tokens,
        related_id(loaded),
        experiment.max_document_tokens,
        experiment.synthesizer.partners == "random",
        scratch,
        settings.deployment.memory_limit,
    )
    release_staging(scratch)
    counts = {"examples": row_count(examples / "documents.parquet"), "pairs": pairs}
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
