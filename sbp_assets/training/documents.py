"""Documents of token arrays on disk, as training reads them."""

from __future__ import annotations

import hashlib

import numpy as np
import polars as pl

from sbp_assets.storage.token_arrays import TokenArrays
from sbp_assets.training.spec import Source

_HASH_CHUNK = 1 << 24


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
        """Return tokens start:stop of a document, (stop - start,), in the integer type of its array."""
        offset = self._starts[document]
        return self._arrays[self._owner[document]].tokens[offset + start : offset + stop]

    def name(self, document: int) -> str:
        """Return the id of a document."""
        owner = self._owner[document]
        row = self._selected[owner][document - np.searchsorted(self._owner, owner)]
        return str(self._arrays[owner].documents["id"][int(row)])

    def digest(self, vocab_size: int) -> str:
        """Return the SHA-256 of arrays and selection, in hex; raise ValueError for a token outside the vocabulary."""
        digest = hashlib.sha256()
        for arrays, selected in zip(self._arrays, self._selected, strict=True):
            digest.update(f"{arrays.tokens.dtype}{len(arrays.tokens)}".encode())
            for start in range(0, len(arrays.tokens), _HASH_CHUNK):
                chunk = np.ascontiguousarray(arrays.tokens[start : start + _HASH_CHUNK])
                if (largest := int(chunk.max())) >= vocab_size:
                    raise ValueError(
                        f"token id {largest} in the data is outside the tokenizer's vocabulary of {vocab_size}: "
                        "the tokens are another tokenizer's; re-materialise them"
                    )
                digest.update(chunk.data)
            digest.update(np.ascontiguousarray(arrays.offsets).data)
            digest.update(np.ascontiguousarray(selected).data)
        if self.prompt_tokens is not None:
            digest.update(self.prompt_tokens.data)
        return digest.hexdigest()


def _selected(arrays: TokenArrays, source: Source) -> np.ndarray:
    if source.split is None:
        return np.arange(len(arrays.documents))
    if "split" not in arrays.documents.columns:
        raise ValueError(f"{source.directory}/documents.parquet has no split column to find {source.split!r} in")
    chosen = arrays.documents.select(pl.arg_where(pl.col("split") == source.split))
    return chosen.to_series().to_numpy().astype(np.int64)


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(np.concatenate(parts)) if parts else np.zeros(0, np.int64)
