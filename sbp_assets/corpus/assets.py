"""The corpus stage: it ingests, de-duplicates, splits and tokenises documents."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl

from sbp_assets.corpus import dedup, ingest, split
from sbp_assets.corpus import tokenizer as tokenization
from sbp_assets.dagster_support.partitions import ALL, shards
from sbp_assets.dagster_support.preview import table_preview
from sbp_assets.dagster_support.stage import for_settings
from sbp_assets.settings import FilesSource, HubSource, Settings
from sbp_assets.storage.artifacts import release_staging, staging
from sbp_assets.storage.column_metadata import column_metadata
from sbp_assets.storage.progress import Progress
from sbp_assets.storage.row_versions import ROW_VERSIONS, row_versions
from sbp_assets.storage.token_arrays import write_token_arrays

PREVIEW_ROWS = 5
# Metadata of the manifest: {file: why it is not read} of the first NAMED, and {reason: files} of all.
LEFT_OUT, LEFT_OUT_REASONS, NAMED = "files_left_out", "files_left_out_by_reason", 1000


def _reading_version(settings: Settings, *keys: str) -> str:
    """Return the code version of what reading a shard gives: by the settings that it depends on, `keys` among them.

    The manifest alone assigns files to shards, so that further shards leave the others as they are; every other source
    distributes its documents over all shards. A generated source has no rows that could be read in another way.
    """
    version = settings.experiment.version
    match settings.experiment.corpus.source:
        case FilesSource():
            fields = [f"corpus.source.{field}" for field in ("path", "text_field", "id_field", "url_field")]
            return version("3", *fields, "corpus.max_row_bytes", *keys)
        case HubSource():
            return version("3", "corpus.source", "corpus.shards", "corpus.max_row_bytes", *keys)
        case _:
            return version("1", "corpus.source", "corpus.shards", *keys)


@for_settings(
    lambda settings: dg.asset(
        kinds={"polars", "parquet"},
        io_manager_key="parquet",
        code_version=settings.experiment.version(
            "3" if settings.experiment.corpus.source.kind == "files" else "1", "corpus.source", "corpus.shards"
        ),
        metadata=column_metadata(ingest.MANIFEST_COLUMNS),
    )
)
def source_manifest(settings: dg.ResourceParam[Settings]) -> dg.MaterializeResult:
    """The manifest has one row per source file, with its size, digest and shard; it pins the content of the corpus."""
    with Progress("source manifest", "files") as progress:
        manifest, left_out = ingest.source_manifest(
            settings.experiment.corpus.source, settings.experiment.corpus.shards, progress
        )
    return dg.MaterializeResult(
        value=manifest,
        metadata={
            "dagster/row_count": len(manifest),
            "source_bytes": int(manifest["bytes"].sum()),
            "unassigned_files": int(manifest["shard"].null_count()),
            "ignored_files": len(left_out),
            LEFT_OUT: dg.MetadataValue.json(dict(list(left_out.items())[:NAMED])),
            LEFT_OUT_REASONS: dg.MetadataValue.json(Counter(why.partition(":")[0] for why in left_out.values())),
            ROW_VERSIONS: dg.MetadataValue.json(
                row_versions(manifest, settings.experiment.shard_keys, ["file", "sha256"])
            ),
            "preview": dg.MetadataValue.md(table_preview(manifest.head(PREVIEW_ROWS))),
            **progress.metadata(),
        },
    )


@for_settings(
    lambda settings: dg.multi_asset(
        outs={
            "raw_documents": dg.AssetOut(
                key="raw_documents",
                dagster_type=dg.Any,  # MaterializeResult annotations would make it Nothing, which no data frame is.
                io_manager_key="parquet",
                kinds={"polars", "parquet"},
                code_version=_reading_version(settings, "corpus.max_chars"),
                description="The table has one row per valid document of the shard's files, in file and line order.",
                metadata=column_metadata(ingest.RAW_DOCUMENT_COLUMNS),
            ),
            "rejected_rows": dg.AssetOut(
                key="rejected_rows",
                dagster_type=dg.Any,
                io_manager_key="parquet",
                kinds={"polars", "parquet"},
                code_version=_reading_version(settings),
                description="The table has one row per source row that is not a valid document, with the reason.",
                metadata=column_metadata(ingest.REJECTED_ROW_COLUMNS),
            ),
        },
        ins={"source_manifest": dg.AssetIn(["corpus", "source_manifest"])},
        partitions_def=shards(settings),
        name="corpus_ingest",
    )
)
def raw_documents(
    context: dg.AssetExecutionContext, settings: dg.ResourceParam[Settings], source_manifest: pl.LazyFrame
) -> tuple[dg.MaterializeResult, dg.MaterializeResult]:
    """Ingest the shard's source files: every row becomes a document or a rejected row."""
    corpus = settings.experiment.corpus
    with Progress(f"ingest {context.partition_key}", "docs") as progress:
        documents, rejects, counts = ingest.read_shard(
            corpus.source,
            source_manifest.collect(),
            int(context.partition_key),
            corpus.shards,
            corpus.max_chars,
            progress,
            corpus.max_row_bytes,
        )
    ingest.require_distinct_ids(
        counts.repeated_ids,
        len(documents) + counts.repeated_ids,
        corpus.max_repeated_ids,
        f"shard {context.partition_key}",
        counts.first_repeated_id,
    )
    reasons = (
        rejects.group_by(pl.col("reason").str.split(":").list.first()).len(name="rows").sort("rows", descending=True)
    )
    return (
        dg.MaterializeResult(
            asset_key=["corpus", "raw_documents"],
            value=documents,
            metadata={
                "dagster/row_count": len(documents),
                "characters": int(documents["text"].str.len_chars().sum()),
                "rows_read": counts.rows_read,
                "rows_cut": counts.rows_cut,
                "generated_ids": counts.generated_ids.total(),
                "generated_ids_by_type": dg.MetadataValue.json(dict(counts.generated_ids)),
                "preview": dg.MetadataValue.md(table_preview(documents.head(PREVIEW_ROWS))),
                **progress.metadata(),
            },
        ),
        dg.MaterializeResult(
            asset_key=["corpus", "rejected_rows"],
            value=rejects,
            metadata={
                "dagster/row_count": len(rejects),
                "rows_read": counts.rows_read,
                "repeated_ids": counts.repeated_ids,
                "reasons": dg.MetadataValue.md(table_preview(reasons)),
                "preview": dg.MetadataValue.md(table_preview(rejects.head(PREVIEW_ROWS))),
            },
        ),
    )


