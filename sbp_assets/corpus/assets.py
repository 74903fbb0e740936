"""Corpus assets: ingest, de-duplicate, split, tokenise."""

import shutil
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
from sbp_assets.settings import FilesSource, Settings
from sbp_assets.storage.artifacts import staging
from sbp_assets.storage.column_metadata import lineage, schema
from sbp_assets.storage.progress import Progress
from sbp_assets.storage.row_versions import ROW_VERSIONS, row_versions
from sbp_assets.storage.token_arrays import write_token_arrays

PREVIEW_ROWS = 5

DOCUMENT_COLUMNS = [
    dg.TableColumn("id", "string", "Unique in its shard."),
    dg.TableColumn("text", "string", "Cut at corpus.max_chars."),
    dg.TableColumn("url", "string", "Null where the source has none."),
    dg.TableColumn("source", "string", "The row's own source field, else the data set's name."),
    dg.TableColumn("file", "string", "Source file, relative to the corpus root."),
    dg.TableColumn("line", "int64", "Line or row of that file, from 1."),
]
# Every column of a row comes from the file that the manifest pins by name and digest.
SOURCE_FILE = "corpus/source_manifest.file corpus/source_manifest.sha256"


def _reading(settings: Settings) -> list[str]:
    """Return the settings that reading a shard depends on, beside its rows of the manifest.

    Files are dealt by the manifest alone, so that more shards leave the others as they are; every other source deals
    its documents over all shards.
    """
    if isinstance(settings.experiment.corpus.source, FilesSource):
        return [f"corpus.source.{field}" for field in ("path", "text_field", "id_field", "url_field")]
    return ["corpus.source", "corpus.shards"]


@for_settings(
    lambda settings: dg.asset(
        kinds={"polars", "parquet"},
        io_manager_key="parquet",
        code_version=settings.experiment.version("1", "corpus.source", "corpus.shards"),
        metadata=schema(
            ("file", "string", "Relative to the corpus root; for a generated or hub corpus, what a shard reads."),
            ("shard", "int64", "Null: beyond the last shard (files_per_shard)."),
            ("bytes", "int64", "0 where the source is not files."),
            ("sha256", "string", "Of the file, or of the settings (and revision) that stand for it."),
            ("modified", "string", "ISO time, null where unknown."),
        ),
    )
)
def source_manifest(
    settings: dg.ResourceParam[Settings],
) -> dg.MaterializeResult:
    """One row per source file: its size, digest and shard. Pins what the corpus is made of."""
    with Progress("source manifest", "files") as progress:
        manifest, ignored = ingest.source_manifest(
            settings.experiment.corpus.source, settings.experiment.corpus.shards, progress
        )
    return dg.MaterializeResult(
        value=manifest,
        metadata={
            "dagster/row_count": len(manifest),
            "source_bytes": int(manifest["bytes"].sum()),
            "unassigned_files": int(manifest["shard"].null_count()),
            "ignored_files": len(ignored),
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
                code_version=settings.experiment.version("1", *_reading(settings), "corpus.max_chars"),
                description="One row per usable document of the shard's source files, in file and line order.",
                metadata={
                    "dagster/column_schema": dg.TableSchema(DOCUMENT_COLUMNS),
                    **lineage(**{column.name: SOURCE_FILE for column in DOCUMENT_COLUMNS}),
                },
            ),
            "rejected_rows": dg.AssetOut(
                key="rejected_rows",
                dagster_type=dg.Any,
                io_manager_key="parquet",
                kinds={"polars", "parquet"},
                code_version=settings.experiment.version("1", *_reading(settings)),
                description="One row per source row that is not a usable document, with the reason.",
                metadata=schema(
                    ("file", "string", "Source file, relative to the corpus root."),
                    ("line", "int64", "Line or row of that file, from 1; null where it has none."),
                    ("reason", "string", "Why the row is not a document."),
                    ("excerpt", "string", "The beginning of the row, untrusted."),
                )
                | lineage(**dict.fromkeys(("file", "line", "reason", "excerpt"), SOURCE_FILE)),
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
    """The shard's source rows, parted into usable documents and rejected rows."""
    corpus = settings.experiment.corpus
    with Progress(f"ingest {context.partition_key}", "docs") as progress:
        documents, rejects, counts = ingest.read_shard(
            corpus.source,
            source_manifest.collect(),
            int(context.partition_key),
            corpus.shards,
            corpus.max_chars,
            progress,
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
                **counts,
                "preview": dg.MetadataValue.md(table_preview(documents.head(PREVIEW_ROWS))),
                **progress.metadata(),
            },
        ),
        dg.MaterializeResult(
            asset_key=["corpus", "rejected_rows"],
            value=rejects,
            metadata={
                "dagster/row_count": len(rejects),
                "rows_read": counts["rows_read"],
                "reasons": dg.MetadataValue.md(table_preview(reasons)),
                "preview": dg.MetadataValue.md(table_preview(rejects.head(PREVIEW_ROWS))),
            },
        ),
    )


