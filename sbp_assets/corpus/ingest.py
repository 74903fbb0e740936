"""Ingest a source: its settings give the manifest; a shard's rows of it give documents and rejected rows."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import assert_never

import polars as pl

from sbp_assets.corpus import five_tokens
from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.corpus.errors import CorpusError
from sbp_assets.corpus.hub import hub_rows, revision_of
from sbp_assets.corpus.readers import read_rows
from sbp_assets.corpus.rows import Document, Fields, Reject, RowMaker, cut_at_word, excerpt
from sbp_assets.corpus.shingles import normalise
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

REPEATED_ROW = "duplicate id in this shard, and the same text"
REPEATED_ID = "duplicate id in this shard"
# Fewer than FEW documents, and than FEW_SHARE of those that there are, stop no run: by chance, one of 99 is above 1%.
FEW, FEW_SHARE = 10, 0.1


@dataclass
class ShardCounts:
    """What became of the rows of a shard.

    `repeated_ids` are the rows that were rejected because a document of another text has their id, the first of them
    with both places as `first_repeated_id`; `generated_ids` counts ids that were made from file and row though an
    id_field is set, by the type that was found in their place.
    """

    rows_read: int = 0
    rows_cut: int = 0
    repeated_ids: int = 0
    first_repeated_id: str = ""
    generated_ids: Counter[str] = field(default_factory=Counter)


def source_manifest(source: Source, shards: int, progress: Progress) -> tuple[pl.DataFrame, dict[str, str]]:
    """Return the manifest (MANIFEST_COLUMNS) and the files that it leaves out, with the reasons: {file: reason}.

    Files are assigned to shards in the order of their paths: round-robin, or `files_per_shard` at a time, where a file
    beyond the last shard gets a null shard. A generated source and `hub` have one row per shard; its digest is that of
    the settings, with the revision for `hub`. Raises CorpusError where the source does not exist or has no file.
    """
    if not isinstance(source, FilesSource):
        prefix, digest = _identity(source)
        rows = [(f"{prefix}:{shard}", shard, 0, digest, None) for shard in range(shards)]
        return pl.DataFrame(rows, schema=MANIFEST_SCHEMA, orient="row"), {}
    root = Root(source.path)
    files, left_out = root.files()
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
    return pl.DataFrame(described, schema=MANIFEST_SCHEMA, orient="row"), left_out


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
    source: Source,
    manifest: pl.DataFrame,
    shard: int,
    shards: int,
    max_chars: int | None,
    progress: Progress,
    max_row_bytes: int,
) -> tuple[pl.DataFrame, pl.DataFrame, ShardCounts]:
    """Return documents (RAW_DOCUMENT_COLUMNS), rejected rows (REJECTED_ROW_COLUMNS) and counts of a shard.

    Only the manifest's files of `shard` are read. A row of more than `max_row_bytes` is rejected. Raises CorpusError,
    which names the file, where one cannot be read or has changed.
    """
    mine = manifest.filter(pl.col("shard") == shard)
    documents: list[tuple[object, ...]] = []
    rejects: list[tuple[object, ...]] = []
    seen: dict[str, int] = {}  # id: place in `documents`
    counts = ShardCounts()
    for row in source_rows(source, mine, shard, shards, max_row_bytes, counts.generated_ids):
        counts.rows_read += 1
        progress.advance()
        if isinstance(row, Reject):
            rejects.append((row.file, row.line, row.reason, row.excerpt))
            continue
        text = cut_at_word(row.text, max_chars)
        if row.id not in seen:
            seen[row.id] = len(documents)
            counts.rows_cut += len(text) < len(row.text)
            documents.append((row.id, text, row.url, row.source, row.file, row.line))
            continue
        _, first_text, _, _, first_file, first_line = documents[seen[row.id]]
        same, name = normalise(str(first_text)) == normalise(text), excerpt(row.id)
        if not same:
            counts.repeated_ids += 1
            counts.first_repeated_id = (
                counts.first_repeated_id or f"{name!r} in {row.file}:{row.line} and {first_file}:{first_line}"
            )
        reason = f"{REPEATED_ROW if same else REPEATED_ID}: {name!r}"
        rejects.append((row.file, row.line, reason, excerpt(row.text)))
    return (
        pl.DataFrame(documents, schema=RAW_DOCUMENT_SCHEMA, orient="row"),
        pl.DataFrame(rejects, schema=REJECTED_ROW_SCHEMA, orient="row"),
        counts,
    )


def require_distinct_ids(repeated: int, documents: int, allowed: float, where: str, example: str) -> None:
    """Raise CorpusError where more than the share `allowed` of `documents`, and more than a few, have another's id.

    Nothing tells such documents from duplicates, and all but the first of each id would be dropped.
    """
    if repeated <= allowed * documents or (repeated < FEW and repeated < FEW_SHARE * documents):
        return
    raise CorpusError(
        f"{where}: {repeated:,} of {documents:,} documents ({100 * repeated / documents:.4g}%) have the id of a "
        f"document of another text, more than corpus.max_repeated_ids ({100 * allowed:.4g}%); for example {example}. "
        "These ids are not unique over the corpus (do they start again in every file?), and all but the first document "
        "of each would be dropped. Set corpus.source.id_field to null: an id is then made of the file and the row. Or "
        "name another field. Where one id stands for versions of one document, of which the first is enough, raise "
        "corpus.max_repeated_ids"
    )


def _identity(source: ConceptsSource | FiveTokensSource | HubSource) -> tuple[str, str]:
    """Return the prefix of a manifest row's `file`, and the digest that identifies the source's content."""
    if not isinstance(source, HubSource):
        return source.kind, hashlib.sha256(source.model_dump_json().encode()).hexdigest()
    pinned = f"hub:{source.name}@{revision_of(source)}"
    return pinned, hashlib.sha256(f"{pinned} {source.model_dump_json()}".encode()).hexdigest()


def source_rows(
    source: Source, entries: pl.DataFrame, shard: int, shards: int, max_bytes: int, generated: Counter[str]
) -> Iterator[Document | Reject]:
    """Yield the rows of the manifest's `entries`, which are those of `shard`; `generated` counts ids that are made."""
    match source:
        case FilesSource():
            root = Root(source.path)
            fields = Fields.of(source)
            for file, sha256 in entries.select("file", "sha256").iter_rows():
                yield from read_rows(root, file, RowMaker(file, root.name, fields, max_bytes, generated), sha256)
        case ConceptsSource():
            world = ConceptWorld(source)
            for file in entries["file"]:
                for number in range(shard, source.documents, shards):
                    yield Document(**world.document(number), file=file, line=number + 1)
        case FiveTokensSource():
            for file in entries["file"]:
                for number in range(shard, source.documents, shards):
                    yield Document(**five_tokens.document(source, number), file=file, line=number + 1)
        case HubSource():
            fields = Fields.of(source)
            for file in entries["file"]:
                make = RowMaker(file, source.name, fields, max_bytes, generated)
                yield from hub_rows(source, make, shard, shards)
        case _:
            assert_never(source)
