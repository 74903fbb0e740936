"""The checks of the synthetic documents, their tokens and their quality; `audit` does the work."""

from functools import partial
from pathlib import Path

import dagster as dg
import polars as pl

from sbp_assets.corpus.split import UNIQUE
from sbp_assets.corpus.tokenizer import decode, encode_documents, load_tokenizer
from sbp_assets.dagster_support.check_results import check_result, last_version, problems_result
from sbp_assets.dagster_support.partitions import shard_check, shards
from sbp_assets.dagster_support.stage import for_settings
from sbp_assets.pretraining.assets import ALL_SYNTHETIC_DOCUMENTS, TOKENIZER
from sbp_assets.settings import Settings
from sbp_assets.storage.io_managers import DirectoryIOManager
from sbp_assets.storage.token_arrays import TokenArrays
from sbp_assets.synthesis import audit
from sbp_assets.synthesis.assets import SYNTHETIC_DOCUMENTS, TOKENS, filtered_by, sampled_key
from sbp_assets.synthesis.engine import ENGINES
from sbp_assets.synthesis.filter import MAX_DROPPED_SHARE, decision_problems, dropped_share, kept
from sbp_assets.synthesis.generate import order_salt, shard_budget
from sbp_assets.synthesis.novelty import MAX_EXCESS, subject_problems
from sbp_assets.synthesis.novelty import copying_problems as copying_excess
from sbp_assets.synthesis.novelty import table_problems as novelty_problems
from sbp_assets.synthesis.posterior_table import LEVEL, UNKNOWN, copying_problems, leak_problems, table_problems
from sbp_assets.synthesis.quality import expected_rows
from sbp_assets.synthesis.real_pairs import NO_ENGINE

VALUES = "Every metric once per corpus and method, its value flagged / scored, or null where nothing was scored."


@shard_check(
    asset=["synthesis", "synthetic_documents"],
    additional_ins={"tokens": TOKENS},
    blocking=True,
    description="Ids are unique, and every seed is a document of D in this shard, so none is held out.",
)
def ids_are_unique_and_seeds_in_unique_split(synthetic_documents: pl.LazyFrame, tokens: Path) -> dg.AssetCheckResult:
    rows = synthetic_documents.select("id", "seed_id").collect()
    repeated, foreign = audit.repeated_ids(rows), audit.foreign_seeds(rows, _unique_ids(tokens))
    return check_result(
        passed=not repeated and not foreign,
        metadata={"rows": len(rows), "repeated_ids": repeated, "seeds_outside_unique": foreign},
    )


