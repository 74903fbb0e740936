"""Token arrays: a directory with tokens.npy, offsets.npy and documents.parquet, memory-mapped when read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from sbp_assets.storage.artifacts import named_when_full
from sbp_assets.storage.paths import read_table


@dataclass(frozen=True)
class TokenArrays:
    """Documents as one flat token array; document i is tokens[offsets[i]:offsets[i + 1]]."""

    tokens: np.ndarray  # (total tokens,), uint16 or uint32, memory-mapped
    offsets: np.ndarray  # (documents + 1,), int64
    documents: pl.DataFrame  # one row per document, in order; has `id`

    @classmethod
    def load(cls, directory: Path, columns: Sequence[str] | None = None) -> TokenArrays:
        """Return the arrays of `directory`, with `columns` of its documents alone where some are named.

        Raises ValueError when its three files do not belong together.
        """
        tokens, offsets = _mapped(directory)
        documents = read_table(directory / "documents.parquet", columns)
        _require_together(directory, len(documents), tokens, offsets)
        return cls(tokens, np.array(offsets), documents)

    @classmethod
    def batches(cls, directory: Path, size: int, columns: Sequence[str] | None = None) -> Iterator[TokenArrays]:
        """Yield the arrays of `directory` in order, `size` documents at a time: of more memory holds nothing.

        `tokens` are all of them each time, and `offsets` lead into them. Raises ValueError as `load` does.
        """
        tokens, offsets = _mapped(directory)
        with pq.ParquetFile(directory / "documents.parquet") as file:
            _require_together(directory, file.metadata.num_rows, tokens, offsets)
            first = 0
            for batch in file.iter_batches(size, columns=columns, use_threads=False):
                yield cls(tokens, np.array(offsets[first : first + len(batch) + 1]), pl.DataFrame(batch))
                first += len(batch)

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens per document, (documents,) int64."""
        return np.diff(self.offsets)


def _mapped(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        # allow_pickle stays False: an artifact store is not a place to run code from.
        tokens, offsets = (
            np.load(directory / name, mmap_mode="r", allow_pickle=False) for name in ("tokens.npy", "offsets.npy")
        )
    except ValueError as error:
        raise ValueError(f"{directory} does not hold token arrays ({error}); re-materialise it") from error
    return tokens, offsets


def _require_together(directory: Path, documents: int, tokens: np.ndarray, offsets: np.ndarray) -> None:
    if len(offsets) != documents + 1 or offsets[0] != 0 or offsets[-1] != len(tokens):
        raise ValueError(
            f"{directory}: {documents} documents, {len(offsets)} offsets ending at {offsets[-1]} and "
            f"{len(tokens)} tokens do not belong together; re-materialise it"
        )


def write_token_arrays(directory: Path, documents: pl.DataFrame, encoded: Iterable[np.ndarray], vocab_size: int) -> int:
    """Write arrays for `documents` (in order) from their token ids, one array each; return the number of tokens.

    Tokens are stored as uint16 where `vocab_size` allows it, else as uint32. Raises ValueError when the numbers of
    documents and arrays differ, and OSError when the disk is full.
    """
    directory.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    parts = [np.asarray(ids, dtype=dtype) for ids in encoded]
    if len(parts) != len(documents):
        raise ValueError(f"{len(parts)} token lists for {len(documents)} documents")
    offsets = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    with named_when_full(directory / "tokens.npy"):
        np.save(directory / "tokens.npy", np.concatenate(parts) if parts else np.zeros(0, dtype=dtype))
        np.save(directory / "offsets.npy", offsets)
        documents.write_parquet(directory / "documents.parquet")
    return int(offsets[-1])
