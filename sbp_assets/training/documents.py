"""Documents of token arrays on disk, as training reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import polars as pl

from sbp_assets.storage.paths import read_table, scan_table
from sbp_assets.storage.token_arrays import TokenArrays
from sbp_assets.training.mapped import MappedArrays, in_pieces
from sbp_assets.training.spec import Source

_HASH_CHUNK = 1 << 24
_OPEN = 128  # Directories mapped at a time: each takes two of the 1,024 descriptors that a process often has.


class Documents:
    """Documents of several sources under one numbering, their tokens left on disk.

    The index of where each lies, 8 bytes a document (12 with prompts), is the array `name` of `arrays`.
    """

    def __init__(self, sources: list[Source], arrays: MappedArrays | None = None, name: str = "documents") -> None:
        self._directories = [source.directory for source in sources]
        mapped = arrays or MappedArrays()
        with_prompts = bool(sources) and all("prompt_tokens" in _columns(source.directory) for source in sources)
        sizes = mapped.array(f"{name}.sizes", np.int64, lambda: (np.array([_size(source)]) for source in sources))
        self._first = np.concatenate([[0], np.cumsum(sizes)])
        index = mapped.array(name, np.int32, lambda: (_index(source, with_prompts) for source in sources))
        columns = index.reshape(-1, 3 if with_prompts else 2).T
        self._rows = columns[0]
        self.lengths = columns[1]
        """Tokens per document, (documents,) int32."""
        self.prompt_tokens = columns[2] if with_prompts else None
        """Leading tokens without loss, (documents,) int32, where every source has the column."""
        self._opened = lru_cache(maxsize=_OPEN)(_open)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def sizes(self) -> list[int]:
        """Return the number of documents of each source."""
        return np.diff(self._first).tolist()

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Return tokens start:stop of a document, (stop - start,), in the integer type of its array."""
        owner = int(np.searchsorted(self._first, document, side="right")) - 1
        tokens, offsets = self._opened(self._directories[owner])
        offset = int(offsets[self._rows[document]])
        return tokens[offset + start : offset + stop]

    def names(self, documents: np.ndarray) -> list[str]:
        """Return the ids of documents, in their order."""
        owners = np.searchsorted(self._first, documents, side="right") - 1
        names = np.empty(len(documents), dtype=object)
        for owner in np.unique(owners):
            own = owners == owner
            ids = read_table(self._directories[owner] / "documents.parquet", columns=["id"])["id"]
            names[own] = ids.gather(self._rows[documents[own]]).cast(pl.String).to_list()
        return names.tolist()

    def digest(self, vocab_size: int) -> str:
        """Return the SHA-256 of arrays and selection, in hex; raise ValueError for a token outside the vocabulary."""
        digest = hashlib.sha256()
        for directory, first, stop in zip(self._directories, self._first[:-1], self._first[1:], strict=True):
            tokens, offsets = _open(directory)
            digest.update(f"{tokens.dtype}{len(tokens)}".encode())
            for start in range(0, len(tokens), _HASH_CHUNK):
                chunk = np.ascontiguousarray(tokens[start : start + _HASH_CHUNK])
                if (largest := int(chunk.max())) >= vocab_size:
                    raise ValueError(
                        f"token id {largest} in the data is outside the tokenizer's vocabulary of {vocab_size}: "
                        "the tokens are another tokenizer's; re-materialise them"
                    )
                digest.update(chunk.data)
            digest.update(np.ascontiguousarray(offsets).data)
            for numbers in _as_int64(self._rows, int(first), int(stop)):
                digest.update(numbers.data)
        if self.prompt_tokens is not None:
            for numbers in _as_int64(self.prompt_tokens, 0, len(self)):
                digest.update(numbers.data)
        return digest.hexdigest()


def _open(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens and the offsets of a directory that `TokenArrays.load` has taken, both mapped."""
    tokens, offsets = (np.load(directory / f"{name}.npy", "r", allow_pickle=False) for name in ("tokens", "offsets"))
    return tokens, offsets


def _as_int64(numbers: np.ndarray, start: int, stop: int) -> Iterator[np.ndarray]:
    for first, last in in_pieces(start, stop):
        yield numbers[first:last].astype(np.int64)


def _columns(directory: Path) -> list[str]:
    """Return the columns that say which documents are read, and how; any other one where there are none."""
    columns = scan_table(directory / "documents.parquet").collect_schema().names()
    return [name for name in ("split", "prompt_tokens") if name in columns] or columns[:1]


def _size(source: Source) -> int:
    """Return the number of documents of a source; raise ValueError where it names a split that there is not."""
    documents = scan_table(source.directory / "documents.parquet")
    if source.split is not None:
        if "split" not in _columns(source.directory):
            raise ValueError(f"{source.directory}/documents.parquet has no split column to find {source.split!r} in")
        documents = documents.filter(pl.col("split") == source.split)
    return int(documents.select(pl.len()).collect().item())


def _index(source: Source, with_prompts: bool) -> np.ndarray:
    """Return row, tokens and, `with_prompts`, prompt tokens of each document of a source, (documents, 2 or 3)."""
    arrays = TokenArrays.load(source.directory, _columns(source.directory))
    rows = np.arange(len(arrays.documents))
    if source.split is not None:
        rows = np.flatnonzero((arrays.documents["split"] == source.split).to_numpy())
    prompts = [arrays.documents["prompt_tokens"].to_numpy()[rows]] if with_prompts else []
    return np.stack([rows, arrays.lengths[rows], *prompts], axis=1)
