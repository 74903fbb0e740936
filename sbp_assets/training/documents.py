"""Documents of token arrays on disk, as training reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import polars as pl

from sbp_assets.storage.paths import scan_table
from sbp_assets.storage.token_arrays import TokenArrays
from sbp_assets.training.mapped import PIECE, MappedArrays, in_pieces
from sbp_assets.training.spec import Source

_HASH_CHUNK = 1 << 24
_OPEN = 256  # Token files mapped at a time: each takes one of the 1,024 descriptors that a process often has.


class Documents:
    """Documents of several sources under one numbering, their tokens left on disk.

    The index of where each lies, 12 bytes a document (16 with prompts), are the arrays `name`.… of `arrays`.
    """

    def __init__(self, sources: list[Source], arrays: MappedArrays | None = None, name: str = "documents") -> None:
        self._sources = sources
        mapped = arrays or MappedArrays()
        with_prompts = bool(sources) and all("prompt_tokens" in _columns(source.directory) for source in sources)
        sizes = mapped.array(f"{name}.sizes", np.int64, lambda: (np.array([_size(source)]) for source in sources))
        self._first = np.concatenate([[0], np.cumsum(sizes)])
        self._starts = mapped.array(
            f"{name}.starts",
            np.int64,
            lambda: (some.offsets[:-1][rows] for source in sources for _, rows, some in _selected(source)),
        )
        index = mapped.array(
            f"{name}.lengths",
            np.int32,
            lambda: (piece for source in sources for piece in _lengths(source, with_prompts)),
        )
        columns = index.reshape(-1, 2 if with_prompts else 1).T
        self.lengths = columns[0]
        """Tokens per document, (documents,) int32."""
        self.prompt_tokens = columns[1] if with_prompts else None
        """Leading tokens without loss, (documents,) int32, where every source has the column."""
        self._opened = lru_cache(maxsize=_OPEN)(_tokens)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def sizes(self) -> list[int]:
        """Return the number of documents of each source."""
        return np.diff(self._first).tolist()

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Return tokens start:stop of a document, (stop - start,), in the integer type of its array."""
        owner = int(np.searchsorted(self._first, document, side="right")) - 1
        first = int(self._starts[document])
        return self._opened(self._sources[owner].directory)[first + start : first + stop]

    def names(self, documents: np.ndarray) -> list[str]:
        """Return the ids of documents, in their order."""
        owners = np.searchsorted(self._first, documents, side="right") - 1
        names = np.empty(len(documents), dtype=object)
        for owner in np.unique(owners):
            own = owners == owner
            ids = _of_split(self._sources[owner]).select(pl.col("id").cast(pl.String)).collect()["id"]
            names[own] = ids.gather(documents[own] - self._first[owner]).to_list()
        return names.tolist()

    def digest(self, vocab_size: int) -> str:
        """Return the SHA-256 of arrays and selection, in hex; raise ValueError for a token outside the vocabulary."""
        digest = hashlib.sha256()
        for source in self._sources:
            tokens, offsets = (_mapped(source.directory / name) for name in ("tokens.npy", "offsets.npy"))
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
            for first, rows, _ in _selected(source):
                digest.update((first + rows).data)
        if self.prompt_tokens is not None:
            for first, last in in_pieces(0, len(self)):
                digest.update(self.prompt_tokens[first:last].astype(np.int64).data)
        return digest.hexdigest()


def _tokens(directory: Path) -> np.ndarray:
    """Return the tokens of a directory that `TokenArrays.batches` has read, mapped."""
    return _mapped(directory / "tokens.npy")


def _mapped(file: Path) -> np.ndarray:
    return np.load(file, "r", allow_pickle=False)  # type: ignore[no-any-return]


def _columns(directory: Path) -> list[str]:
    """Return the columns that say which documents are read, and how; any other one where there are none."""
    columns = scan_table(directory / "documents.parquet").collect_schema().names()
    return [name for name in ("split", "prompt_tokens") if name in columns] or columns[:1]


def _size(source: Source) -> int:
    """Return the number of documents of a source; raise ValueError where it names a split that there is not."""
    if source.split is not None and "split" not in _columns(source.directory):
        raise ValueError(f"{source.directory}/documents.parquet has no split column to find {source.split!r} in")
    return int(_of_split(source).select(pl.len()).collect().item())


def _of_split(source: Source) -> pl.LazyFrame:
    """Return the rows of the documents of a source, in their order."""
    documents = scan_table(source.directory / "documents.parquet")
    return documents if source.split is None else documents.filter(pl.col("split") == source.split)


def _selected(source: Source) -> Iterator[tuple[int, np.ndarray, TokenArrays]]:
    """Yield the documents of a source's directory in pieces: the place of the first, the rows chosen, and the piece."""
    first = 0
    for some in TokenArrays.batches(source.directory, PIECE, _columns(source.directory)):
        rows = np.arange(len(some.documents))
        if source.split is not None:
            rows = np.flatnonzero((some.documents["split"] == source.split).to_numpy())
        yield first, rows, some
        first += len(some.documents)


def _lengths(source: Source, with_prompts: bool) -> Iterator[np.ndarray]:
    """Yield tokens and, `with_prompts`, prompt tokens of each document of a source, (documents, 1 or 2)."""
    for _, rows, some in _selected(source):
        prompts = [some.documents["prompt_tokens"].to_numpy()[rows]] if with_prompts else []
        yield np.stack([some.lengths[rows], *prompts], axis=1)