@for_settings(
    lambda settings: dg.asset(
        kinds={"polars", "parquet"},
        io_manager_key="parquet",
        partitions_def=shards(settings),
        ins={"raw_documents": dg.AssetIn(["corpus", "raw_documents"])},
        code_version=settings.experiment.version(
            "1", *(f"corpus.dedup.{field}" for field in ("shingle_words", "permutations", "bands", "seed"))
        ),
        metadata=schema(
            ("id", "string", "Document."),
            ("bands", "list<uint64>", "Hash of each LSH band of the document's MinHash values."),
            ("text_sha256", "string", "Of the normalised text."),
        )
        | lineage(
            {"corpus/raw_documents": ("id",)},
            bands="corpus/raw_documents.text",
            text_sha256="corpus/raw_documents.text",
        ),
    )
)
def minhash_signatures(
    context: dg.AssetExecutionContext, settings: dg.ResourceParam[Settings], raw_documents: pl.LazyFrame
) -> dg.MaterializeResult:
    """One row per raw document, in its order: LSH bands and the digest of its normalised text."""
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
        code_version=settings.experiment.version("1", "corpus.dedup"),
        metadata=schema(
            ("id", "string", "Document to drop."),
            ("shard", "int64", "Its shard."),
            ("kept_id", "string", "The document kept in its place, itself never dropped."),
            ("kept_shard", "int64", "Shard of the kept document."),
            ("jaccard", "float64", "Exact similarity of the two; null for kind 'id'."),
            (
                "kind",
                "string",
                "'exact': same normalised text; 'near': jaccard at the threshold or above; 'id': same id.",
            ),
        )
        | lineage(
            id="corpus/minhash_signatures.id",
            kept_id="corpus/minhash_signatures.id",
            jaccard="corpus/raw_documents.text",
            kind="corpus/minhash_signatures.bands corpus/minhash_signatures.text_sha256 corpus/raw_documents.text",
        ),
    )
)
def duplicates(
    settings: dg.ResourceParam[Settings],
    raw_documents: dict[str, pl.LazyFrame],
    minhash_signatures: dict[str, pl.LazyFrame],
) -> dg.MaterializeResult:
    """One row per document that repeats a kept document of any shard. LSH proposes, exact similarity decides."""
    scratch = staging(settings.deployment.work_dir, "corpus_duplicates")
    with Progress("duplicates", "pairs") as progress:
        dropped, counts = dedup.find_duplicates(
            raw_documents,
            minhash_signatures,
            settings.experiment.corpus.dedup,
            scratch,
            settings.deployment.memory_limit,
            progress,
        )
    shutil.rmtree(scratch)
    dedup.require_enough(counts, settings.experiment.corpus.source.kind)
    kinds = dict(dropped.group_by("kind").len().iter_rows())
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
    """The least similar near-duplicates beside what is kept: where a wrong decision would show first."""

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
        metadata={
            "dagster/column_schema": dg.TableSchema(
                [
                    *DOCUMENT_COLUMNS,
                    dg.TableColumn("split", "string", "'unique' (D), 'oracle' or 'heldout', by salted hash of the id."),
                ]
            ),
            **lineage(
                {"corpus/raw_documents": [column.name for column in DOCUMENT_COLUMNS], "corpus/duplicates": ("id",)},
                split="corpus/raw_documents.id",
            ),
        },
    )
)
def documents(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    raw_documents: pl.LazyFrame,
    duplicates: pl.LazyFrame,
) -> dg.MaterializeResult:
    """One row per de-duplicated document that belongs to a split."""
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
            "1", "corpus.tokenizer", "corpus.split", "pretraining.tokens_per_step"
        ),
    )
)
def tokenizer(settings: dg.ResourceParam[Settings], documents: dict[str, pl.LazyFrame]) -> dg.MaterializeResult:
    """A Hugging Face tokenizer directory: byte-level BPE trained on D (or a named tokenizer), special tokens included.

    The first asset that sees every split, so it refuses a corpus with too few documents in one, or with less than one
    optimizer step of tokens in D.
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
        metadata=schema(
            ("id", "string", "Document; of documents.parquet."),
            ("split", "string", "As in corpus/documents; of documents.parquet."),
            ("tokens", "array[uint]", "Of tokens.npy: the document's `<bos>` ids `<eos>`."),
        )
        | lineage({"corpus/documents": ("id", "split")}, tokens="corpus/documents.text"),
    )
)
def tokens(
    context: dg.AssetExecutionContext, settings: dg.ResourceParam[Settings], documents: pl.LazyFrame, tokenizer: Path
) -> dg.MaterializeResult:
    """Token array of the shard's documents: bos, the text, eos. documents.parquet has id and split per document."""
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
