"""A sample of a corpus, and the settings under which the pipeline runs on it, in a store of its own."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sbp_assets.corpus.errors import CorpusError
from sbp_assets.corpus.ingest import source_manifest, source_rows
from sbp_assets.corpus.readers import raw_rows
from sbp_assets.corpus.rows import Document, Fields, Reject, RowMaker
from sbp_assets.corpus.source_files import Root
from sbp_assets.settings import Corpus, FilesSource, Settings
from sbp_assets.settings.deployment import EXPERIMENT_FOLDERS
from sbp_assets.storage.progress import Progress

LEAST = 100  # documents: of fewer nothing can be said
MOST_READ = 300_000  # rows of the source that are read; of a larger corpus the files whose names hash lowest
FOLDER, FILE = "sample", "documents.jsonl"
# Held out of D for the checks of the corpus, and for the held-out loss of a baseline.
HELDOUT, HELDOUT_OF_TUNING = 0.02, 0.1


@dataclass(frozen=True)
class Sample:
    """Documents drawn from a corpus, how many documents were read for that, and whether these were all."""

    documents: list[Document]
    read: int
    whole: bool


def draw(corpus: Corpus, size: int, most_read: int = MOST_READ) -> Sample:
    """Return `size` documents of the corpus by the hash of their ids, or all where there are fewer.

    Raises CorpusError where there are fewer than LEAST, or the source cannot be read.
    """
    rows = _rows(corpus)
    read = 0

    def documents() -> Iterator[Document]:
        nonlocal read
        for row in islice(rows, most_read):
            if isinstance(row, Document):
                read += 1
                yield row

    drawn = heapq.nsmallest(size, documents(), key=lambda document: place(document.id))
    whole = next(rows, None) is None
    if len(drawn) < LEAST:
        raise CorpusError(
            f"corpus.source holds {len(drawn):,} documents; a pilot needs {LEAST} at least: give it more of the corpus"
        )
    return Sample(drawn, read, whole)


def place(document_id: str, purpose: str = "sample") -> bytes:
    """Return where a document stands in a random order that is always the same."""
    return hashlib.sha256(f"pilot {purpose}:{document_id}".encode()).digest()


def _rows(corpus: Corpus) -> Iterator[Document | Reject]:
    """Yield the rows of the source, files in the order of a hash, so that the first of them are like the others."""
    source = corpus.source
    if isinstance(source, FilesSource):
        root, fields = Root(source.path), Fields.of(source)
        # Not by a manifest, which would read all of a corpus for its digests.
        for file in sorted(root.files()[0], key=place):
            make = RowMaker(file, root.name, fields, corpus.max_row_bytes, Counter())
            for line, row in raw_rows(root, file, fields, corpus.max_row_bytes, None, pinned=False):
                yield make.make(row, line)
        return
    with Progress("list source", "shards") as progress:
        entries, _ = source_manifest(source, 1, progress)
    yield from source_rows(source, entries, 0, 1, corpus.max_row_bytes, Counter())


def write(sample: Sample, home: Path) -> None:
    """Write the sample where `pilot_settings` reads it."""
    (home / FOLDER).mkdir(parents=True, exist_ok=True)
    lines = (
        json.dumps({"id": d.id, "text": d.text, "url": d.url}, ensure_ascii=False, sort_keys=True) + "\n"
        for d in sample.documents
    )
    (home / FOLDER / FILE).write_text("".join(lines), encoding="utf-8")


def pilot_settings(
    settings: Settings, store: Path, home: Path, unique: float, heldout: float, **changes: dict[str, Any]
) -> Settings:
    """Return `settings` for the sample that is written in `home`, with artifacts, work and instance in `store`.

    `unique` and `heldout` are the shares of the sample that are D and held out; `changes` are other settings of the
    experiment, section=keys.
    """
    values = settings.model_dump()
    experiment, deployment = values["experiment"], values["deployment"]
    corpus = experiment["corpus"]
    corpus |= {"shards": 1, "expected_unique_tokens": None, "expected_unique_documents": None}
    corpus["source"] = {"kind": "files", "path": str(home / FOLDER)}
    corpus["split"] |= {"unique": unique, "oracle": 0.0, "heldout": heldout}
    experiment["pretraining"]["seeds"] = [settings.experiment.first_seed]
    experiment["synthesis"]["judge"] = None
    for section, keys in changes.items():
        experiment[section] |= keys
    deployment |= {key: str(store / folder) for key, folder in EXPERIMENT_FOLDERS.items()}
    deployment |= {"ray_address": None, "tensorboard_dir": None, "wandb_project": None}
    return Settings.model_validate(values)
