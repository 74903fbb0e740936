"""Checks of the corpus stage; `audit` does the work."""

from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from sbp_assets.corpus import audit
from sbp_assets.corpus.assets import LEFT_OUT, LEFT_OUT_REASONS
from sbp_assets.corpus.ingest import REPEATED_ID
from sbp_assets.corpus.tokenizer import load_tokenizer
from sbp_assets.dagster_support.check_results import (
    PROBLEM_CHARS,
    SHOWN,
    check_result,
    last_materialization,
    problems_result,
)
from sbp_assets.dagster_support.partitions import ALL, shard_check
from sbp_assets.settings import Settings
from sbp_assets.storage.token_arrays import TokenArrays

MAX_REJECTED_SHARE = 0.05

_TOKEN_SOURCES = {name: dg.AssetIn(["corpus", name]) for name in ("documents", "tokenizer")}


@dg.asset_check(asset=["corpus", "source_manifest"], description="Every source file belongs to a shard.")
def every_file_has_a_shard(settings: dg.ResourceParam[Settings], source_manifest: pl.LazyFrame) -> dg.AssetCheckResult:
    unassigned = source_manifest.filter(pl.col("shard").is_null()).collect()["file"].to_list()
    return problems_result(unassigned, dg.AssetCheckSeverity.WARN, shards=settings.experiment.corpus.shards)


