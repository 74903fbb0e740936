"""Which token is read when: a pure function of the seed and the step over memory-mapped token arrays.

A data order has no state, so a run resumes at any step without replaying the steps before it, and any number of
processes read the same global batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import polars as pl

from sbp_assets.storage.token_arrays import TokenArrays
from sbp_assets.training.spec import ExamplesData, Source, StreamData

IGNORED = -100  # torch.nn.functional.cross_entropy's default ignore_index
_ONCE_ORDER, _PASS_ORDER = 0, 1  # Keep the two kinds of permutation independent under one seed.
_HASH_CHUNK = 1 << 24


@dataclass(frozen=True)
class Rows:
    """A batch of packed rows; every array is (rows, context_length) int64."""

    input_ids: np.ndarray
    position_ids: np.ndarray  # restart at 0 at each document, and at the start of a row
    labels: np.ndarray  # the next token, or IGNORED

    def part(self, start: int, stop: int) -> Rows:
        """Rows start:stop."""
        return Rows(self.input_ids[start:stop], self.position_ids[start:stop], self.labels[start:stop])

    def padded(self, rows: int) -> Rows:
        """At least `rows` rows: the missing ones hold token 0 without loss."""
        missing = rows - len(self.input_ids)
        if missing <= 0:
            return self
        shape = (missing, self.input_ids.shape[1])
        positions = np.broadcast_to(np.arange(shape[1]), shape)
        return Rows(
            np.concatenate([self.input_ids, np.zeros(shape, np.int64)]),
            np.concatenate([self.position_ids, positions]),
            np.concatenate([self.labels, np.full(shape, IGNORED, np.int64)]),
        )

    @property
    def supervised(self) -> int:
        """Positions that count in the loss."""
        return int((self.labels != IGNORED).sum())


class DataOrder(Protocol):
    """Rows of any step, and a digest of everything that is read."""

    def rows(self, start: int, stop: int) -> Rows:
        """Global rows start:stop; row r belongs to step r // rows_per_step."""
        ...

    @property
    def total_rows(self) -> int | None:
        """Rows until the data ends; None: never."""
        ...

    def digest(self, vocab_size: int) -> str:
        """SHA-256 of the data; ValueError where a token id is outside the vocabulary."""
        ...


