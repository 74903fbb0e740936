"""FAISS indexes over 8-bit scalar-quantised vectors: the key side of the neighbour search (paper section 2.1)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import polars as pl

from sbp_assets.storage.artifacts import named_when_full
from sbp_assets.storage.columns import Column
from sbp_assets.storage.paths import read_table

INDEX_FILE = "index.faiss"
IDS_FILE = "ids.parquet"

INDEX_COLUMNS = [
    Column("id", pl.String, f"Document of D; of {IDS_FILE}.", "pairing/embeddings"),
    Column("vector", "array[uint8]", f"Of {INDEX_FILE}: its embedding, one byte per component.", "pairing/embeddings"),
]

# FAISS's own guidance: about 4 √n cells, and at least 39 training vectors for each.
_CELLS_PER_ROOT = 4
_VECTORS_PER_CELL = 39


@dataclass(frozen=True)
class KeyShard:
    """The index of one shard and the document id of each of its rows."""

    index: faiss.Index
    ids: pl.Series

    @classmethod
    def load(cls, directory: Path, nprobe: int) -> KeyShard:
        """Read an index directory; raises ValueError where ids and index do not belong together."""
        index = faiss.read_index(str(directory / INDEX_FILE))
        ids = read_table(directory / IDS_FILE)["id"]
        if index.ntotal != len(ids):
            raise ValueError(
                f"{directory}: {index.ntotal} vectors but {len(ids)} ids; re-materialise pairing/ann_index"
            )
        if isinstance(index, faiss.IndexIVF):
            index.nprobe = min(nprobe, index.nlist)
        return cls(index, ids)

    def searcher(self, queries: np.ndarray) -> Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
        """Return a function that looks for the k keys nearest to some of the `queries`, given their rows and k.

        It returns similarities and rows, (queries, k) each, and -1 for a row that is none. A query's result depends on
        all `queries`, whose distances to the cells of an ivf are computed at once, but not on what it is asked with.
        """
        if not isinstance(self.index, faiss.IndexIVF) or not len(queries):
            return lambda some, k: self.index.search(queries[some], k)
        index: Any = self.index
        distances, assigned = index.quantizer.search(queries, index.nprobe)
        return lambda some, k: index.search_preassigned(queries[some], k, assigned[some], distances[some])

    def without_excess(self, k: int) -> KeyShard:
        """Return the keys that can be among the k nearest others of a query; the index of this shard is used up.

        Equal keys are equally near to every query, and ties go to the smaller id. So of any number of them (a licence
        at the beginning of 10,000 documents) the k + 1 smallest ids decide, one of which may be the query itself.
        """
        rows, digests = self._digests()
        _, group, sizes = np.unique(digests, return_inverse=True, return_counts=True)
        large = sizes[group] > k + 1
        if not large.any():
            return self
        keys = pl.DataFrame({"row": rows[large], "group": group[large], "id": self.ids.gather(rows[large])})
        excess = keys.sort("id").filter(pl.int_range(pl.len()).over("group") > k)["row"].to_numpy()
        self.index.remove_ids(faiss.IDSelectorBatch(excess))
        if isinstance(self.index, faiss.IndexIVF):
            return self  # whose keys keep their numbers
        kept = np.ones(len(self.ids), dtype=bool)
        kept[excess] = False
        return KeyShard(self.index, self.ids.filter(pl.Series(kept)))

    def _digests(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the row of every key and a digest of what its nearness is made of: its codes and, in an ivf, its cell.

        Of 64 bits: among a million different keys the chance of any two being taken for equal is 3e-8.
        """
        index: Any = self.index
        if not isinstance(index, faiss.IndexIVF):
            codes = faiss.rev_swig_ptr(index.codes.data(), index.ntotal * index.code_size) if index.ntotal else b""
            return np.arange(index.ntotal), _digested(codes, index.code_size)
        lists: Any = index.invlists
        rows, digests = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
        for cell in range(index.nlist):
            if count := lists.list_size(cell):
                codes = faiss.rev_swig_ptr(lists.get_codes(cell), count * index.code_size)
                rows.append(faiss.rev_swig_ptr(lists.get_ids(cell), count).copy())
                digests.append(_digested(codes, index.code_size, cell))
        return np.concatenate(rows), np.concatenate(digests)


def _digested(rows: Any, size: int, key: int = 0) -> np.ndarray:
    """Return a digest (uint64) of each of the `rows`, of `size` bytes, under another function for each `key`."""
    data, salt = memoryview(rows).cast("B"), key.to_bytes(8, "little")
    each = (data[start : start + size] for start in range(0, len(data), size))
    digests = (hashlib.blake2b(row, digest_size=8, salt=salt).digest() for row in each)
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def cells(vectors: int) -> int:
    """Return the number of IVF cells (nlist) for n vectors: 4 √n, fewer where they could not be trained, at least 1."""
    return max(1, min(int(_CELLS_PER_ROOT * math.sqrt(vectors)), vectors // _VECTORS_PER_CELL))


def build_index(vectors: np.ndarray, kind: Literal["flat", "ivf"]) -> faiss.Index:
    """Return an inner-product index of `vectors`, (n, dim) float32, n ≥ 0, with one byte per component."""
    count, dim = vectors.shape
    metric, code = faiss.METRIC_INNER_PRODUCT, faiss.ScalarQuantizer.QT_8bit
    index: faiss.Index
    if kind == "flat":
        index = faiss.IndexScalarQuantizer(dim, code, metric)
    else:
        # More cells than different vectors would have equal centres, of which a query finds any.
        wanted = min(cells(count), _different(vectors, cells(count)))
        ivf = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(dim), dim, wanted, code, metric)
        ivf.cp.min_points_per_centroid = 1  # silences a warning about small shards
        index = ivf
    if count:
        index.train(vectors)
        index.add(vectors)
    return index


def _different(vectors: np.ndarray, enough: int) -> int:
    """Return how many different rows there are, at least 1; counting stops at `enough`."""
    seen = set()
    for row in vectors:
        seen.add(row.tobytes())
        if len(seen) >= enough:
            break
    return max(1, len(seen))


def write_index(directory: Path, index: faiss.Index, ids: pl.Series) -> None:
    """Write `index` and its row ids into the existing `directory`."""
    with named_when_full(directory / INDEX_FILE):
        faiss.write_index(index, str(directory / INDEX_FILE))
        pl.DataFrame({"id": ids}).write_parquet(directory / IDS_FILE)


def self_recall(index: faiss.Index, vectors: np.ndarray, sample: int, seed: int = 0) -> float:
    """Return the share of sampled `vectors` whose nearest key is itself or one as near; 1 for an empty index.

    Rows of `vectors` are the index's rows. Equal documents have equal codes, so nearness decides, not the row.
    """
    if not index.ntotal:
        return 1.0
    rows = np.sort(np.random.default_rng(seed).choice(len(vectors), min(sample, len(vectors)), replace=False))
    _, nearest = index.search(vectors[rows], 1)
    found = np.where(nearest[:, 0] < 0, rows[0], nearest[:, 0])
    # An inner product between unit vectors is 1 only for the vector itself; the slack is far below any real gap.
    itself = np.einsum("ij,ij->i", vectors[found], vectors[rows])
    return float(np.mean((nearest[:, 0] == rows) | ((nearest[:, 0] >= 0) & (itself > 1 - 1e-4))))
