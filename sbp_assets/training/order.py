"""Which token is read when: a pure function of the seed and the step over memory-mapped token arrays.

A data order has no state, so a run resumes at any step without replaying the steps before it, and any number of
processes read the same global batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Protocol

import numpy as np

from sbp_assets.training.documents import Documents
from sbp_assets.training.rows import IGNORED, Rows, positions_within
from sbp_assets.training.spec import ExamplesData, StreamData

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

    def __init__(self, data: StreamData, context: int, seed: int) -> None:
        self._repeated, self._once = Documents(data.repeated), Documents(data.once)
        self._context, self._seed, self._epochs = context, seed, data.passes
        self._repeated_tokens = int(self._repeated.lengths.sum())
        self._once_order = np.random.default_rng([seed, _ONCE_ORDER]).permutation(len(self._once))
        self._cuts = np.linspace(0, len(self._once), data.passes + 1).astype(np.int64)
        read = np.concatenate([[0], np.cumsum(self._once.lengths[self._once_order])])[self._cuts]
        # First token of each epoch, and of the first epoch after them.
        self._epoch_starts = read + self._repeated_tokens * np.arange(data.passes + 1)
        if not self._epoch_starts[-1]:
            raise ValueError(f"no tokens to train on in {[str(s.directory) for s in [*data.repeated, *data.once]]}")
        # Two epochs: a row may span the end of one and the start of the next.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    @property
    def total_rows(self) -> int | None:
        """Return the number of rows until the data ends; None with repeated documents, which never end."""
        return None if self._repeated_tokens else int(self._epoch_starts[-1]) // self._context

    def epoch_documents(self, number: int) -> np.ndarray:
        """Return the documents of epoch `number` in reading order, (documents,) int64.

        Repeated documents are numbered from 0, and once documents after them.
        """
        # Slicing past the last cut gives none: further epochs read the repeated documents alone.
        first, last = self._cuts[min(number, self._epochs)], self._cuts[min(number + 1, self._epochs)]
        once = self._once_order[first:last] + len(self._repeated)
        documents = np.concatenate([np.arange(len(self._repeated)), once])
        return np.random.default_rng([self._seed, _EPOCH_ORDER, number]).permutation(documents)

    def reading(self, tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield what the stream's first `tokens` tokens are, epoch by epoch, in reading order.

        Each item is three arrays, (documents,) int64: the documents begun in the epoch, the place in the stream of each
        one's first token, and the tokens read of each (all of them, but of the last document).
        """
        lengths = np.concatenate([self._repeated.lengths, self._once.lengths])
        number = read = 0
        while read < tokens and len(documents := self.epoch_documents(number)):
            ends = read + np.cumsum(lengths[documents])
            begun = slice(int(np.searchsorted(ends, tokens)) + 1)
            starts = (ends - lengths[documents])[begun]
            yield documents[begun], starts, np.minimum(ends[begun], tokens) - starts
            number, read = number + 1, int(ends[-1])

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
            for document in documents[begin : end + 1].tolist():
                source, number = self._owner(document)
                names.append(source.name(number))
            token = epoch_start + int(ends[-1])
        return names

    def digest(self, vocab_size: int) -> str:
        """Return the SHA-256 of the documents read and how they are mixed, in hex, as Documents.digest does."""
        parts = f"stream {self._epochs} {self._repeated.digest(vocab_size)} {self._once.digest(vocab_size)}"
        return hashlib.sha256(parts.encode()).hexdigest()

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
        lengths = np.concatenate([self._repeated.lengths, self._once.lengths])[documents]
        return documents, np.cumsum(lengths)


class ExamplesOrder:
    """Whole examples of `ExamplesData`, permuted per epoch, as many as fit in each row of `context` tokens.

    Each epoch starts a new row. A fraction of an epoch reads that share of its permutation.
    """

    def __init__(self, data: ExamplesData, context: int, seed: int, pad: int) -> None:
        self._documents = Documents([data.source])
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
        """Return the examples of epoch `number` in reading order, (examples,) int64."""
        order = np.random.default_rng([self._seed, _EPOCH_ORDER, number]).permutation(len(self._documents))
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
        return [self._documents.name(int(example)) for row in rows for example in self._examples(row)]

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
        ends = np.cumsum(self._documents.lengths[order])
        cuts = [0]
        while cuts[-1] < len(order):
            read = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
            cuts.append(int(np.searchsorted(ends, read + self._context, side="right")))
        return order, np.asarray(cuts, np.int64)
