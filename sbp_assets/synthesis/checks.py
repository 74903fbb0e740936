"""Checks of the synthetic documents, their tokens and their quality table."""

from functools import partial
from pathlib import Path

import dagster as dg
import polars as pl

from sbp_assets.corpus.split import UNIQUE
from sbp_assets.corpus.tokenizer import decode, encode_documents, load_tokenizer
from sbp_assets.dagster_support.check_results import check_result, last_version
from sbp_assets.dagster_support.partitions import shards
from sbp_assets.dagster_support.stage import for_settings
from sbp_assets.settings import Settings
from sbp_assets.storage.token_arrays import TokenArrays
from sbp_assets.synthesis import verify
from sbp_assets.synthesis.assets import sampled_key
from sbp_assets.synthesis.generate import shard_budget
from sbp_assets.synthesis.posterior import LEVEL, UNKNOWN, copying_problems, leak_problems, table_problems
from sbp_assets.synthesis.quality import expected_rows

DOCUMENTS = dg.AssetKey(["synthesis", "synthetic_documents"])
TOKENS = dg.AssetKey(["synthesis", "synthetic_tokens"])
QUALITY = dg.AssetKey(["synthesis", "quality"])
JUDGEMENTS = dg.AssetKey(["synthesis", "judgements"])
QUALITY_TABLE = dg.AssetKey(["synthesis", "quality_table"])
POSTERIOR = dg.AssetKey(["synthesis", "posterior_predictive"])
CORPUS_TOKENS = dg.AssetIn(["corpus", "tokens"])
VALUES = "Every metric once per corpus and method, its value flagged / scored, or null where nothing was scored."


@for_settings(
    lambda settings: dg.asset_check(
        asset=DOCUMENTS,
        partitions_def=shards(settings),
        blocking=True,
        additional_ins={"tokens": CORPUS_TOKENS},
        description="Ids are unique and every seed is a document of D in this shard, so none is held out.",
    )
)
def ids_are_unique_and_seeds_in_unique_split(synthetic_documents: pl.LazyFrame, tokens: Path) -> dg.AssetCheckResult:
    rows = synthetic_documents.select("id", "seed_id").collect()
    repeated, foreign = verify.repeated_ids(rows), verify.foreign_seeds(rows, _unique_ids(tokens))
    return check_result(
        passed=not repeated and not foreign,
        metadata={"rows": len(rows), "repeated_ids": repeated, "seeds_outside_unique": foreign},
    )


@for_settings(
    lambda settings: dg.asset_check(
        asset=DOCUMENTS,
        partitions_def=shards(settings),
        blocking=True,
        additional_ins={"tokens": CORPUS_TOKENS},
        description="The shard's token budget is reached, and by the last document.",
    )
)
def synthetic_tokens_reach_budget(
    settings: dg.ResourceParam[Settings], synthetic_documents: pl.LazyFrame, tokens: Path
) -> dg.AssetCheckResult:
    rows = synthetic_documents.select("n_tokens").collect()
    arrays = TokenArrays.load(tokens)
    seed_tokens = int(arrays.lengths[(arrays.documents["split"] == UNIQUE).to_numpy()].sum())
    budget = shard_budget(
        seed_tokens, settings.experiment.pretraining.repetitions, settings.experiment.pretraining.synthetic_share
    )
    problems = verify.budget_problems(rows, budget)
    return check_result(
        passed=not problems,
        metadata={"tokens": int(rows["n_tokens"].sum()), "token_budget": budget, "problems": problems},
    )


@for_settings(
    lambda settings: dg.asset_check(
        asset=DOCUMENTS,
        partitions_def=shards(settings),
        blocking=True,
        description="Text is not blank, the finish reason is stop or length, the id is made of seed and rollout.",
    )
)
def rows_are_valid(synthetic_documents: pl.LazyFrame) -> dg.AssetCheckResult:
    rows = synthetic_documents.collect()
    bad = verify.bad_rows(rows)
    return check_result(passed=not bad, metadata={"rows": len(rows), "bad_ids": bad})


