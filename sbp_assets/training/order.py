"""Which token is read when: a pure function of the seed and the step over memory-mapped token arrays.

A data order has no state, so a run resumes at any step without replaying the steps before it, and any number of
processes read the same global batch. The order of an epoch's documents, and where each ends, are mapped files as well:
memory does not grow with the corpus, and the processes of a machine share them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from sbp_assets.training.documents import Documents
from sbp_assets.training.mapped import PIECE, MappedArrays, in_pieces
from sbp_assets.training.rows import IGNORED, Rows, positions_within
from sbp_assets.training.spec import ExamplesData, Source, StreamData

_ONCE_ORDER, _EPOCH_ORDER = 0, 1  # Keep the two kinds of permutation independent under one seed.


class DataOrder(Protocol):
    """Rows of any step, and a digest of everything that is read."""

    def rows(self, start: int, stop: int) -> Rows:
        """Return the global rows start:stop, (stop - start, context); row r belongs to step r // rows_per_step."""
        ...

    def documents(self, start: int, stop: int) -> list[str]:
        """Return the ids of the documents in the global rows start:stop, in reading order."""
        ...

    @property
    def total_rows(self) -> int | None:
        """Return the number of rows until the data ends; None where it never does."""
        ...

    def digest(self, vocab_size: int) -> str:
        """Return the SHA-256 of the data, in hex; raise ValueError where a token id is outside the vocabulary."""
        ...


