"""Ingest a source: its settings give the manifest; a shard's rows of it give documents and rejected rows."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any, assert_never

import polars as pl

from sbp_assets.corpus import five_tokens
from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.corpus.errors import CorpusError
from sbp_assets.corpus.readers import Document, Fields, Reject, RowMaker, cut_at_word, excerpt, read_rows
from sbp_assets.corpus.source_files import Root
from sbp_assets.settings import ConceptsSource, FilesSource, FiveTokensSource, HubSource
from sbp_assets.storage.columns import Column, table_schema
from sbp_assets.storage.progress import Progress

logger = logging.getLogger("sbp_assets.corpus.ingest")

Source = ConceptsSource | FiveTokensSource | FilesSource | HubSource

MANIFEST_COLUMNS = [
    Column("file", pl.String, "Relative to the corpus root; for a generated or hub corpus, what a shard reads."),
    Column("shard", pl.Int64, "Null: beyond the last shard (files_per_shard)."),
    Column("bytes", pl.Int64, "0 where the source is not files."),
    Column("sha256", pl.String, "Of the file, or of the settings (and revision) that stand for it."),
    Column("modified", pl.String, "ISO time, null where unknown."),
]
MANIFEST_SCHEMA = table_schema(MANIFEST_COLUMNS)

# Every column of a row comes from the file that the manifest pins by name and digest.
_SOURCE_FILE = "corpus/source_manifest.file corpus/source_manifest.sha256"
RAW_DOCUMENT_COLUMNS = [
    Column("id", pl.String, "Unique in its shard.", _SOURCE_FILE),
    Column("text", pl.String, "Cut at corpus.max_chars.", _SOURCE_FILE),
    Column("url", pl.String, "Null where the source has none.", _SOURCE_FILE),
    Column("source", pl.String, "The row's own source field, else the data set's name.", _SOURCE_FILE),
    Column("file", pl.String, "Source file, relative to the corpus root.", _SOURCE_FILE),
    Column("line", pl.Int64, "Line or row of that file, from 1.", _SOURCE_FILE),
]
RAW_DOCUMENT_SCHEMA = table_schema(RAW_DOCUMENT_COLUMNS)

REJECTED_ROW_COLUMNS = [
    Column("file", pl.String, "Source file, relative to the corpus root.", _SOURCE_FILE),
    Column("line", pl.Int64, "Line or row of that file, from 1; null where it has none.", _SOURCE_FILE),
    Column("reason", pl.String, "Why the row is not a document.", _SOURCE_FILE),
    Column("excerpt", pl.String, "The beginning of the row, untrusted.", _SOURCE_FILE),
]
REJECTED_ROW_SCHEMA = table_schema(REJECTED_ROW_COLUMNS)

DUPLICATE_ID = "duplicate id in this shard"


def source_manifest(source: Source, shards: int, progress: Progress) -> tuple[pl.DataFrame, list[str]]:
    """Return the manifest (MANIFEST_COLUMNS) and the files of unknown type that it leaves out.

    Files are assigned to shards in the order of their paths: round-robin, or `files_per_shard` at a time, where a file
    beyond the last shard gets a null shard. A generated source and `hub` have one row per shard; its digest is that of
    the settings, with the revision for `hub`. Raises CorpusError where the source does not exist or has no file.
    """
    if not isinstance(source, FilesSource):
        prefix, digest = _identity(source)
        rows = [(f"{prefix}:{shard}", shard, 0, digest, None) for shard in range(shards)]
        return pl.DataFrame(rows, schema=MANIFEST_SCHEMA, orient="row"), []
    root = Root(source.path)
    files, ignored = root.files()
    progress.total = len(files)
    if len(files) < shards:
        logger.warning("%d files for %d shards: a file goes to one shard whole, so some stay empty", len(files), shards)
    described = []
    for index, file in enumerate(files):
        shard = index % shards if source.files_per_shard is None else index // source.files_per_shard
        try:
            facts: tuple[int | None, str | None, str | None] = root.describe(file)
        except CorpusError as error:
            # Its shard fails when it reads the file, and that shard alone.
            logger.warning(
                "%s; its shard will fail until the file is fixed and corpus/source_manifest is re-materialised", error
            )
            facts = (None, None, None)
        described.append((file, shard if shard < shards else None, *facts))
        progress.advance()
    return pl.DataFrame(described, schema=MANIFEST_SCHEMA, orient="row"), ignored


def source_changes(source: FilesSource, manifest: pl.DataFrame) -> dict[str, dict[str, str]]:
    """Return how the present files differ from their `manifest`: {'new', 'changed', 'gone'}, each {file: stamp}.

    No file is read: a file has changed when its size differs or, where both are known, its modification time.
    """
    known = {row["file"]: row for row in manifest.iter_rows(named=True)}
    changes: dict[str, dict[str, str]] = {"new": {}, "changed": {}, "gone": dict.fromkeys(known, "")}
    for file, (size, modified) in Root(source.path).stamps().items():
        row = changes["gone"].pop(file, None) is not None and known[file]
        if not row:
            changes["new"][file] = f"{size} {modified}"
        elif size != row["bytes"] or (modified and row["modified"] and modified != row["modified"]):
            changes["changed"][file] = f"{size} {modified}"
    return changes


def read_shard(
    source: Source, manifest: pl.DataFrame, shard: int, shards: int, max_chars: int | None, progress: Progress
) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, int]]:
    """Return documents (RAW_DOCUMENT_COLUMNS), rejected rows (REJECTED_ROW_COLUMNS) and counts of a shard.

    The counts are {rows_read, rows_cut}. Only the manifest's files of `shard` are read. Raises CorpusError, which names
    the file, where one cannot be read or has changed.
    """
    mine = manifest.filter(pl.col("shard") == shard)
    documents: list[Document] = []
    rejects: list[Reject] = []
    seen: set[str] = set()
    counts = {"rows_read": 0, "rows_cut": 0}
    for row in itertools.chain.from_iterable(_rows(source, file, shard, shards) for file in mine.iter_rows(named=True)):
        counts["rows_read"] += 1
        progress.advance()
        if isinstance(row, Reject):
            rejects.append(row)
        elif row.id in seen:
            rejects.append(Reject(row.file, row.line, f"{DUPLICATE_ID}: {row.id!r}", excerpt(row.text)))
        else:
            seen.add(row.id)
            text = cut_at_word(row.text, max_chars)
            counts["rows_cut"] += len(text) < len(row.text)
            documents.append(Document(**{**asdict(row), "text": text}))
    return (
        pl.DataFrame([astuple(d) for d in documents], schema=RAW_DOCUMENT_SCHEMA, orient="row"),
        pl.DataFrame([astuple(r) for r in rejects], schema=REJECTED_ROW_SCHEMA, orient="row"),
        counts,
    )


def _identity(source: ConceptsSource | FiveTokensSource | HubSource) -> tuple[str, str]:
    """Return the prefix of a manifest row's `file`, and the digest that identifies the source's content."""
    if not isinstance(source, HubSource):
        return source.kind, hashlib.sha256(source.model_dump_json().encode()).hexdigest()
    pinned = f"hub:{source.name}@{_revision(source)}"
    return pinned, hashlib.sha256(f"{pinned} {source.model_dump_json()}".encode()).hexdigest()


def _revision(source: HubSource) -> str:
    """Return the current commit of a hub data set, so that every shard reads the same; 'local' for a directory."""
    if Path(source.name).exists():
        return "local"
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return str(HfApi().dataset_info(source.name, revision=source.revision).sha)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise CorpusError(
            f"corpus.source.name {source.name!r} (revision {source.revision or 'latest'}) cannot be looked up on the "
            f"hub: {error}"
        ) from error


def _rows(source: Source, entry: dict[str, Any], shard: int, shards: int) -> Iterator[Document | Reject]:
    file = entry["file"]
    match source:
        case FilesSource():
            logger.info("reading %s", file)
            fields = Fields(source.text_field, source.id_field, source.url_field)
            yield from read_rows(Root(source.path), file, fields, entry["sha256"])
        case ConceptsSource():
            world = ConceptWorld(source)
            for number in range(shard, source.documents, shards):
                yield Document(**world.document(number), file=file, line=number + 1)
        case FiveTokensSource():
            for number in range(shard, source.documents, shards):
                yield Document(**five_tokens.document(source, number), file=file, line=number + 1)
        case HubSource():
            yield from _hub(source, file, shard, shards)
        case _:
            assert_never(source)


def _hub(source: HubSource, file: str, shard: int, shards: int) -> Iterator[Document | Reject]:
    """Yield the rows of a streamed data set; `line` is the row's number in what is read.

    With at least as many files as shards a shard reads its own files only; with fewer, every shard streams all rows and
    takes each `shards`-th.
    """
    from datasets import load_dataset

    revision = file.removeprefix(f"hub:{source.name}@").rpartition(":")[0]
    try:
        rows = load_dataset(
            source.name, source.config, split=source.split, streaming=True,
            revision=None if revision == "local" else revision,
        )  # fmt: skip
        own_files = rows.num_shards >= shards
        limit = source.max_documents
        if own_files:
            rows = rows.shard(num_shards=shards, index=shard)
            limit = None if limit is None else limit // shards + (shard < limit % shards)
            numbered = itertools.islice(enumerate(rows, start=1), limit)
        else:
            numbered = itertools.islice(enumerate(rows, start=1), shard, limit, shards)
        make = RowMaker(file, source.name, Fields(source.text_field, source.id_field, source.url_field))
        for line, row in numbered:
            yield make.from_row(row, line, str(row.get(source.text_field)))
    except Exception as error:
        # datasets raises its builders' and the network's own errors; all mean that this shard cannot be read.
        raise CorpusError(f"{file} (split {source.split}) cannot be read: {type(error).__name__}: {error}") from error