@for_settings(
    lambda settings: dg.asset_check(
        asset=DOCUMENTS,
        partitions_def=shards(settings),
        blocking=True,
        additional_ins={"tokenizer": dg.AssetIn(["corpus", "tokenizer"])},
        additional_deps=[sampled_key(settings)],
        description="Every row was sampled with its request's seed from the present synthesizer, all by one "
        "engine, and "
        "counts its tokens (a sample is counted again).",
    )
)
def rows_match_requests(
    context: dg.AssetCheckExecutionContext,
    settings: dg.ResourceParam[Settings],
    synthetic_documents: pl.LazyFrame,
    tokenizer: Path,
) -> dg.AssetCheckResult:
    rows, loaded = synthetic_documents.collect(), load_tokenizer(tokenizer)
    version = last_version(
        context.instance,
        sampled_key(settings),
        None if settings.experiment.conditional else settings.experiment.seed_keys[0],
    )
    others = verify.other_requests(rows, settings.experiment.synthesis.salt, version)
    engines = verify.other_engines(rows)
    miscounted = verify.miscounted(rows, lambda texts: [len(ids) for ids in encode_documents(loaded, texts)])
    return check_result(
        passed=not others and not engines and not miscounted,
        metadata={
            "rows": len(rows),
            "synthesizer": str(version),
            "other_requests": others,
            "other_engines": engines,
            "miscounted": miscounted,
        },
    )


@for_settings(
    lambda settings: dg.asset_check(
        asset=DOCUMENTS,
        partitions_def=shards(settings),
        blocking=True,
        additional_ins={"tokens": CORPUS_TOKENS},
        description="No (seed, rollout) twice; rows stand in request order; only few places of it are empty syntheses.",
    )
)
def rollouts_are_contiguous(synthetic_documents: pl.LazyFrame, tokens: Path) -> dg.AssetCheckResult:
    rows = synthetic_documents.select("id", "seed_id", "rollout").collect()
    allowed = verify.allowed_empty(len(rows))
    problems = verify.rollout_problems(rows, _unique_ids(tokens), allowed)
    return check_result(
        passed=not problems, metadata={"rows": len(rows), "allowed_empty": allowed, "problems": problems}
    )


@for_settings(
    lambda settings: dg.asset_check(
        asset=DOCUMENTS,
        partitions_def=shards(settings),
        description=f"At most {verify.MAX_LENGTH_SHARE:.0%} of the syntheses were cut off by the context.",
    )
)
def synthetic_documents_are_not_truncated(synthetic_documents: pl.LazyFrame) -> dg.AssetCheckResult:
    share = verify.length_share(synthetic_documents.select("finish_reason").collect())
    return check_result(
        passed=share <= verify.MAX_LENGTH_SHARE,
        # Sampling again would give the same: a person has to decide.
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"share_length": share, "bound": verify.MAX_LENGTH_SHARE},
    )


@for_settings(
    lambda settings: dg.asset_check(
        asset=TOKENS,
        partitions_def=shards(settings),
        blocking=True,
        additional_ins={
            "synthetic_documents": dg.AssetIn(["synthesis", "synthetic_documents"]),
            "tokenizer": dg.AssetIn(["corpus", "tokenizer"]),
        },
        description="One token list per row, of its n_tokens, `<bos>` … `<eos>`, that decodes to its text.",
    )
)
def synthetic_tokens_match_documents(
    synthetic_tokens: Path, synthetic_documents: pl.LazyFrame, tokenizer: Path
) -> dg.AssetCheckResult:
    arrays, rows, loaded = TokenArrays.load(synthetic_tokens), synthetic_documents.collect(), load_tokenizer(tokenizer)
    problems = verify.token_problems(rows, arrays, partial(decode, loaded), loaded.bos_token_id, loaded.eos_token_id)
    return check_result(passed=not problems, metadata={"rows": len(rows), "problems": problems})