@shard_check(
    asset=["synthesis", "synthetic_documents"],
    additional_ins={"tokens": TOKENS},
    blocking=True,
    description="The shard's token budget is reached, and by the last document.",
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
    return problems_result(audit.budget_problems(rows, budget), tokens=int(rows["n_tokens"].sum()), token_budget=budget)


@shard_check(
    asset=["synthesis", "synthetic_documents"],
    blocking=True,
    description="Text is not blank, the finish reason is stop or length, and the id is made of seed and rollout.",
)
def rows_are_valid(synthetic_documents: pl.LazyFrame) -> dg.AssetCheckResult:
    rows = synthetic_documents.collect()
    bad = audit.bad_rows(rows)
    return check_result(passed=not bad, metadata={"rows": len(rows), "bad_ids": bad})


@for_settings(
    lambda settings: dg.asset_check(
        asset=["synthesis", "synthetic_documents"],
        partitions_def=shards(settings),
        blocking=True,
        additional_ins={"tokenizer": TOKENIZER},
        additional_deps=[sampled_key(settings)],
        description="Every row was sampled with its request's seed from the present synthesizer, all by one engine, "
        "and counts its tokens (a sample is counted again).",
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
        settings.experiment.seed_keys[0] if settings.experiment.synthesis.condition == "none" else None,
    )
    others = audit.other_requests(rows, settings.experiment.synthesis.salt, version)
    engines = audit.other_engines(rows, ENGINES if settings.experiment.sampled else [NO_ENGINE])
    miscounted = audit.miscounted(rows, lambda texts: [len(ids) for ids in encode_documents(loaded, texts)])
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


@shard_check(
    asset=["synthesis", "synthetic_documents"],
    additional_ins={"tokens": TOKENS},
    blocking=True,
    description="No (seed, rollout) occurs twice, rows are in request order, and few places of that order were empty "
    "documents.",
)
def rollouts_are_contiguous(
    settings: dg.ResourceParam[Settings], synthetic_documents: pl.LazyFrame, tokens: Path
) -> dg.AssetCheckResult:
    rows = synthetic_documents.select("id", "seed_id", "rollout").collect()
    # A seed document takes part in as many rounds as it has pairs.
    allowed = audit.allowed_empty(len(rows)) if settings.experiment.sampled else None
    salt = order_salt(settings.experiment.synthesis)
    problems = audit.rollout_problems(rows, _unique_ids(tokens), allowed, salt)
    return problems_result(problems, rows=len(rows), allowed_empty="any" if allowed is None else allowed)


@shard_check(
    asset=["synthesis", "synthetic_documents"],
    description=f"At most {audit.MAX_LENGTH_SHARE:.0%} of the synthetic documents were cut off by the context.",
)
def synthetic_documents_are_not_truncated(synthetic_documents: pl.LazyFrame) -> dg.AssetCheckResult:
    share = audit.length_share(synthetic_documents.select("finish_reason").collect())
    return check_result(
        passed=share <= audit.MAX_LENGTH_SHARE,
        # Sampling again would give the same: a person has to decide.
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"share_length": share, "bound": audit.MAX_LENGTH_SHARE},
    )


@for_settings(
    lambda settings: dg.asset_check(
        asset=["synthesis", "synthetic_tokens"],
        partitions_def=shards(settings),
        additional_ins={"synthetic_documents": SYNTHETIC_DOCUMENTS, "tokenizer": TOKENIZER},
        additional_deps=[["synthesis", name] for name in filtered_by(settings)],
        blocking=True,
        description="There is one token list per row, of its n_tokens, `<bos>` … `<eos>`, that decodes to its text.",
    )
)
def synthetic_tokens_match_documents(
    context: dg.AssetCheckExecutionContext,
    settings: dg.ResourceParam[Settings],
    directory: dg.ResourceParam[DirectoryIOManager],
    synthetic_tokens: Path,
    synthetic_documents: pl.LazyFrame,
    tokenizer: Path,
) -> dg.AssetCheckResult:
    arrays, rows, loaded = TokenArrays.load(synthetic_tokens), synthetic_documents.collect(), load_tokenizer(tokenizer)
    for name in filtered_by(settings):
        rows = kept(rows, directory.fetch(dg.AssetKey(["synthesis", name])), context.partition_key)
    problems = audit.token_problems(rows, arrays, partial(decode, loaded), loaded.bos_token_id, loaded.eos_token_id)
    return problems_result(problems, rows=len(rows))


@for_settings(
    lambda settings: (
        dg.asset_check(
            asset=["synthesis", "filter_decisions"],
            blocking=True,
            additional_ins={"synthetic_documents": ALL_SYNTHETIC_DOCUMENTS},
            description="There is one decision per synthetic document, in their order, and it follows from its values.",
        )
        if settings.experiment.synthesis.filter.drops
        else None
    )
)
def decisions_follow_from_values(
    settings: dg.ResourceParam[Settings], filter_decisions: Path, synthetic_documents: dict[str, pl.LazyFrame]
) -> dg.AssetCheckResult:
    criteria = settings.experiment.synthesis.filter
    return problems_result(list(decision_problems(filter_decisions, synthetic_documents, criteria)))


@for_settings(
    lambda settings: (
        dg.asset_check(
            asset=["synthesis", "filter_decisions"],
            description=f"At most {MAX_DROPPED_SHARE:.0%} of the synthetic tokens are dropped; D is read instead.",
        )
        if settings.experiment.synthesis.filter.drops
        else None
    )
)
def most_synthetic_tokens_are_kept(settings: dg.ResourceParam[Settings], filter_decisions: Path) -> dg.AssetCheckResult:
    share = dropped_share(filter_decisions, settings.experiment.shard_keys)
    return check_result(
        passed=share <= MAX_DROPPED_SHARE,
        # A person has to decide: for other criteria, or a better synthesizer.
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"dropped_token_share": share, "bound": MAX_DROPPED_SHARE},
    )


@shard_check(
    asset=["synthesis", "quality"],
    blocking=True,
    description=VALUES,
)
def quality_is_valid(settings: dg.ResourceParam[Settings], quality: pl.LazyFrame) -> dg.AssetCheckResult:
    expected = expected_rows(settings.experiment.ground_truth is not None, judged=False)
    return problems_result(audit.quality_problems(quality.collect(), expected))


@dg.asset_check(
    asset=["synthesis", "judgements"],
    blocking=True,
    description="Each question occurs once, with a verdict or a reason for none; there are no rows without a judge.",
)
def judgements_are_valid(settings: dg.ResourceParam[Settings], judgements: pl.LazyFrame) -> dg.AssetCheckResult:
    rows, configured = judgements.collect(), settings.experiment.synthesis.judge is not None
    problems = audit.judgement_problems(rows) if configured else [] if rows.is_empty() else ["rows without a judge"]
    return problems_result(problems, judge_configured=configured, rows=len(rows))