def _signature_version(settings: Settings) -> str:
    """Return the code version of signatures, which changes with what shingles are."""
    fields = ("shingle_words", "permutations", "bands", "seed")
    return settings.experiment.version("2", *(f"corpus.dedup.{field}" for field in fields))


@for_settings(
    lambda settings: dg.asset(
        kinds={"polars", "parquet"},
        io_manager_key="parquet",
        partitions_def=shards(settings),
        ins={"raw_documents": dg.AssetIn(["corpus", "raw_documents"])},
        code_version=_signature_version(settings),
        metadata=column_metadata(dedup.SIGNATURE_COLUMNS),
    )
)
def minhash_signatures(
    context: dg.AssetExecutionContext, settings: dg.ResourceParam[Settings], raw_documents: pl.LazyFrame
) -> dg.MaterializeResult:
    """The table has one row per raw document, in order: its LSH bands and the digest of its normalised text."""
    documents = raw_documents.collect()
    with Progress(f"signatures {context.partition_key}", "docs", total=len(documents)) as progress:
        signatures = dedup.signatures(documents, settings.experiment.corpus.dedup, progress)
    return dg.MaterializeResult(
        value=signatures, metadata={"dagster/row_count": len(signatures), **progress.metadata()}
    )


@for_settings(
    lambda settings: dg.asset(
        kinds={"duckdb", "parquet"},
        io_manager_key="parquet",
        ins={
            "raw_documents": dg.AssetIn(["corpus", "raw_documents"], partition_mapping=ALL),
            "minhash_signatures": dg.AssetIn(["corpus", "minhash_signatures"], partition_mapping=ALL),
        },
        pool="memory",
        code_version=settings.experiment.version("3", "corpus.dedup"),
        metadata=column_metadata(dedup.DUPLICATE_COLUMNS),
    )
)
def duplicates(
    settings: dg.ResourceParam[Settings],
    raw_documents: dict[str, pl.LazyFrame],
    minhash_signatures: dict[str, pl.LazyFrame],
) -> dg.MaterializeResult:
    """The table has one row per document that duplicates a kept document of any shard.

    LSH proposes pairs; their exact similarity decides. Similarities stay in work_dir, and a pair that is there is not
    compared again.
    """
    scratch = staging(settings.deployment.work_dir, "corpus_duplicates")
    store = Path(settings.deployment.work_dir) / "similarities" / f"{_signature_version(settings)}.parquet"
    with Progress("duplicates", "pairs") as progress:
        dropped, counts = dedup.find_duplicates(
            raw_documents,
            minhash_signatures,
            settings.experiment.corpus.dedup,
            scratch,
            settings.deployment.memory_limit,
            progress,
            store,
        )
    release_staging(scratch)
    for other in set(store.parent.glob("*.parquet")) - {store}:  # Of other shingles.
        other.unlink()
    kinds = dict(dropped.group_by("kind").len().iter_rows())
    first = next(dropped.filter(pl.col("kind") == "id").select("id", "kept_shard", "shard").iter_rows(), None)
    ingest.require_distinct_ids(
        kinds.get("id", 0),
        counts["documents"],
        settings.experiment.corpus.max_repeated_ids,
        "over all shards",
        "{!r} in the shards {} and {}".format(*first) if first else "",
    )
    dedup.require_enough(counts, settings.experiment.corpus.source.kind)
    return dg.MaterializeResult(
        value=dropped,
        metadata={
            "dagster/row_count": len(dropped),
            **counts,
            **{f"{kind}_duplicates": kinds.get(kind, 0) for kind in ("exact", "near", "id")},
            # corpus/documents leaves out the ids of its own shard.
            ROW_VERSIONS: dg.MetadataValue.json(
                row_versions(dropped.sort("id"), settings.experiment.shard_keys, ["id"])
            ),
            "preview": dg.MetadataValue.md(_duplicate_preview(dropped, raw_documents)),
            **progress.metadata(),
        },
    )