class StreamOrder:
    """Documents of `StreamData` concatenated in a seeded order and cut into rows of `context` tokens.

    A row's last label is the first token of the next row, where the document continues: every token but the first of
    each document is predicted exactly once.
    """

    def __init__(
        self, data: StreamData, context: int, seed: int, folder: Path | None = None, scratch: Path | None = None
    ) -> None:
        """Index the documents of `data` in `folder`, or else in temporary files in `scratch`: 36 bytes a document.

        Processes that give the same folder share the index, and later ones find it there.
        """
        own = folder and _of_this_data(folder, [*data.repeated, *data.once], data.passes, seed)
        self._arrays = MappedArrays(own, scratch)
        self._repeated = Documents(data.repeated, self._arrays, "repeated")
        self._once = Documents(data.once, self._arrays, "once")
        self._context, self._seed, self._epochs = context, seed, data.passes
        self._repeated_tokens = int(self._repeated.lengths.sum(dtype=np.int64))
        self._once_order = self._arrays.array(
            "once.order",
            np.int32,
            lambda: (np.arange(*bounds) for bounds in in_pieces(0, len(self._once))),
            np.random.default_rng([seed, _ONCE_ORDER]).shuffle,
        )
        self._cuts = np.linspace(0, len(self._once), data.passes + 1).astype(np.int64)
        once_tokens = [
            sum(int(self._once.lengths[self._once_order[a:b]].sum(dtype=np.int64)) for a, b in in_pieces(first, last))
            for first, last in itertools.pairwise(self._cuts.tolist())
        ]
        # First token of each epoch, and of the first epoch after them.
        self._epoch_starts = np.cumsum([0, *once_tokens]) + self._repeated_tokens * np.arange(data.passes + 1)
        if not self._epoch_starts[-1]:
            raise ValueError(f"no tokens to train on in {[str(s.directory) for s in [*data.repeated, *data.once]]}")
        # Two epochs: a row may span the end of one and the start of the next.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    @property
    def sizes(self) -> list[int]:
        """Return the number of documents of each source, repeated ones first."""
        return self._repeated.sizes + self._once.sizes

    @property
    def total_rows(self) -> int | None:
        """Return the number of rows until the data ends; None with repeated documents, which never end."""
        return None if self._repeated_tokens else int(self._epoch_starts[-1]) // self._context

    def epoch_documents(self, number: int) -> np.ndarray:
        """Return the documents of epoch `number` in reading order, (documents,) int32, mapped.

        Repeated documents are numbered from 0, and once documents after them.
        """
        # Slicing past the last cut gives none: further epochs read the repeated documents alone.
        first, last = self._cuts[min(number, self._epochs)], self._cuts[min(number + 1, self._epochs)]

        def numbers() -> Iterator[np.ndarray]:
            for bounds in in_pieces(0, len(self._repeated)):
                yield np.arange(*bounds)
            for start, stop in in_pieces(int(first), int(last)):
                yield self._once_order[start:stop].astype(np.int64) + len(self._repeated)

        shuffle = np.random.default_rng([self._seed, _EPOCH_ORDER, number]).shuffle
        return self._arrays.array(f"epoch {number}", np.int32, numbers, shuffle)

    def reading(self, tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield what the stream's first `tokens` tokens are, piece by piece, in reading order.

        Each item is three arrays, (documents,) int64: the documents begun in the piece, the place in the stream of each
        one's first token, and the tokens read of each (all of them, but of the last document). A piece is a part of an
        epoch: no document is twice in one.
        """
        number = read = 0
        while read < tokens and len(documents := self.epoch_documents(number)):
            for first, last in in_pieces(0, len(documents)):
                piece = documents[first:last].astype(np.int64)
                lengths = self._lengths(piece)
                ends = read + np.cumsum(lengths)
                begun = slice(int(np.searchsorted(ends, tokens)) + 1)
                starts = (ends - lengths)[begun]
                yield piece[begun], starts, np.minimum(ends[begun], tokens) - starts
                read = int(ends[-1])
                if read >= tokens:
                    break
            self._forget(number - 1)
            number += 1

    def rows(self, start: int, stop: int) -> Rows:
        """Return rows start:stop of the stream; raise ValueError past the end of data that has one."""
        first, last = start * self._context, stop * self._context + 1
        ids = np.zeros(last - first, np.int64)
        begins = np.zeros(last - first, bool)
        filled = first
        while filled < last:
            try:
                epoch_start, documents, ends = self._locate(filled)
            except IndexError:
                if filled < last - 1:
                    raise ValueError(f"the data ends after {filled} tokens, before row {stop}") from None
                begins[-1] = True  # Nothing follows the stream's last token.
                break
            within = filled - epoch_start
            at = int(np.searchsorted(ends, within, side="right"))
            while filled < last and at < len(documents):
                document_start = int(ends[at - 1]) if at else 0
                begin = filled - epoch_start - document_start
                stop_at = min(int(ends[at]) - document_start, begin + last - filled)
                source, document = self._owner(int(documents[at]))
                ids[filled - first : filled - first + stop_at - begin] = source.read(document, begin, stop_at)
                if begin == 0 and stop_at > begin:
                    begins[filled - first] = True
                filled += stop_at - begin
                at += 1
        shape = (stop - start, self._context)
        labels = np.where(begins[1:], IGNORED, ids[1:]).reshape(shape)
        return Rows(ids[:-1].reshape(shape), positions_within(begins[:-1].reshape(shape)), labels)

    def documents(self, start: int, stop: int) -> list[str]:
        """Return the ids of the documents in rows start:stop of the stream, in reading order."""
        token, last = start * self._context, stop * self._context
        names: list[str] = []
        while token < last:
            epoch_start, documents, ends = self._locate(token)
            span = [token - epoch_start, last - 1 - epoch_start]
            begin, end = np.searchsorted(ends, span, side="right")
            names += self._names(documents[begin : end + 1].astype(np.int64))
            token = epoch_start + int(ends[-1])
        return names

    def digest(self, vocab_size: int) -> str:
        """Return the SHA-256 of the documents read and how they are mixed, in hex, as Documents.digest does."""
        parts = f"stream {self._epochs} {self._repeated.digest(vocab_size)} {self._once.digest(vocab_size)}"
        return hashlib.sha256(parts.encode()).hexdigest()

    def _names(self, documents: np.ndarray) -> list[str]:
        once = documents >= len(self._repeated)
        names = np.empty(len(documents), dtype=object)
        names[~once] = self._repeated.names(documents[~once])
        names[once] = self._once.names(documents[once] - len(self._repeated))
        return names.tolist()  # type: ignore[no-any-return]

    def _owner(self, document: int) -> tuple[Documents, int]:
        once = document - len(self._repeated)
        return (self._repeated, document) if once < 0 else (self._once, once)

    def _locate(self, token: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Return the first token of the epoch that holds `token`, its documents in order, and where each ends in it."""
        if token < self._epoch_starts[-1]:
            number = int(np.searchsorted(self._epoch_starts, token, side="right")) - 1
            start = int(self._epoch_starts[number])
        elif self._repeated_tokens:
            further = (token - int(self._epoch_starts[-1])) // self._repeated_tokens
            number, start = self._epochs + further, int(self._epoch_starts[-1]) + further * self._repeated_tokens
        else:
            raise IndexError(token)
        return start, *self._epoch(number)

    def _make_epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        documents = self.epoch_documents(number)
        self._forget(number - 2)
        return documents, self._arrays.array(f"epoch {number} ends", np.int64, lambda: _ends(documents, self._lengths))

    def _forget(self, number: int) -> None:
        """Remove the order of an epoch that is over, to free the disk."""
        self._arrays.remove(f"epoch {number}", f"epoch {number} ends")

    def _lengths(self, documents: np.ndarray) -> np.ndarray:
        """Return the tokens of documents, (documents,) int64, repeated and once documents alike."""
        lengths = np.empty(len(documents), np.int64)
        once = documents >= len(self._repeated)
        lengths[~once] = self._repeated.lengths[documents[~once]]
        lengths[once] = self._once.lengths[documents[once] - len(self._repeated)]
        return lengths


class ExamplesOrder:
    """Whole examples of `ExamplesData`, permuted per epoch, as many as fit in each row of `context` tokens.

    Each epoch starts a new row. A fraction of an epoch reads that share of its permutation.
    """

    def __init__(
        self,
        data: ExamplesData,
        context: int,
        seed: int,
        pad: int,
        folder: Path | None = None,
        scratch: Path | None = None,
    ) -> None:
        """Index the examples of `data` in `folder`, or else in temporary files in `scratch`, as StreamOrder does."""
        own = folder and _of_this_data(folder, [data.source], data.epochs, seed, context)
        self._arrays = MappedArrays(own, scratch)
        self._documents = Documents([data.source], self._arrays)
        self._context, self._seed, self._pad = context, seed, pad
        directory = data.source.directory
        if not len(self._documents):
            raise ValueError(f"no examples to train on in {directory}")
        if self._documents.prompt_tokens is None:
            raise ValueError(f"{directory}/documents.parquet has no prompt_tokens column: it does not hold examples")
        if (longest := int(self._documents.lengths.max())) > context:
            row = int(self._documents.lengths.argmax())
            raise ValueError(
                f"{directory}: example {row} has {longest} tokens, above the context length {context}; "
                "lower synthesizer.max_document_tokens or raise model.context_length"
            )
        self._counts = [len(self._documents)] * int(data.epochs)
        if rest := round((data.epochs - int(data.epochs)) * len(self._documents)):
            self._counts.append(rest)
        if not self._counts:
            raise ValueError(f"{data.epochs} epochs of {len(self._documents)} examples are no examples at all")
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._row_starts = np.cumsum([0] + [len(self._epoch(k)[1]) - 1 for k in range(len(self._counts))])

    @property
    def total_rows(self) -> int:
        """Return the number of rows of all epochs."""
        return int(self._row_starts[-1])

    def epoch_examples(self, number: int) -> np.ndarray:
        """Return the examples of epoch `number` in reading order, (examples,) int32, mapped."""
        order = self._arrays.array(
            f"epoch {number}",
            np.int32,
            lambda: (np.arange(*bounds) for bounds in in_pieces(0, len(self._documents))),
            np.random.default_rng([self._seed, _EPOCH_ORDER, number]).shuffle,
        )
        return order[: self._counts[number]]

    def reads(self, example: int) -> int:
        """Return how often `example` is read in all epochs."""
        return sum(example in self.epoch_examples(number) for number in range(len(self._counts)))

    def rows(self, start: int, stop: int) -> Rows:
        """Return rows start:stop, (stop - start, context); rows past the end are padding without loss."""
        shape = (stop - start, self._context)
        ids = np.full(shape, self._pad, np.int64)
        positions = np.broadcast_to(np.arange(self._context), shape).copy()
        labels = np.full(shape, IGNORED, np.int64)
        prompts = self._documents.prompt_tokens
        assert prompts is not None
        for row in range(start, min(stop, self.total_rows)):
            at = 0
            for document in self._examples(row):
                length = int(self._documents.lengths[document])
                tokens = self._documents.read(document, 0, length)
                ids[row - start, at : at + length] = tokens
                positions[row - start, at : at + length] = np.arange(length)
                # The token before d2 predicts d2's first: the last prompt position has a label.
                prompt = max(int(prompts[document]), 1)
                labels[row - start, at + prompt - 1 : at + length - 1] = tokens[prompt:]
                at += length
            positions[row - start, at:] = np.arange(self._context - at)
        return Rows(ids, positions, labels)

    def documents(self, start: int, stop: int) -> list[str]:
        """Return the ids of the examples in rows start:stop, in reading order."""
        rows = range(start, min(stop, self.total_rows))
        return self._documents.names(np.concatenate([self._examples(row) for row in rows] or [np.zeros(0, np.int32)]))

    def _examples(self, row: int) -> np.ndarray:
        """Return the examples in a row, (examples,) int64."""
        epoch = int(np.searchsorted(self._row_starts, row, side="right")) - 1
        order, cuts = self._epoch(epoch)
        within = row - int(self._row_starts[epoch])
        return order[cuts[within] : cuts[within + 1]]

    def digest(self, vocab_size: int) -> str:
        """Return the SHA-256 of the examples and how much of them is read, in hex, as Documents.digest does."""
        parts = f"examples {self._counts} {self._documents.digest(vocab_size)}"
        return hashlib.sha256(parts.encode()).hexdigest()

    def _make_epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        order = self.epoch_examples(number)
        return order, self._arrays.array(f"epoch {number} cuts", np.int64, lambda: self._cuts(order))

    def _cuts(self, order: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the places in `order` where rows begin, and its end."""
        ends = self._arrays.temporary(np.int64, _ends(order, lambda some: self._documents.lengths[some]))
        cuts = [0]
        while cuts[-1] < len(order):
            read = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
            cuts.append(int(np.searchsorted(ends, read + self._context, side="right")))
            if len(cuts) > PIECE:
                yield np.asarray(cuts[:-1])
                del cuts[:-1]
        yield np.asarray(cuts)


def _ends(documents: np.ndarray, lengths: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
    """Yield in pieces where each of `documents` ends, one after another."""
    read = 0
    for first, last in in_pieces(0, len(documents)):
        ends = read + np.cumsum(lengths(documents[first:last]), dtype=np.int64)
        read = int(ends[-1])
        yield ends


def _of_this_data(folder: Path, sources: list[Source], *rest: float) -> Path:
    """Return the folder in `folder` of an index of `sources` as they are now, and remove those of other data.

    It is named after them, the times of their files, and the numbers that its order depends on.
    """
    files = [source.directory / name for source in sources for name in ("offsets.npy", "documents.parquet")]
    states = [(file.stat().st_ino, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    described = json.dumps([[str(source.directory), source.split] for source in sources] + [states, rest])
    own = folder / hashlib.sha256(described.encode()).hexdigest()[:16]
    for other in folder.glob("*"):
        if other != own:
            shutil.rmtree(other, ignore_errors=True)
    return own
