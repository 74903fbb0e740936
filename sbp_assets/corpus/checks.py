"""Checks of the corpus assets: thin wrappers of `audit`."""

from pathlib import Path

import dagster as dg
import polars as pl

from sbp_assets.corpus import audit
from sbp_assets.corpus.tokenizer import load_tokenizer
from sbp_assets.dagster_support.check_results import check_result
from sbp_assets.dagster_support.partitions import ALL, shards
from sbp_assets.dagster_support.preview import printable
from sbp_assets.dagster_support.stage import for_settings
from sbp_assets.settings import Settings
from sbp_assets.storage.token_arrays import TokenArrays

SHOWN = 20
MAX_REJECTED_SHARE = 0.05


def _key(name: str) -> dg.AssetKey:
    return dg.AssetKey(["corpus", name])


def _result(
    offending: list[str], *, severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR, **numbers: float
) -> dg.AssetCheckResult:
    """Passed where nothing offends; the first offending ids are shown."""
    return check_result(
        passed=not offending,
        severity=severity,
        metadata={
            "offending": len(offending),
            "first": [printable(name)[:100] for name in offending[:SHOWN]],
            **numbers,
        },
    )


@dg.asset_check(asset=_key("source_manifest"), description="Every source file belongs to a shard.")
def every_file_has_a_shard(settings: dg.ResourceParam[Settings], source_manifest: pl.LazyFrame) -> dg.AssetCheckResult:
    unassigned = source_manifest.filter(pl.col("shard").is_null()).collect()["file"].to_list()
    return _result(unassigned, severity=dg.AssetCheckSeverity.WARN, shards=settings.experiment.corpus.shards)


@dg.asset_check(
    asset=_key("source_manifest"),
    blocking=True,
    description="No file is listed twice, and each is in the shard that its place in the list deals it to.",
)
def shard_assignment_is_correct(
    settings: dg.ResourceParam[Settings], source_manifest: pl.LazyFrame
) -> dg.AssetCheckResult:
    manifest, source = source_manifest.collect(), settings.experiment.corpus.source
    problems = audit.manifest_problems(
        manifest, settings.experiment.corpus.shards, getattr(source, "files_per_shard", None), source.kind == "files"
    )
    return _result(problems, files=len(manifest))


@for_settings(
    lambda settings: dg.asset_check(
        asset=_key("raw_documents"),
        partitions_def=shards(settings),
        additional_ins={"source_manifest": dg.AssetIn(_key("source_manifest"))},
        blocking=True,
        description="Ids are non-null and unique, texts are not blank, and files are those of this shard.",
    )
)
def raw_documents_are_valid(
    context: dg.AssetCheckExecutionContext, raw_documents: pl.LazyFrame, source_manifest: pl.LazyFrame
) -> dg.AssetCheckResult:
    raw = raw_documents.collect()
    unusable = audit.invalid_documents(raw, source_manifest.collect(), int(context.partition_key))
    return _result(audit.invalid_ids(raw["id"]) + unusable, documents=len(raw))


@for_settings(
    lambda settings: dg.asset_check(
        asset=_key("raw_documents"),
        partitions_def=shards(settings),
        additional_ins={"rejected_rows": dg.AssetIn(_key("rejected_rows"))},
        blocking=True,
        description="Every row that was read is a document or a rejected row.",
    )
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
    """rows_read as the ingest of this partition recorded it."""
    records = context.instance.fetch_materializations(
        dg.AssetRecordsFilter(_key("raw_documents"), asset_partitions=[context.partition_key]), limit=1
    ).records
    materialization = records[0].asset_materialization if records else None
    if materialization is None:
        raise ValueError(f"corpus/raw_documents of shard {context.partition_key} was never materialised")
    return int(materialization.metadata["rows_read"].value)  # type: ignore[arg-type]


@for_settings(
    lambda settings: dg.asset_check(
        asset=_key("rejected_rows"),
        partitions_def=shards(settings),
        additional_ins={"raw_documents": dg.AssetIn(_key("raw_documents"))},
        description=f"At most {MAX_REJECTED_SHARE:.0%} of the rows are rejected; "
        "above it, a field name is probably wrong.",
    )
)
def rejected_share_is_low(rejected_rows: pl.LazyFrame, raw_documents: pl.LazyFrame) -> dg.AssetCheckResult:
    rejects = rejected_rows.select(pl.len()).collect().item()
    rows = rejects + raw_documents.select(pl.len()).collect().item()
    share = rejects / max(rows, 1)
    return check_result(
        passed=share <= MAX_REJECTED_SHARE,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"rejected": rejects, "rows": rows, "share": share},
    )


@for_settings(
    lambda settings: dg.asset_check(
        asset=_key("minhash_signatures"),
        partitions_def=shards(settings),
        additional_ins={"raw_documents": dg.AssetIn(_key("raw_documents"))},
        blocking=True,
        description="One signature per document, in its order; a sample made again from the texts is the same.",
    )
)
def signatures_match_documents(
    settings: dg.ResourceParam[Settings], minhash_signatures: pl.LazyFrame, raw_documents: pl.LazyFrame
) -> dg.AssetCheckResult:
    signed = minhash_signatures.collect()
    wrong = audit.wrong_signatures(signed, raw_documents.select("id", "text").collect(), settings.experiment.corpus.dedup)
    return _result(wrong, signatures=len(signed))


