"""The documents of a shard as keys and queries of the neighbour search, and a block of keys out of all shards.

`write_index` keeps those of one corpus shard in the order of cells and salts, in which a block of keys is a few ranges.
Each has its 8-bit code, by which it is found, and the cells that are searched for it: of K blocks each would compute
these again. `KeyBlock.load` reads the keys of one block from every shard: what one task holds in memory.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import polars as pl

from sbp_assets.pairing.quantizer import Pieces, Quantizer, require_directions, salt
from sbp_assets.storage.artifacts import content_version, named_when_full
from sbp_assets.storage.columns import Column
from sbp_assets.storage.paths import read_table

KEYS_FILE, CODES_FILE, VECTORS_FILE, PROBES_FILE = "keys.parquet", "codes.npy", "vectors.npy", "probes.npy"
DIGEST_FILE = "digest.txt"

_CELLS = "pairing/embeddings.vector pairing/quantizer.cell"
INDEX_COLUMNS = [
    Column("id", pl.String, f"Document of D; of {KEYS_FILE}.", "pairing/embeddings"),
    Column("cell", pl.Int32, f"Cell that its vector is in; of {KEYS_FILE}.", _CELLS),
    Column("salt", pl.UInt64, f"Hash of the id, which says in which piece of its cell it is; of {KEYS_FILE}.",
           "pairing/embeddings.id"),
    Column("code", "array[uint8]", f"Of {CODES_FILE}: its vector, one byte per component.", _CELLS),
    Column("vector", "array[float32]", f"Of {VECTORS_FILE}: its vector as it is compared in full precision.", _CELLS),
    Column("probes", "array[int32]", f"Of {PROBES_FILE}: the cells that are searched for it, nearest first.", _CELLS),
]  # fmt: skip
_KEY_SCHEMA = {"id": pl.String, "cell": pl.Int32, "salt": pl.UInt64}

# Bytes of a key in memory beside its code: its number, about its id, and digests while equal keys are looked for.
BYTES_BESIDE = 8 + 48 + 96

# Keys of a shard that are copied into a block at a time: of all 31,000 of a shard their vectors took 48 MB.
_COPIED = 4096


def write_index(
    directory: Path, shard: str, ids: pl.Series, vectors: np.ndarray, quantizer: Quantizer, nprobe: int
) -> np.ndarray:
    """Write the documents of `shard` into the empty `directory`, whose files but DIGEST_FILE are of the same rows.

    vectors: (n, dim) float32 of unit length, of the documents `ids`. nprobe: cells that are searched for each. Returns
    the cell of each, (n,) int64. Raises ValueError for vectors without a direction, whose ids it names.
    """
    require_directions(ids, vectors, shard)
    prepared = quantizer.prepared(vectors)
    _, cells = quantizer.nearest_cells(prepared, nprobe)
    keys = pl.DataFrame({"id": ids, "cell": cells[:, 0], "salt": salt(ids)}, schema=_KEY_SCHEMA)
    order = keys.select(pl.arg_sort_by("cell", "salt", "id")).to_series().to_numpy()
    with named_when_full(directory / VECTORS_FILE):
        keys[order].write_parquet(directory / KEYS_FILE)
        np.save(directory / CODES_FILE, quantizer.codes(prepared)[order])
        np.save(directory / VECTORS_FILE, prepared[order])
        np.save(directory / PROBES_FILE, cells[order].astype(np.int32))
    (directory / DIGEST_FILE).write_text(content_version(directory), encoding="utf-8")
    return cells[:, 0]


def index_digest(directory: Path) -> str:
    """Return the digest of the keys in an index directory, which a search of thousands of shards asks for."""
    return (directory / DIGEST_FILE).read_text(encoding="utf-8")


@dataclass(frozen=True)
class ShardIndex:
    """The documents of one shard, `keys`, by row; what is beside them stays on disk until it is used.

    codes: (n, dim) uint8; vectors: (n, dim) float32; probes: (n, nprobe) int32.
    """

    keys: pl.DataFrame
    codes: np.ndarray
    vectors: np.ndarray
    probes: np.ndarray

    @classmethod
    def open(cls, directory: Path) -> ShardIndex:
        """Open an index directory; raise ValueError where its files do not belong together."""
        keys = read_table(directory / KEYS_FILE)
        arrays = {
            name: np.load(directory / name, mmap_mode="r", allow_pickle=False)
            for name in (CODES_FILE, VECTORS_FILE, PROBES_FILE)
        }
        if wrong := {name: len(array) for name, array in arrays.items() if len(array) != len(keys)}:
            raise ValueError(f"{directory}: {len(keys)} ids, but rows of {wrong}; re-materialise pairing/ann_index")
        return cls(keys, *arrays.values())

    def vectors_of(self, ids: pl.Series) -> np.ndarray:
        """Return the vectors of some documents, (ids, dim) float32; NaN of those that are not here."""
        rows = pl.DataFrame({"id": ids}).join(
            self.keys.select("id").with_row_index("row"), on="id", how="left", maintain_order="left"
        )["row"]
        found = np.full((len(ids), self.vectors.shape[1]), np.nan, np.float32)
        here = rows.is_not_null().to_numpy()
        found[here] = self.vectors[rows.drop_nulls().to_numpy()]
        return found


@dataclass(frozen=True)
class KeyBlock:
    """A block of keys: an IVF index whose numbers are rows of `ids`, `shards` and `vectors`."""

    index: faiss.IndexIVFScalarQuantizer
    ids: pl.Series
    shards: np.ndarray  # row -> place in `shard_names`
    shard_names: list[str]
    vectors: np.ndarray

    @classmethod
    def load(
        cls,
        indexes: Mapping[str, Path],
        quantizer: Quantizer,
        pieces: Pieces,
        block: int,
        k: int,
        scratch: Path,
        memory: float | None = None,
    ) -> KeyBlock:
        """Read the keys of `block` out of the index directories of all shards.

        Without those that cannot be among the k nearest others of any query. Memory holds one byte per component and
        the ids; vectors in full precision are put into a file in `scratch`. Raises ValueError where a block would take
        more than `memory` bytes.
        """
        names, rows, sizes = sorted(indexes), dict[str, np.ndarray](), np.zeros(quantizer.cells, np.int64)
        for name in names:
            keys = read_table(indexes[name] / KEYS_FILE, ["cell", "salt"])
            cells, salts = keys["cell"].to_numpy(), keys["salt"].to_numpy()
            rows[name] = np.flatnonzero(pieces.blocks(cells, salts) == block)
            sizes += np.bincount(cells[rows[name]], minlength=len(sizes))
        count = int(sizes.sum())
        size = count * (quantizer.dimensions + BYTES_BESIDE)
        if memory is not None and size > memory:
            blocks = int(pieces.block.max()) + 1
            raise ValueError(
                f"key block {block} of {blocks} takes {size / 1e6:,.1f} MB, more than deployment.memory_per_worker "
                f"({memory / 1e6:,.1f} MB): set pairing.key_blocks to {blocks_that_fit(size * blocks, memory)} or more"
            )
        index = quantizer.empty_index()
        filled = _reserve(index, sizes)
        ids, of_shard, first = [pl.Series(dtype=pl.String)], [np.zeros(0, np.int32)], 0
        vectors: np.ndarray = np.zeros((0, quantizer.dimensions), np.float32)
        if count:
            vectors = _on_disk(scratch / VECTORS_FILE, (count, quantizer.dimensions))
        for place, name in enumerate(names):
            if not len(rows[name]):
                continue
            shard = ShardIndex.open(indexes[name])
            chosen = shard.keys[rows[name]]
            for start in range(0, len(chosen), _COPIED):
                some, end = rows[name][start : start + _COPIED], min(start + _COPIED, len(chosen))
                numbers = np.arange(first + start, first + end)
                _add(index, filled, shard.codes[some], chosen["cell"][start:end].to_numpy(), numbers)
                vectors[numbers] = shard.vectors[some]
            ids.append(chosen["id"])
            of_shard.append(np.full(len(chosen), place, np.int32))
            first += len(chosen)
        found = cls(index, pl.concat(ids), np.concatenate(of_shard), names, vectors)
        found._remove_excess(k)
        return found

    def search(self, queries: np.ndarray, probes: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return similarities and rows of the k nearest keys in the cells `probes`, (n, k) each; -1: no such row.

        queries: (n, dim) prepared; probes: (n, cells), those that are searched for each query.
        """
        index: Any = self.index
        index.nprobe = probes.shape[1]
        # Codes are no residuals, so how near a cell's centre is does not matter.
        return index.search_preassigned(queries, k, probes.astype(np.int64), np.zeros(probes.shape, np.float32))  # type: ignore[no-any-return]

    def _remove_excess(self, k: int) -> None:
        """Remove the keys that cannot be among the k nearest others of a query.

        Equal codes are equally near to every query, and ties go to the smaller id. So of any number of them (a licence
        at the beginning of 10,000 documents) the k + 1 smallest ids decide, one of which may be the query itself.
        """
        rows, digests = self._digests()
        _, group, sizes = np.unique(digests, return_inverse=True, return_counts=True)
        large = sizes[group] > k + 1
        if not large.any():
            return
        keys = pl.DataFrame({"row": rows[large], "group": group[large], "id": self.ids.gather(rows[large])})
        excess = keys.sort("id").filter(pl.int_range(pl.len()).over("group") > k)["row"].to_numpy()
        self.index.remove_ids(faiss.IDSelectorBatch(excess))

    def _digests(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the row of every key and a digest of what its nearness is made of: its code and its cell.

        Of 64 bits: among a million different keys the chance of any two being taken for equal is 3e-8.
        """
        lists: Any = self.index.invlists
        rows, digests = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
        for cell in range(self.index.nlist):
            if count := lists.list_size(cell):
                codes = faiss.rev_swig_ptr(lists.get_codes(cell), count * self.index.code_size)
                rows.append(faiss.rev_swig_ptr(lists.get_ids(cell), count).copy())
                digests.append(_digested(codes, self.index.code_size, cell))
        return np.concatenate(rows), np.concatenate(digests)


def blocks_that_fit(size: float, memory: float) -> int:
    """Return how many blocks of so many bytes in all fit: a tenth more than of equal ones, for they are by chance."""
    return math.ceil(1.1 * size / memory)


def _on_disk(file: Path, shape: tuple[int, int]) -> np.ndarray:
    """Return an array of float32 in a new file, whose blocks exist: a full disk would else end the process."""
    file.unlink(missing_ok=True)
    with named_when_full(file), file.open("xb") as stream:
        os.posix_fallocate(stream.fileno(), 0, 4 * shape[0] * shape[1])
    return np.memmap(file, np.float32, "r+", shape=shape)


def _reserve(index: faiss.IndexIVFScalarQuantizer, sizes: np.ndarray) -> np.ndarray:
    """Give each list the size of its keys, (cells,), and return zeros: how much of each list is filled.

    A list that grows with each shard keeps room for as much again: 1.6 times the bytes of the codes, of 100 shards.
    """
    lists: Any = index.invlists
    for cell in np.flatnonzero(sizes):
        lists.resize(int(cell), int(sizes[cell]))
    return np.zeros_like(sizes)


def _add(
    index: faiss.IndexIVFScalarQuantizer, filled: np.ndarray, codes: np.ndarray, cells: np.ndarray, numbers: np.ndarray
) -> None:
    """Put codes (n, dim) of the keys `numbers` into the lists of `cells`, which are in rising order, after `filled`."""
    lists: Any = index.invlists
    starts = np.flatnonzero(np.diff(cells, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(cells)], strict=True):
        ids, rows = numbers[start:end], np.ascontiguousarray(codes[start:end])
        cell, count = int(cells[start]), int(end - start)
        lists.update_entries(cell, int(filled[cell]), count, faiss.swig_ptr(ids), faiss.swig_ptr(rows))
        filled[cell] += count
    index.ntotal += len(numbers)


def _digested(rows: Any, size: int, key: int) -> np.ndarray:
    """Return a digest (uint64) of each of the `rows`, of `size` bytes, under another function for each `key`."""
    data, person = memoryview(rows).cast("B"), key.to_bytes(8, "little")
    each = (data[start : start + size] for start in range(0, len(data), size))
    digests = (hashlib.blake2b(row, digest_size=8, salt=person).digest() for row in each)
    return np.frombuffer(b"".join(digests), dtype=np.uint64)
