"""Read a Hugging Face data set as a stream.

Files of JSON lines and Parquet are read as those of a files source are, row by row. The builders of `datasets` take the
columns of the first file for those of all, and one malformed line for the end of the file; they read other formats,
among them .json, packed or not, which may hold one array.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from sbp_assets.corpus.errors import CorpusError
from sbp_assets.corpus.readers import raw_rows
from sbp_assets.corpus.rows import Document, Fields, Reject, Row, RowMaker
from sbp_assets.corpus.source_files import LINE_SUFFIXES, Root, has_suffix
from sbp_assets.settings import HubSource

logger = logging.getLogger("sbp_assets.corpus.hub")

EXACT_ROWS = 100_000
OWN_FORMATS = {"json": LINE_SUFFIXES, "parquet": (".parquet",)}
"""Builders of `datasets` whose files are read here, with the endings of such files."""


def revision_of(source: HubSource) -> str:
    """Return the current commit of a hub data set, so that every shard reads the same; 'local' for a directory.

    Raises CorpusError where it cannot be looked up, or is a directory that `datasets` would take for others.
    """
    if (path := Path(source.name)).exists():
        # Through a link it would still see the path that the link leads to.
        if found := next((part for part in ("*", "?", "[", "::") if part in str(path.resolve())), None):
            raise CorpusError(
                f"corpus.source.name {source.name!r} is below a folder with {found} in its name, which the library "
                "datasets takes for a pattern: rename it, or read its files with corpus.source.kind files"
            )
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


def hub_rows(source: HubSource, make: RowMaker, shard: int, shards: int) -> Iterator[Document | Reject]:
    """Yield the shard's rows of a streamed data set; `line` is the row's number in what is read.

    All shards together read the first `max_documents` rows: each streams them and takes every `shards`-th. Without
    max_documents, or above EXACT_ROWS, that would read too much where there are as many files as shards or more: then a
    shard reads its own files only, and of max_documents its equal part, or less where its files hold less (a warning
    says so). `make.file` is the manifest's name of the shard, which holds the revision. Raises CorpusError where
    something cannot be read.
    """
    revision = make.file.removeprefix(f"hub:{source.name}@").rpartition(":")[0]
    try:
        parts, rows = _stream(source, None if revision == "local" else revision, make.fields, make.max_bytes)
        limit, quota = source.max_documents, None
        if len(parts) >= shards and (limit is None or limit > EXACT_ROWS):
            size, more = divmod(len(parts), shards)
            first = shard * size + min(shard, more)
            quota = None if limit is None else limit // shards + (shard < limit % shards)
            mine = rows(parts[first : first + size + (shard < more)])
            numbered = itertools.islice(enumerate(mine, start=1), quota)
        else:
            numbered = itertools.islice(enumerate(rows(parts), start=1), shard, limit, shards)
        read = 0
        for line, row in numbered:
            read += 1
            yield make.make(row, line)
        if quota is not None and read < quota:
            logger.warning(
                f"{make.file}: its files hold {read:,} rows; its part of corpus.source.max_documents is {quota:,}, and "
                "no other shard reads more instead"
            )
    except CorpusError as error:
        raise CorpusError(f"{make.file} (split {source.split}): {error}") from error
    except Exception as error:
        # datasets raises its builders' and the network's own errors; all mean that this shard cannot be read.
        raise CorpusError(
            f"{make.file} (split {source.split}) cannot be read: {type(error).__name__}: {error}"
        ) from error


def _stream(
    source: HubSource, revision: str | None, fields: Fields, max_bytes: int
) -> tuple[list[Any], Callable[[list[Any]], Iterable[Row]]]:
    """Return the parts of a data set's split, in order, and the function that streams the rows of some of them."""
    from datasets import load_dataset, load_dataset_builder

    builder: Any = load_dataset_builder(source.name, source.config, revision=revision)
    files = [str(path) for path in (builder.config.data_files or {}).get(source.split, ())]
    endings = OWN_FORMATS.get(builder.name)
    # With one of these, rows are not what the lines or the columns hold.
    reshaped = any(getattr(builder.config, name, None) is not None for name in ("field", "columns", "filters"))
    if files and endings and not reshaped and all(has_suffix(file, endings) for file in files):

        def read(some: list[str]) -> Iterator[Row]:
            for path in some:
                rows = raw_rows(Root(path), path.rpartition("/")[2], fields, max_bytes, None, pinned=False)
                yield from (row for _, row in rows)

        return files, read
    stream = load_dataset(source.name, source.config, split=source.split, streaming=True, revision=revision)

    def read_stream(some: list[int]) -> Iterable[Row]:
        return itertools.chain.from_iterable(stream.shard(stream.num_shards, part) for part in some)

    return list(range(stream.num_shards)), read_stream