class Documents:
    """Documents of several sources under one numbering, their tokens left on disk."""

    def __init__(self, sources: list[Source]) -> None:
        self._arrays: list[TokenArrays] = []
        self._selected: list[np.ndarray] = []
        starts, lengths, owner, prompts = [], [], [], []
        for number, source in enumerate(sources):
            arrays = TokenArrays.load(source.directory)
            selected = _selected(arrays, source)
            self._arrays.append(arrays)
            self._selected.append(selected)
            starts.append(arrays.offsets[:-1][selected])
            lengths.append(arrays.lengths[selected])
            owner.append(np.full(len(selected), number, np.int32))
            if "prompt_tokens" in arrays.documents.columns:
                prompts.append(arrays.documents["prompt_tokens"].to_numpy()[selected].astype(np.int64))
        self._starts = _concatenate(starts)
        self._owner = _concatenate(owner)
        self.lengths = _concatenate(lengths)
        """Tokens per document, (documents,) int64."""
        self.prompt_tokens = _concatenate(prompts) if len(prompts) == len(sources) else None
        """Leading tokens without loss, (documents,) int64, where every source has the column."""

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens start:stop of a document."""
        offset = self._starts[document]
        return self._arrays[self._owner[document]].tokens[offset + start : offset + stop]

    def digest(self, vocab_size: int) -> str:
        """SHA-256 of the arrays and the selection; ValueError where a token id is outside the vocabulary."""
        digest = hashlib.sha256()
        for arrays, selected in zip(self._arrays, self._selected, strict=True):
            digest.update(f"{arrays.tokens.dtype}{len(arrays.tokens)}".encode())
            for start in range(0, len(arrays.tokens), _HASH_CHUNK):
                chunk = np.ascontiguousarray(arrays.tokens[start : start + _HASH_CHUNK])
                if (largest := int(chunk.max())) >= vocab_size:
                    raise ValueError(
                        f"token id {largest} in the data is outside the tokenizer's vocabulary of {vocab_size}: "
                        "the tokens were made with another tokenizer; materialise them again"
                    )
                digest.update(chunk.data)
            digest.update(np.ascontiguousarray(arrays.offsets).data)
            digest.update(np.ascontiguousarray(selected).data)
        if self.prompt_tokens is not None:
            digest.update(self.prompt_tokens.data)
        return digest.hexdigest()


class StreamOrder:
    """Documents of `StreamData` concatenated in a seeded order and cut into rows of `context` tokens.

    A row's last label is the first token of the next row, where the document goes on: every token but the first of
    each document is predicted exactly once.
    """

    def __init__(self, data: StreamData, context: int, seed: int) -> None:
        self._repeated, self._once = Documents(data.repeated), Documents(data.once)
        self._context, self._seed, self._passes = context, seed, data.passes
        self._repeated_tokens = int(self._repeated.lengths.sum())
        self._once_order = np.random.default_rng([seed, _ONCE_ORDER]).permutation(len(self._once))
        self._cuts = np.linspace(0, len(self._once), data.passes + 1).astype(np.int64)
        read = np.concatenate([[0], np.cumsum(self._once.lengths[self._once_order])])[self._cuts]
        # First token of each pass, and of the first pass after them.
        self._pass_starts = read + self._repeated_tokens * np.arange(data.passes + 1)
        if not self._pass_starts[-1]:
            raise ValueError(f"no tokens to train on in {[str(s.directory) for s in [*data.repeated, *data.once]]}")
        # Two passes: a row may span the end of one and the start of the next.
        self._pass = lru_cache(maxsize=2)(self._make_pass)

    @property
    def total_rows(self) -> int | None:
        """Rows until the data ends; None with repeated documents, which never end."""
        return None if self._repeated_tokens else int(self._pass_starts[-1]) // self._context

    def pass_documents(self, number: int) -> np.ndarray:
        """Documents in reading order of pass `number`: repeated ones by index, once ones numbered after them."""
        # Slicing past the last cut gives none: further passes read the repeated documents alone.
        first, last = self._cuts[min(number, self._passes)], self._cuts[min(number + 1, self._passes)]
        once = self._once_order[first:last] + len(self._repeated)
        documents = np.concatenate([np.arange(len(self._repeated)), once])
        return np.random.default_rng([self._seed, _PASS_ORDER, number]).permutation(documents)

    def reading(self, tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """What the stream's first `tokens` tokens are, pass by pass, in reading order.

        Per pass: the documents begun, the place in the stream of each one's first token, and the tokens read of each
        (all of them, but of the last document). Three arrays (documents,).
        """
        lengths = np.concatenate([self._repeated.lengths, self._once.lengths])
        number = read = 0
        while read < tokens and len(documents := self.pass_documents(number)):
            ends = read + np.cumsum(lengths[documents])
            begun = slice(int(np.searchsorted(ends, tokens)) + 1)
            starts = (ends - lengths[documents])[begun]
            yield documents[begun], starts, np.minimum(ends[begun], tokens) - starts
            number, read = number + 1, int(ends[-1])

    def rows(self, start: int, stop: int) -> Rows:
        """Rows start:stop of the stream; ValueError past the end of data that has one."""
        first, last = start * self._context, stop * self._context + 1
        ids = np.zeros(last - first, np.int64)
        begins = np.zeros(last - first, bool)
        filled = first
        while filled < last:
            try:
                pass_start, documents, ends = self._locate(filled)
            except IndexError:
                if filled < last - 1:
                    raise ValueError(f"the data ends after {filled} tokens, before row {stop}") from None
                begins[-1] = True  # Nothing follows the stream's last token.
                break
            within = filled - pass_start
            at = int(np.searchsorted(ends, within, side="right"))
            while filled < last and at < len(documents):
                document_start = int(ends[at - 1]) if at else 0
                begin = filled - pass_start - document_start
                stop_at = min(int(ends[at]) - document_start, begin + last - filled)
                source, document = self._owner(int(documents[at]))
                ids[filled - first : filled - first + stop_at - begin] = source.read(document, begin, stop_at)
                if begin == 0 and stop_at > begin:
                    begins[filled - first] = True
                filled += stop_at - begin
                at += 1
        shape = (stop - start, self._context)
        labels = np.where(begins[1:], IGNORED, ids[1:]).reshape(shape)
        return Rows(ids[:-1].reshape(shape), _positions(begins[:-1].reshape(shape)), labels)

    def digest(self, vocab_size: int) -> str:
        """SHA-256 of the documents read and how they are mixed."""
        parts = f"stream {self._passes} {self._repeated.digest(vocab_size)} {self._once.digest(vocab_size)}"
        return hashlib.sha256(parts.encode()).hexdigest()

    def _owner(self, document: int) -> tuple[Documents, int]:
        once = document - len(self._repeated)
        return (self._repeated, document) if once < 0 else (self._once, once)

    def _locate(self, token: int) -> tuple[int, np.ndarray, np.ndarray]:
        """First token of the pass that holds `token`, its documents in order, and where each ends in the pass."""
        if token < self._pass_starts[-1]:
            number = int(np.searchsorted(self._pass_starts, token, side="right")) - 1
            start = int(self._pass_starts[number])
        elif self._repeated_tokens:
            further = (token - int(self._pass_starts[-1])) // self._repeated_tokens
            number, start = self._passes + further, int(self._pass_starts[-1]) + further * self._repeated_tokens
        else:
            raise IndexError(token)
        return start, *self._pass(number)

    def _make_pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        documents = self.pass_documents(number)
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
        """Rows of all epochs."""
        return int(self._row_starts[-1])

    def epoch_examples(self, number: int) -> np.ndarray:
        """Examples in reading order of epoch `number`."""
        order = np.random.default_rng([self._seed, _PASS_ORDER, number]).permutation(len(self._documents))
        return order[: self._counts[number]]

    def reads(self, example: int) -> int:
        """Times that `example` is read in all epochs."""
        return sum(example in self.epoch_examples(number) for number in range(len(self._counts)))

    def rows(self, start: int, stop: int) -> Rows:
        """Rows start:stop; rows past the end are padding without loss."""
        shape = (stop - start, self._context)
        ids = np.full(shape, self._pad, np.int64)
        positions = np.broadcast_to(np.arange(self._context), shape).copy()
        labels = np.full(shape, IGNORED, np.int64)
        prompts = self._documents.prompt_tokens
        assert prompts is not None
        for row in range(start, min(stop, self.total_rows)):
            epoch = int(np.searchsorted(self._row_starts, row, side="right")) - 1
            order, cuts = self._epoch(epoch)
            within, at = row - int(self._row_starts[epoch]), 0
            for document in order[cuts[within] : cuts[within + 1]]:
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

    def digest(self, vocab_size: int) -> str:
        """SHA-256 of the examples and how much of them is read."""
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


def heldout_rows(sources: list[Source], context: int, max_tokens: int) -> Rows:
    """The first documents of `sources` as rows, at most `max_tokens` tokens and at least one row.

    Documents follow one another across rows, as in pretraining. Examples (documents with `prompt_tokens`) stay whole in
    a row where they fit, and only what follows the prompt is a label: the loss is that of d2 given d1.
    """
    documents = Documents(sources)
    prompts = documents.prompt_tokens
    ids: list[np.ndarray] = []
    targets: list[np.ndarray] = []  # whether a token is a label for the one before it
    total = 0
    for document in range(len(documents)):
        length = int(documents.lengths[document])
        if not length:
            continue
        used = total % context
        # A row of n tokens gives n - 1 labels; the last token of a row is the first label of the next.
        if prompts is not None and used and used + length > context and length <= context:
            ids.append(np.full(context - used, -1, np.int64))
            targets.append(np.zeros(context - used, bool))
            total += context - used
        ids.append(documents.read(document, 0, length).astype(np.int64))
        targets.append(np.arange(length) >= (1 if prompts is None else max(1, int(prompts[document]))))
        total += length
        if total > max_tokens:
            break
    if not ids:
        raise ValueError(f"no held-out tokens in {[str(source.directory) for source in sources]}")
    begins = np.concatenate([np.arange(len(part)) == 0 for part in ids])[: max_tokens + 1]
    flat, target = np.concatenate(ids)[: max_tokens + 1], np.concatenate(targets)[: max_tokens + 1]
    count = -(-(len(flat) - 1) // context)
    labels = np.full(count * context, IGNORED, np.int64)
    labels[: len(flat) - 1] = np.where(target[1:], flat[1:], IGNORED)
    inputs, starts = np.zeros(count * context, np.int64), np.ones(count * context, bool)
    inputs[: len(flat) - 1], starts[: len(flat) - 1] = np.maximum(flat[:-1], 0), begins[:-1]
    shape = (count, context)
    return Rows(inputs.reshape(shape), _positions(starts.reshape(shape)), labels.reshape(shape))


def _positions(begins: np.ndarray) -> np.ndarray:
    """Position within the document of each token of rows (rows, context), from where documents begin."""
    columns = np.broadcast_to(np.arange(begins.shape[1]), begins.shape)
    return columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)


def _selected(arrays: TokenArrays, source: Source) -> np.ndarray:
    if source.split is None:
        return np.arange(len(arrays.documents))
    if "split" not in arrays.documents.columns:
        raise ValueError(f"{source.directory}/documents.parquet has no split column to find {source.split!r} in")
    chosen = arrays.documents.select(pl.arg_where(pl.col("split") == source.split))
    return chosen.to_series().to_numpy().astype(np.int64)


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(np.concatenate(parts)) if parts else np.zeros(0, np.int64)