@dg.asset_check(
    asset=["corpus", "source_manifest"],
    description="Every file under the corpus path is read: none has an unknown ending or a name that is hidden or not "
    "UTF-8, none is a second way to a file, and every folder can be listed.",
)
def every_file_is_read(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
    manifest = last_materialization(context.instance, dg.AssetKey(["corpus", "source_manifest"]), None)
    # A manifest of an earlier version says nothing of them.
    found: dict[str, Any] = {name: value.value for name, value in manifest.metadata.items()} if manifest else {}
    named, reasons = found.get(LEFT_OUT, {}), found.get(LEFT_OUT_REASONS, {})
    problems, total = [f"{file}: {why}" for file, why in named.items()], sum(reasons.values())
    if total > SHOWN or total > len(named) or len("; ".join(problems)) > PROBLEM_CHARS:
        counts = ", ".join(f"{count:,} × {reason}" for reason, count in reasons.items())
        where = f"{'the first ' * (total > len(named))}{len(named):,} by name in {LEFT_OUT} of corpus/source_manifest"
        problems.insert(0, f"{total:,} are not read ({counts}), {where}")
    return problems_result(problems, dg.AssetCheckSeverity.WARN, left_out=total)


@dg.asset_check(
    asset=["corpus", "source_manifest"],
    blocking=True,
    description="No file is listed twice, and each is in the shard that its place in the list assigns it to.",
)
def shard_assignment_is_correct(
    settings: dg.ResourceParam[Settings], source_manifest: pl.LazyFrame
) -> dg.AssetCheckResult:
    manifest, source = source_manifest.collect(), settings.experiment.corpus.source
    problems = audit.manifest_problems(
        manifest, settings.experiment.corpus.shards, getattr(source, "files_per_shard", None), source.kind == "files"
    )
    return problems_result(problems, files=len(manifest))


@shard_check(
    asset=["corpus", "raw_documents"],
    additional_ins={"source_manifest": dg.AssetIn(["corpus", "source_manifest"])},
    blocking=True,
    description="Ids are non-null and unique, texts are not blank, and files are those of this shard.",
)
def raw_documents_are_valid(
    context: dg.AssetCheckExecutionContext, raw_documents: pl.LazyFrame, source_manifest: pl.LazyFrame
) -> dg.AssetCheckResult:
    raw = raw_documents.collect()
    invalid = audit.invalid_documents(raw, source_manifest.collect(), int(context.partition_key))
    return problems_result(audit.invalid_ids(raw["id"]) + invalid, documents=len(raw))


@shard_check(
    asset=["corpus", "raw_documents"],
    additional_ins={"rejected_rows": dg.AssetIn(["corpus", "rejected_rows"])},
    blocking=True,
    description="Every row that was read is a document or a rejected row.",
)
def every_row_is_accounted_for(
    context: dg.AssetCheckExecutionContext, raw_documents: pl.LazyFrame, rejected_rows: pl.LazyFrame
) -> dg.AssetCheckResult:
    read = _rows_read(context)
    documents = raw_documents.select(pl.len()).collect().item()
    rejects = rejected_rows.select(pl.len()).collect().item()
    missing = audit.unaccounted_rows(read, documents, rejects)
    return check_result(
        passed=missing == 0,
        metadata={"rows_read": read, "documents": documents, "rejected": rejects, "missing": missing},
    )


def _rows_read(context: dg.AssetCheckExecutionContext) -> int:
    """Return rows_read as the ingest of this partition recorded it."""
    ingested = last_materialization(context.instance, dg.AssetKey(["corpus", "raw_documents"]), context.partition_key)
    if ingested is None:
        raise ValueError(f"corpus/raw_documents of shard {context.partition_key} was never materialised")
    return int(ingested.metadata["rows_read"].value)  # type: ignore[arg-type]


@shard_check(
    asset=["corpus", "rejected_rows"],
    additional_ins={"raw_documents": dg.AssetIn(["corpus", "raw_documents"])},
    description=f"At most {MAX_REJECTED_SHARE:.0%} of the rows are rejected; above it, a field name is probably wrong.",
)
def rejected_share_is_low(rejected_rows: pl.LazyFrame, raw_documents: pl.LazyFrame) -> dg.AssetCheckResult:
    rejects = rejected_rows.select(pl.len()).collect().item()
    rows = rejects + raw_documents.select(pl.len()).collect().item()
    share = rejects / max(rows, 1)
    problems = []
    if share > MAX_REJECTED_SHARE:
        reasons = rejected_rows.group_by(pl.col("reason").str.split(":").list.first()).len().collect()
        (reason, count), *_ = reasons.sort("len", "reason", descending=[True, False]).iter_rows()
        problems = [f"{rejects:,} of {rows:,} rows are rejected ({share:.1%}), of which {count:,}: {reason}"]
    return problems_result(problems, dg.AssetCheckSeverity.WARN, rejected=rejects, rows=rows, share=share)


@shard_check(
    asset=["corpus", "rejected_rows"],
    description="No row is rejected because a document of another text in the shard has its id.",
)
def ids_stand_for_one_text_in_the_shard(rejected_rows: pl.LazyFrame) -> dg.AssetCheckResult:
    lost = rejected_rows.filter(pl.col("reason").str.starts_with(f"{REPEATED_ID}:")).select("file", "line", "reason")
    problems = [f"{file}:{line}: {reason}" for file, line, reason in lost.collect().iter_rows()]
    return problems_result(problems, dg.AssetCheckSeverity.WARN)


@shard_check(
    asset=["corpus", "minhash_signatures"],
    additional_ins={"raw_documents": dg.AssetIn(["corpus", "raw_documents"])},
    blocking=True,
    description="There is one signature per document, in the same order, and a sample computed again is the same.",
)
def signatures_match_documents(
    settings: dg.ResourceParam[Settings], minhash_signatures: pl.LazyFrame, raw_documents: pl.LazyFrame
) -> dg.AssetCheckResult:
    signatures, raw = minhash_signatures.collect(), raw_documents.select("id", "text").collect()
    wrong = audit.wrong_signatures(signatures, raw, settings.experiment.corpus.dedup)
    return problems_result(wrong, signatures=len(signatures))


@dg.asset_check(
    asset=["corpus", "duplicates"],
    additional_ins={
        "raw_documents": dg.AssetIn(["corpus", "raw_documents"], partition_mapping=ALL),
        "minhash_signatures": dg.AssetIn(["corpus", "minhash_signatures"], partition_mapping=ALL),
    },
    blocking=True,
    description="Every duplicate is as similar to the kept document as it states (a sample is compared), and no two "
    "kept documents have one text or one id.",
)
def duplicates_are_correct_and_complete(
    settings: dg.ResourceParam[Settings],
    duplicates: pl.LazyFrame,
    raw_documents: dict[str, pl.LazyFrame],
    minhash_signatures: dict[str, pl.LazyFrame],
) -> dg.AssetCheckResult:
    dropped = duplicates.collect()
    incorrect = audit.incorrect_duplicates(dropped, raw_documents, settings.experiment.corpus.dedup)
    missed = audit.missed_duplicates(dropped, minhash_signatures)
    return problems_result(incorrect + missed, incorrect=len(incorrect), missed=len(missed))


@dg.asset_check(
    asset=["corpus", "duplicates"],
    additional_ins={"raw_documents": dg.AssetIn(["corpus", "raw_documents"], partition_mapping=ALL)},
    blocking=True,
    description="Every duplicate is dropped once and points at an earlier document that is itself kept: no chains.",
)
def kept_documents_exist(duplicates: pl.LazyFrame, raw_documents: dict[str, pl.LazyFrame]) -> dg.AssetCheckResult:
    dropped = duplicates.collect()
    return problems_result(audit.dangling_duplicates(dropped, raw_documents), duplicates=len(dropped))


@dg.asset_check(
    asset=["corpus", "duplicates"],
    description="No document is dropped because a document of another text, in another shard, has its id.",
)
def ids_stand_for_one_text(duplicates: pl.LazyFrame) -> dg.AssetCheckResult:
    lost = duplicates.filter(pl.col("kind") == "id").select("id", "shard", "kept_shard").collect()
    problems = [f"{name!r} of shard {shard}: that of shard {kept} is kept" for name, shard, kept in lost.iter_rows()]
    return problems_result(problems, dg.AssetCheckSeverity.WARN)


@shard_check(
    asset=["corpus", "documents"],
    additional_ins={
        "raw_documents": dg.AssetIn(["corpus", "raw_documents"]),
        "duplicates": dg.AssetIn(["corpus", "duplicates"]),
    },
    blocking=True,
    description="Every raw document is dropped as a duplicate, outside every split, or here once, unchanged, in its "
    "own split.",
)
def documents_match_raw_documents(
    context: dg.AssetCheckExecutionContext,
    settings: dg.ResourceParam[Settings],
    documents: pl.LazyFrame,
    raw_documents: pl.LazyFrame,
    duplicates: pl.LazyFrame,
) -> dg.AssetCheckResult:
    kept, raw = documents.collect(), raw_documents.collect()
    wrong = audit.misassigned_documents(
        raw, duplicates.collect(), kept, int(context.partition_key), settings.experiment.corpus.split
    )
    wrong += audit.invalid_ids(kept["id"]) + audit.altered_documents(raw, kept)
    return problems_result(wrong, raw=len(raw), documents=len(kept))


@dg.asset_check(
    asset=["corpus", "tokenizer"],
    additional_ins={"documents": dg.AssetIn(["corpus", "documents"], partition_mapping=ALL)},
    blocking=True,
    description="No held-out text or id is in a training split of any shard.",
)
def heldout_documents_are_not_in_training_splits(documents: dict[str, pl.LazyFrame]) -> dg.AssetCheckResult:
    return problems_result(audit.leaked_heldout(documents), shards=len(documents))


@dg.asset_check(
    asset=["corpus", "tokenizer"],
    additional_ins={
        "documents": dg.AssetIn(["corpus", "documents"], partition_mapping=ALL),
        "raw_documents": dg.AssetIn(["corpus", "raw_documents"], partition_mapping=ALL),
        "duplicates": dg.AssetIn(["corpus", "duplicates"]),
    },
    description="Over all shards the splits have the configured shares, within five standard deviations of sampling.",
)
def split_shares_match_settings(
    settings: dg.ResourceParam[Settings],
    documents: dict[str, pl.LazyFrame],
    raw_documents: dict[str, pl.LazyFrame],
    duplicates: pl.LazyFrame,
) -> dg.AssetCheckResult:
    raw = sum(frame.select(pl.len()).collect().item() for frame in raw_documents.values())
    kept = raw - duplicates.select(pl.len()).collect().item()
    shares = audit.split_shares(documents, kept, settings.experiment.corpus.split)
    problems = [
        f"{name}: {found:.2%} instead of {share:.2%}" for name, (found, share, fits) in shares.items() if not fits
    ]
    found_shares = {f"{name}_share": found for name, (found, _, _) in shares.items()}
    configured_shares = {f"{name}_configured": share for name, (_, share, _) in shares.items()}
    return problems_result(problems, kept=kept, **found_shares, **configured_shares)


@dg.asset_check(
    asset=["corpus", "tokenizer"],
    blocking=True,
    description="Texts of many scripts survive encoding and decoding, and never become special tokens.",
)
def tokenizer_round_trips(tokenizer: Path) -> dg.AssetCheckResult:
    return problems_result(audit.lossy_texts(load_tokenizer(tokenizer)), texts=len(audit.ROUND_TRIP))


@shard_check(
    asset=["corpus", "tokens"],
    additional_ins=_TOKEN_SOURCES,
    blocking=True,
    description="Every document is there once, in order, from bos to eos, of tokens of the vocabulary.",
)
def tokens_match_documents(tokens: Path, documents: pl.LazyFrame, tokenizer: Path) -> dg.AssetCheckResult:
    arrays, frame = TokenArrays.load(tokens), documents.collect()
    wrong = audit.wrong_token_documents(arrays, frame, load_tokenizer(tokenizer))
    return problems_result(wrong, tokens=len(arrays.tokens))


@shard_check(
    asset=["corpus", "tokens"],
    additional_ins=_TOKEN_SOURCES,
    blocking=True,
    description="The tokens of a sample of documents decode to their text.",
)
def tokens_decode_to_documents(tokens: Path, documents: pl.LazyFrame, tokenizer: Path) -> dg.AssetCheckResult:
    arrays, frame = TokenArrays.load(tokens), documents.collect()
    wrong = audit.undecodable_documents(arrays, frame, load_tokenizer(tokenizer))
    return problems_result(wrong, sample=min(audit.TOKEN_SAMPLE, len(frame)))