@for_settings(
    lambda settings: dg.asset_check(asset=QUALITY, partitions_def=shards(settings), blocking=True, description=VALUES)
)
def quality_is_valid(settings: dg.ResourceParam[Settings], quality: pl.LazyFrame) -> dg.AssetCheckResult:
    problems = verify.quality_problems(
        quality.collect(), expected_rows(settings.experiment.truth is not None, judged=False)
    )
    return check_result(passed=not problems, metadata={"problems": problems})


@dg.asset_check(
    asset=JUDGEMENTS,
    blocking=True,
    description="Each question once, with a verdict or a reason for none; empty without a judge.",
)
def judgements_are_valid(settings: dg.ResourceParam[Settings], judgements: pl.LazyFrame) -> dg.AssetCheckResult:
    rows, configured = judgements.collect(), settings.experiment.synthesis.judge is not None
    problems = verify.judgement_problems(rows) if configured else [] if rows.is_empty() else ["rows without a judge"]
    return check_result(
        passed=not problems, metadata={"judge_configured": configured, "rows": len(rows), "problems": problems}
    )


@dg.asset_check(
    asset=JUDGEMENTS,
    # Blocks nothing: the rest is asked again by the next run.
    description=f"At least {verify.MIN_JUDGED_SHARE:.0%} of the questions have a verdict.",
)
def judge_answered_most_questions(judgements: pl.LazyFrame) -> dg.AssetCheckResult:
    rows = judgements.collect()
    problems = verify.unjudged_problems(rows)
    return check_result(passed=not problems, metadata={"judged": rows["verdict"].count(), "problems": problems})


@dg.asset_check(asset=QUALITY_TABLE, blocking=True, description=VALUES)
def quality_table_is_valid(settings: dg.ResourceParam[Settings], quality_table: pl.LazyFrame) -> dg.AssetCheckResult:
    expected = expected_rows(
        settings.experiment.truth is not None, judged=settings.experiment.synthesis.judge is not None
    )
    problems = verify.quality_problems(quality_table.collect(), expected)
    return check_result(passed=not problems, metadata={"problems": problems})


@dg.asset_check(
    asset=POSTERIOR,
    blocking=True,
    description="Every group once, with shares that lie in [0, 1] and as many statements as its parts; empty without "
    "a truth.",
)
def posterior_table_is_valid(
    settings: dg.ResourceParam[Settings], posterior_predictive: pl.LazyFrame
) -> dg.AssetCheckResult:
    table = posterior_predictive.collect()
    problems = (
        table_problems(table) if settings.experiment.truth else [] if table.is_empty() else ["rows without a truth"]
    )
    return check_result(passed=not problems, metadata={"rows": len(table), "problems": problems})


@dg.asset_check(
    asset=POSTERIOR,
    description="Facts that D states nowhere are right no more often than by chance "
    f"(randomisation test at {LEVEL:.1%} over both groups of them): no text outside D has reached the synthesizer.",
)
def unknown_facts_are_at_chance(posterior_predictive: pl.LazyFrame) -> dg.AssetCheckResult:
    table = posterior_predictive.collect()
    problems = leak_problems(table)
    unknown = table.filter(pl.col("group").is_in(UNKNOWN))
    return check_result(
        passed=not problems, metadata={"statements": int(unknown["statements"].sum()), "problems": problems}
    )


@dg.asset_check(
    asset=POSTERIOR,
    description=f"Facts of d1 are restated right more often than by chance (randomisation test at {LEVEL:.1%}).",
)
def restated_facts_are_above_chance(posterior_predictive: pl.LazyFrame) -> dg.AssetCheckResult:
    table = posterior_predictive.collect()
    problems = copying_problems(table)
    restated = table.filter(pl.col("group") == "restated")
    return check_result(
        passed=not problems,
        # Judging again would give the same: a person has to decide whether to train for longer.
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"statements": int(restated["statements"].sum()), "problems": problems},
    )


def _unique_ids(tokens: Path) -> list[str]:
    documents = TokenArrays.load(tokens).documents
    return documents.filter(pl.col("split") == UNIQUE)["id"].to_list()