def _duplicate_preview(dropped: pl.DataFrame, raw_documents: dict[str, pl.LazyFrame]) -> str:
    """Return the least similar near-duplicates beside the kept documents: a wrong decision would show there first."""

    def text(shard: int, name: str) -> str:
        found = raw_documents[f"{shard:05d}"].filter(pl.col("id") == name).select("text").collect()
        return found.item(0, 0)

    rows = dropped.filter(pl.col("kind") == "near").sort("jaccard").head(PREVIEW_ROWS)
    return table_preview(
        rows.select("id", "jaccard").with_columns(
            pl.Series("dropped", [text(s, i) for s, i in rows.select("shard", "id").iter_rows()], dtype=pl.String),
            pl.Series(
                "kept", [text(s, i) for s, i in rows.select("kept_shard", "kept_id").iter_rows()], dtype=pl.String
            ),
        )
    )


@for_settings(
    lambda settings: dg.asset(
        kinds={"polars", "parquet"},
        io_manager_key="parquet",
        partitions_def=shards(settings),
        ins={
            "raw_documents": dg.AssetIn(["corpus", "raw_documents"]),
            "duplicates": dg.AssetIn(["corpus", "duplicates"]),
        },
        code_version=settings.experiment.version("1", "corpus.split"),
        metadata=column_metadata(split.DOCUMENT_COLUMNS),
    )
)
def documents(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    raw_documents: pl.LazyFrame,
    duplicates: pl.LazyFrame,
) -> dg.MaterializeResult:
    """The table has one row per de-duplicated document that is in a split."""
    raw, dropped = raw_documents.collect(), duplicates.collect()
    with Progress(f"documents {context.partition_key}", "docs", total=len(raw)) as progress:
        kept = split.split_documents(raw, dropped, int(context.partition_key), settings.experiment.corpus.split)
        progress.advance(len(raw))
    counts = dict(kept.group_by("split").len().iter_rows())
    return dg.MaterializeResult(
        value=kept,
        metadata={
            "dagster/row_count": len(kept),
            **{f"{name}_documents": counts.get(name, 0) for name in (split.UNIQUE, split.ORACLE, split.HELDOUT)},
            "preview": dg.MetadataValue.md(table_preview(kept.select("id", "split", "text").head(PREVIEW_ROWS))),
            **progress.metadata(),
        },
    )