@dg.asset_check(
    asset=_key("duplicates"),
    additional_ins={
        "raw_documents": dg.AssetIn(_key("raw_documents"), partition_mapping=ALL),
        "minhash_signatures": dg.AssetIn(_key("minhash_signatures"), partition_mapping=ALL),
    },
    blocking=True,
    description="Every duplicate is as similar to what is kept as it states (a sample is compared), and no two kept "
    "documents have one text or one id.",
)
def duplicates_are_correct_and_complete(
    settings: dg.ResourceParam[Settings],
    duplicates: pl.LazyFrame,
    raw_documents: dict[str, pl.LazyFrame],
    minhash_signatures: dict[str, pl.LazyFrame],
) -> dg.AssetCheckResult:
    dropped = duplicates.collect()
    untrue = audit.incorrect_duplicates(dropped, raw_documents, settings.experiment.corpus.dedup)
    missed = audit.missed_duplicates(dropped, minhash_signatures)
    return _result(untrue + missed, untrue=len(untrue), missed=len(missed))


@dg.asset_check(
    asset=_key("duplicates"),
    additional_ins={"raw_documents": dg.AssetIn(_key("raw_documents"), partition_mapping=ALL)},
    blocking=True,
    description="Every duplicate is dropped once and points at an earlier document that is itself kept: no chains.",
)
def kept_documents_exist(duplicates: pl.LazyFrame, raw_documents: dict[str, pl.LazyFrame]) -> dg.AssetCheckResult:
    dropped = duplicates.collect()
    return _result(audit.dangling_duplicates(dropped, raw_documents), duplicates=len(dropped))


@for_settings(
    lambda settings: dg.asset_check(
        asset=_key("documents"),
        partitions_def=shards(settings),
        additional_ins={
            "raw_documents": dg.AssetIn(_key("raw_documents")),
            "duplicates": dg.AssetIn(_key("duplicates")),
        },
        blocking=True,
        description="Every raw document is dropped as a duplicate, outside every split, or here once, unchanged, "
        "in its "
        "own split.",
    )
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
    return _result(wrong, raw=len(raw), documents=len(kept))


@dg.asset_check(
    asset=_key("tokenizer"),
    additional_ins={"documents": dg.AssetIn(_key("documents"), partition_mapping=ALL)},
    blocking=True,
    description="No held-out text or id is in a training split of any shard.",
)
def heldout_documents_are_not_in_training_splits(
    tokenizer: Path, documents: dict[str, pl.LazyFrame]
) -> dg.AssetCheckResult:
    return _result(audit.leaked_heldout(documents), shards=len(documents))


@dg.asset_check(
    asset=_key("tokenizer"),
    additional_ins={
        "documents": dg.AssetIn(_key("documents"), partition_mapping=ALL),
        "raw_documents": dg.AssetIn(_key("raw_documents"), partition_mapping=ALL),
        "duplicates": dg.AssetIn(_key("duplicates")),
    },
    description="Over all shards the splits have the asked shares, within five standard deviations of sampling.",
)
def split_shares_match_settings(
    settings: dg.ResourceParam[Settings],
    tokenizer: Path,
    documents: dict[str, pl.LazyFrame],
    raw_documents: dict[str, pl.LazyFrame],
    duplicates: pl.LazyFrame,
) -> dg.AssetCheckResult:
    raw = sum(frame.select(pl.len()).collect().item() for frame in raw_documents.values())
    kept = raw - duplicates.select(pl.len()).collect().item()
    shares = audit.split_shares(documents, kept, settings.experiment.corpus.split)
    result = _result([name for name, (_, _, fits) in shares.items() if not fits], kept=kept)
    found = {f"{name}_share": share for name, (share, _, _) in shares.items()}
    asked = {f"{name}_asked": share for name, (_, share, _) in shares.items()}
    return result.with_metadata({**result.metadata, **found, **asked})


@dg.asset_check(
    asset=_key("tokenizer"),
    blocking=True,
    description="Texts of many scripts survive encoding and decoding, and never become special tokens.",
)
def tokenizer_round_trips(tokenizer: Path) -> dg.AssetCheckResult:
    return _result(audit.lossy_texts(load_tokenizer(tokenizer)), texts=len(audit.ROUND_TRIP))


@for_settings(
    lambda settings: dg.asset_check(
        asset=_key("tokens"),
        partitions_def=shards(settings),
        additional_ins={
            "documents": dg.AssetIn(_key("documents")),
            "tokenizer": dg.AssetIn(_key("tokenizer")),
        },
        blocking=True,
        description="Every document is there once, in order, from bos to eos, of tokens of the vocabulary.",
    )
)
def tokens_match_documents(tokens: Path, documents: pl.LazyFrame, tokenizer: Path) -> dg.AssetCheckResult:
    arrays, frame = TokenArrays.load(tokens), documents.collect()
    return _result(audit.wrong_token_documents(arrays, frame, load_tokenizer(tokenizer)), tokens=len(arrays.tokens))


@for_settings(
    lambda settings: dg.asset_check(
        asset=_key("tokens"),
        partitions_def=shards(settings),
        additional_ins={
            "documents": dg.AssetIn(_key("documents")),
            "tokenizer": dg.AssetIn(_key("tokenizer")),
        },
        blocking=True,
        description="The tokens of a sample of documents decode to their text.",
    )
)
def tokens_decode_to_documents(tokens: Path, documents: pl.LazyFrame, tokenizer: Path) -> dg.AssetCheckResult:
    return _result(audit.undecodable_documents(TokenArrays.load(tokens), documents.collect(), load_tokenizer(tokenizer)))