@dg.asset_check(
    asset=["synthesis", "judgements"],
    # Blocks nothing: the rest is asked again by the next run.
    description=f"At least {audit.MIN_JUDGED_SHARE:.0%} of the questions have a verdict.",
)
def judge_answered_most_questions(judgements: pl.LazyFrame) -> dg.AssetCheckResult:
    rows = judgements.collect()
    return problems_result(audit.unjudged_problems(rows), judged=rows["verdict"].count())


@dg.asset_check(asset=["synthesis", "quality_table"], blocking=True, description=VALUES)
def quality_table_is_valid(settings: dg.ResourceParam[Settings], quality_table: pl.LazyFrame) -> dg.AssetCheckResult:
    judged = settings.experiment.synthesis.judge is not None
    expected = expected_rows(settings.experiment.ground_truth is not None, judged)
    return problems_result(audit.quality_problems(quality_table.collect(), expected))


@dg.asset_check(
    asset=["synthesis", "novelty"],
    blocking=True,
    description="Every measure once per corpus, with shares in [0, 1], quantiles in order, and a mean where documents "
    "were measured.",
)
def novelty_is_valid(settings: dg.ResourceParam[Settings], novelty: pl.LazyFrame) -> dg.AssetCheckResult:
    table = novelty.collect()
    return problems_result(novelty_problems(table, settings.experiment.pairing.shingle_tokens), rows=len(table))


@dg.asset_check(
    asset=["synthesis", "novelty"],
    description=f"Of synthetic documents at most {MAX_EXCESS:.0%} more than of held-out ones are mostly copied from D.",
)
def synthetic_documents_do_not_copy_d(novelty: pl.LazyFrame) -> dg.AssetCheckResult:
    # Sampling again would give the same: a person has to decide, for example to set synthesis.filter.max_copying.
    return problems_result(copying_excess(novelty.collect()), dg.AssetCheckSeverity.WARN)


@dg.asset_check(
    asset=["synthesis", "novelty"],
    description="More than half of the synthetic documents (by three standard errors) are more similar to the held-out "
    "partner of their seed than to a random held-out document; not asked of the placebos.",
)
def synthetic_documents_are_near_held_out_partners(
    settings: dg.ResourceParam[Settings], novelty: pl.LazyFrame
) -> dg.AssetCheckResult:
    related = settings.experiment.conditional and settings.experiment.synthesizer.partners == "nearest"
    problems = subject_problems(novelty.collect()) if related else []
    return problems_result(problems, dg.AssetCheckSeverity.WARN, placebo=not related)


@dg.asset_check(
    asset=["synthesis", "posterior_predictive"],
    blocking=True,
    description="Every group occurs once, with shares that lie in [0, 1] and as many statements as its parts; there "
    "are no rows where the ground truth is not known.",
)
def posterior_table_is_valid(
    settings: dg.ResourceParam[Settings], posterior_predictive: pl.LazyFrame
) -> dg.AssetCheckResult:
    table = posterior_predictive.collect()
    known = settings.experiment.ground_truth is not None
    problems = table_problems(table) if known else [] if table.is_empty() else ["rows without a ground truth"]
    return problems_result(problems, rows=len(table))


@dg.asset_check(
    asset=["synthesis", "posterior_predictive"],
    description="Facts that D states nowhere are right no more often than by chance "
    f"(randomisation test at {LEVEL:.1%} over both groups of them): no text outside D has reached the synthesizer.",
)
def unknown_facts_are_at_chance(posterior_predictive: pl.LazyFrame) -> dg.AssetCheckResult:
    table = posterior_predictive.collect()
    unknown = table.filter(pl.col("group").is_in(UNKNOWN))
    return problems_result(leak_problems(table), statements=int(unknown["statements"].sum()))


@dg.asset_check(
    asset=["synthesis", "posterior_predictive"],
    description=f"Facts of d1 are restated right more often than by chance (randomisation test at {LEVEL:.1%}).",
)
def restated_facts_are_above_chance(posterior_predictive: pl.LazyFrame) -> dg.AssetCheckResult:
    table = posterior_predictive.collect()
    restated = table.filter(pl.col("group") == "restated")
    # Judging again would give the same: a person has to decide whether to train for longer.
    severity = dg.AssetCheckSeverity.WARN
    return problems_result(copying_problems(table), severity, statements=int(restated["statements"].sum()))


def _unique_ids(tokens: Path) -> list[str]:
    documents = TokenArrays.load(tokens).documents
    return documents.filter(pl.col("split") == UNIQUE)["id"].to_list()
