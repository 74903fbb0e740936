"""Packed rows: what a model is given in one step, and the held-out rows on which its loss is measured."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sbp_assets.training.documents import Documents
from sbp_assets.training.mapped import MappedArrays
from sbp_assets.training.spec import Source

IGNORED = -100  # torch.nn.functional.cross_entropy's default ignore_index


@dataclass(frozen=True)
class Rows:
    """A batch of packed rows; every array is (rows, context_length) int64, or (1, tokens) for a piece of one."""

    input_ids: np.ndarray
    position_ids: np.ndarray  # restart at 0 at each document, and at the start of a row
    labels: np.ndarray  # the next token, or IGNORED

    def part(self, start: int, stop: int) -> Rows:
        """Return rows start:stop of the batch."""
        return Rows(self.input_ids[start:stop], self.position_ids[start:stop], self.labels[start:stop])

    def padded(self, rows: int) -> Rows:
        """Return the batch with at least `rows` rows: the missing ones hold token 0 without loss."""
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

    def pieces(self, count: int) -> list[Rows]:
        """Return the documents in `count` pieces of about equally many tokens, (1, tokens) each, in their order.

        Pieces are cut where a document begins, or what a row has of it. Those without a label are left out, and so a
        piece may be empty.
        """
        positions, labels = self.position_ids.reshape(-1), self.labels.reshape(-1)
        starts = np.flatnonzero(positions == 0)
        kept = np.add.reduceat(labels != IGNORED, starts) > 0
        lengths = np.diff(starts, append=len(positions))
        tokens = np.repeat(kept, lengths)
        boundaries = np.concatenate([[0], np.cumsum(lengths[kept])])
        wanted = boundaries[-1] * np.arange(count + 1) / count
        after = np.searchsorted(boundaries, wanted)
        before = np.maximum(after - 1, 0)
        nearer = np.where(boundaries[after] - wanted <= wanted - boundaries[before], after, before)
        cuts = boundaries[nearer]
        parts = (array.reshape(-1)[tokens] for array in (self.input_ids, positions, labels))
        ids, positions, labels = parts
        return [
            Rows(ids[None, start:stop], positions[None, start:stop], labels[None, start:stop])
            for start, stop in itertools.pairwise(cuts)
        ]

    @property
    def supervised(self) -> int:
        """Return the number of positions that count in the loss."""
        return int((self.labels != IGNORED).sum())


def heldout_rows(sources: list[Source], context: int, max_tokens: int, scratch: Path | None = None) -> Rows:
    """Return the first documents of `sources` as rows, at most `max_tokens` tokens and at least one row.

    Documents follow one another across rows, as in pretraining. Examples (documents with `prompt_tokens`) stay whole in
    a row where they fit, and only what follows the prompt is a label: the loss is that of d2 given d1.

    Temporary files are in `scratch`. Raises ValueError where the sources hold no token.
    """
    documents = Documents(sources, MappedArrays(scratch=scratch))
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
    return Rows(inputs.reshape(shape), positions_within(starts.reshape(shape)), labels.reshape(shape))


def positions_within(begins: np.ndarray) -> np.ndarray:
    """Return each token's position within its document, (rows, context), from the places where documents begin."""
    columns = np.broadcast_to(np.arange(begins.shape[1]), begins.shape)
    return columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