@for_settings(
    lambda settings: dg.asset(
        kinds={"huggingface"},
        io_manager_key="directory",
        ins={"documents": dg.AssetIn(["corpus", "documents"], partition_mapping=ALL)},
        code_version=settings.experiment.version(
            "2", "corpus.tokenizer", "corpus.split", "pretraining.tokens_per_step"
        ),
    )
)
def tokenizer(settings: dg.ResourceParam[Settings], documents: dict[str, pl.LazyFrame]) -> dg.MaterializeResult:
    """The directory holds a Hugging Face tokenizer: a byte-level BPE trained on D, or a named one, with special tokens.

    This is the first asset that reads every split, so it refuses a corpus with too few documents in one, or with less
    than one optimizer step of tokens in D.
    """
    configured = settings.experiment.corpus.tokenizer
    counts = tokenization.require_splits(documents, settings.experiment.corpus.split)

    def training_texts(progress: Progress) -> Iterator[str]:
        for batch in tokenization.stream_texts(documents, split.UNIQUE):
            progress.advance(len(batch))
            yield from batch

    with Progress("tokenizer", "docs", total=counts[split.UNIQUE]) as progress:
        if configured.name is None:
            built = tokenization.train_tokenizer(training_texts(progress), configured.vocab_size)
        else:
            built = tokenization.named_tokenizer(configured.name)
    tokenization.require_tokens(built, documents, settings.experiment.pretraining.tokens_per_step)
    directory = staging(settings.deployment.work_dir, "corpus_tokenizer")
    built.save_pretrained(directory)
    return dg.MaterializeResult(
        value=directory,
        metadata={
            "vocab_size": len(built),
            **{f"{name}_documents": count for name, count in counts.items()},
            **progress.metadata(),
        },
    )


@for_settings(
    lambda settings: dg.asset(
        kinds={"huggingface", "numpy"},
        io_manager_key="directory",
        partitions_def=shards(settings),
        ins={
            "documents": dg.AssetIn(["corpus", "documents"]),
            "tokenizer": dg.AssetIn(["corpus", "tokenizer"]),
        },
        code_version=settings.experiment.version("1"),
        metadata=column_metadata(tokenization.TOKEN_COLUMNS),
    )
)
def tokens(
    context: dg.AssetExecutionContext, settings: dg.ResourceParam[Settings], documents: pl.LazyFrame, tokenizer: Path
) -> dg.MaterializeResult:
    """The directory holds the tokens of the shard's documents: bos, text and eos of each.

    Its documents.parquet has their ids and splits, in the same order.
    """
    frame, loaded = documents.collect(), tokenization.load_tokenizer(tokenizer)
    lengths = []

    def encoded(progress: Progress) -> Iterator[np.ndarray]:
        for rows in frame.iter_slices(1000):
            for ids in tokenization.encode_documents(loaded, rows["text"].to_list()):
                lengths.append(len(ids))
                yield ids
            progress.advance(len(rows))

    directory = staging(settings.deployment.work_dir, "corpus_tokens", context.partition_key)
    with Progress(f"tokens {context.partition_key}", "docs", total=len(frame)) as progress:
        total = write_token_arrays(directory, frame.select("id", "split"), encoded(progress), len(loaded))
    by_split = frame.select("split").with_columns(tokens=pl.Series(lengths, dtype=pl.Int64))
    sums = dict(by_split.group_by("split").sum().iter_rows())
    characters = int(frame["text"].str.len_chars().sum())
    return dg.MaterializeResult(
        value=directory,
        metadata={
            "documents": len(frame),
            "tokens": total,
            **{f"{name}_tokens": sums.get(name, 0) for name in (split.UNIQUE, split.ORACLE, split.HELDOUT)},
            "characters_per_token": round(characters / max(total, 1), 3),
            **progress.metadata(),
        },
    )
