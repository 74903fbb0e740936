"""FAISS indexes over 8-bit scalar-quantised vectors: the key side of the neighbour search (paper section 2.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import faiss
import numpy as np
import polars as pl

from sbp_assets.storage.artifacts import named_when_full
from sbp_assets.storage.columns import Column
from sbp_assets.storage.tables import read_table

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
        ivf = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(dim), dim, cells(count), code, metric)
        ivf.cp.min_points_per_centroid = 1  # silences a warning about small shards
        index = ivf
    if count:
        index.train(vectors)
        index.add(vectors)
    return index


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
