"""What all shards share of the neighbour search: fitted once on a sample of D and then pinned (paper section 2.1).

A scalar quantiser (one byte per component), the centres of the cells, and, where `pairing.centring` asks for it, what
is removed of every vector before. The sample is chosen by a hash of the documents' ids, so that codes, cells and pairs
depend neither on the number of shards nor on the order of anything. Documents that come later join the cells that are
there.

Cells are of unequal size, and asked for unequally often. So `pieces` cuts each cell by its share of the work, and packs
the pieces into blocks of about equal work (salted keys, as against hot keys in a shuffle).
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import polars as pl

from sbp_assets.pairing.embed import vectors_of
from sbp_assets.settings import Pairing
from sbp_assets.storage.artifacts import named_when_full
from sbp_assets.storage.columns import Column
from sbp_assets.storage.paths import read_table
from sbp_assets.storage.progress import Progress

INDEX_FILE, CENTRING_FILE, CELLS_FILE, FIT_FILE = "quantizer.faiss", "centring.npz", "cells.parquet", "fit.json"

QUANTIZER_COLUMNS = [
    Column("cell", pl.Int32, f"Number of a cell; of {CELLS_FILE}."),
    Column("keys", pl.Int64, "Documents of the sample in it.", "pairing/embeddings.vector"),
    Column(
        "queries",
        pl.Int64,
        "Documents of the sample that have it among their nearest cells.",
        "pairing/embeddings.vector",
    ),
]

# FAISS's own guidance: about 4 √n cells, and at least 39 training vectors for each.
_CELLS_PER_ROOT, _VECTORS_PER_CELL = 4, 39
# Documents of the sample per cell, and the least of a sample, from which the ranges of the bytes are taken.
_SAMPLED_PER_CELL, _LEAST_SAMPLE = 64, 20_000
# Nearest cells of a query for which the work of cells is measured, whatever `pairing.nprobe`: the fit is then the same.
_PROBED = 16
# A piece of a cell has at most this share of a block's fair share of the work: enough pieces to pack blocks evenly.
_PIECES_PER_BLOCK = 8

_FACTS = ("documents", "sampled", "centre_similarity")


def salt(ids: Iterable[str]) -> np.ndarray:
    """Return 64 bits (uint64) per id, as if drawn by chance but always the same."""
    digests = (hashlib.blake2b(name.encode(), digest_size=8, person=b"sbp-keys").digest() for name in ids)
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def cell_count(vectors: int) -> int:
    """Return the number of IVF cells (nlist) for n vectors: 4 √n, fewer where they could not be trained, at least 1."""
    return max(1, min(int(_CELLS_PER_ROOT * math.sqrt(vectors)), vectors // _VECTORS_PER_CELL))


@dataclass(frozen=True)
class Centring:
    """What is removed of a vector: the mean of the sample, then `components` (k, dim) of unit length."""

    mean: np.ndarray
    components: np.ndarray

    @classmethod
    def fit(cls, sample: np.ndarray, components: int) -> Centring:
        """Take the mean and the leading principal components ("all but the top", Mu and Viswanath 2018, section 3)."""
        mean = sample.mean(axis=0)
        _, vectors = np.linalg.eigh(np.cov(sample - mean, rowvar=False))
        return cls(mean, np.ascontiguousarray(vectors[:, ::-1][:, :components].T, dtype=np.float32))

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Return unit vectors (n, dim) without mean and components; of nothing else, 0."""
        # Row by row: the bits of a matrix product depend on the rows that are beside.
        left = vectors - self.mean
        for component in self.components:
            left -= (left * component).sum(axis=1, keepdims=True) * component
        norms = np.sqrt((left * left).sum(axis=1, keepdims=True))
        return np.divide(left, norms, out=np.zeros_like(left), where=norms > 1e-6)


@dataclass(frozen=True)
class Pieces:
    """The pieces of all cells, and the block of each: `first[cell]` is the number of the cell's first piece."""

    first: np.ndarray
    block: np.ndarray

    def blocks(self, cells: np.ndarray, salts: np.ndarray) -> np.ndarray:
        """Return the block of each document, given its cell and its salt."""
        sizes = np.diff(self.first)[cells].astype(np.uint64)
        return self.block[self.first[cells] + ((salts >> np.uint64(32)) * sizes >> np.uint64(32)).astype(np.int64)]


@dataclass(frozen=True)
class Quantizer:
    """The fitted quantisers: `index` is an IVF index without vectors, `keys` and `queries` (cells,) are the work."""

    index: faiss.IndexIVFScalarQuantizer
    centring: Centring | None
    keys: np.ndarray
    queries: np.ndarray
    # Of D when it was fitted: documents, those of the sample, and their mean cosine to the centre of the own cell.
    documents: int
    sampled: int
    centre_similarity: float

    @property
    def dimensions(self) -> int:
        return int(self.index.d)

    @property
    def cells(self) -> int:
        return int(self.index.nlist)

    def prepared(self, vectors: np.ndarray) -> np.ndarray:
        """Return `vectors`, (n, dim) float32 of unit length, as they are searched; raise ValueError for another dim."""
        if vectors.shape[1] != self.dimensions:
            raise ValueError(
                f"vectors of {vectors.shape[1]} dimensions for a quantizer of {self.dimensions}: materialise "
                "pairing/quantizer with the configuration refit: true (`sbp run --refit`), and what comes after it"
            )
        return self.centring(vectors) if self.centring else vectors

    def nearest_cells(self, vectors: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
        """Return similarities and numbers of the cells nearest to prepared vectors, both (n, min(cells, all))."""
        return _nearest_cells(self.index, vectors, cells)

    def codes(self, vectors: np.ndarray) -> np.ndarray:
        """Return prepared vectors as codes, (n, dim) uint8."""
        if not len(vectors):
            return np.zeros((0, int(self.index.code_size)), np.uint8)
        return self.index.sq.compute_codes(vectors)  # type: ignore[no-any-return]

    def decoded(self, codes: np.ndarray) -> np.ndarray:
        """Return the vectors that `codes`, (n, dim) uint8, stand for: (n, dim) float32."""
        if not len(codes):
            return np.zeros((0, self.dimensions), np.float32)
        return self.index.sq.decode(codes)  # type: ignore[no-any-return]

    def centres(self) -> np.ndarray:
        """Return the centres of the cells, (cells, dim) float32."""
        return self.index.quantizer.reconstruct_n(0, self.cells)  # type: ignore[no-any-return]

    def empty_index(self) -> faiss.IndexIVFScalarQuantizer:
        """Return an index of these cells and codes without vectors."""
        index: Any = faiss.clone_index(self.index)
        return index  # type: ignore[no-any-return]

    def pieces(self, blocks: int) -> Pieces:
        """Return how the cells are divided among `blocks`: hot ones into pieces, longest pieces first to the least."""
        work = (self.keys + 1.0) * (self.queries + 1.0)
        most = work.sum() / blocks / _PIECES_PER_BLOCK
        counts = np.maximum(1, np.ceil(work / most)).astype(np.int64) if blocks > 1 else np.ones(len(work), np.int64)
        of_piece = np.repeat(work / counts, counts)
        block = np.zeros(len(of_piece), np.int32)
        loads = [(0.0, number) for number in range(blocks)]
        for piece in np.argsort(-of_piece, kind="stable"):
            load, number = loads[0]
            block[piece] = number
            heapq.heapreplace(loads, (load + of_piece[piece], number))
        return Pieces(np.concatenate([[0], np.cumsum(counts)]), block)

    def drift(self, embeddings: Mapping[str, pl.LazyFrame], progress: Progress) -> dict[str, float]:
        """Return how D has changed since: `growth` of the documents and `lost_similarity` of a sample to its centres.

        The sample is drawn of `embeddings`, tables by shard, as that of a fit is.
        """
        total = _documents(embeddings)
        sample = self.prepared(_sample(embeddings, sample_size(self.cells), self.dimensions, progress))
        return {
            "growth": total / max(self.documents, 1),
            "lost_similarity": self.centre_similarity - _mean(self.nearest_cells(sample, 1)[0]),
        }

    def save(self, directory: Path, fitted_for: str) -> None:
        """Write the quantisers into the existing `directory`, and the version of the settings they were fitted for."""
        with named_when_full(directory / INDEX_FILE):
            faiss.write_index(self.index, str(directory / INDEX_FILE))
            if self.centring:
                np.savez(directory / CENTRING_FILE, mean=self.centring.mean, components=self.centring.components)
            cells = {"cell": np.arange(self.cells), "keys": self.keys, "queries": self.queries}
            schema = {"cell": pl.Int32, "keys": pl.Int64, "queries": pl.Int64}
            pl.DataFrame(cells, schema=schema).write_parquet(directory / CELLS_FILE)
            facts = {name: getattr(self, name) for name in _FACTS}
            (directory / FIT_FILE).write_text(json.dumps({"fitted_for": fitted_for, **facts}), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> Quantizer:
        """Read what `save` wrote."""
        index: Any = faiss.read_index(str(directory / INDEX_FILE))
        centring = None
        if (directory / CENTRING_FILE).exists():
            with np.load(directory / CENTRING_FILE, allow_pickle=False) as arrays:
                centring = Centring(arrays["mean"], arrays["components"])
        cells = read_table(directory / CELLS_FILE)
        facts = json.loads((directory / FIT_FILE).read_text(encoding="utf-8"))
        work = cells["keys"].to_numpy(), cells["queries"].to_numpy()
        return cls(index, centring, *work, *(facts[name] for name in _FACTS))


def may_stay(directory: Path, settings: str) -> bool:
    """Return whether `directory` holds quantisers for the settings of this version, fitted to a whole sample.

    Of fewer documents than a sample wants, ranges and cells are by chance and a fit takes a second: those do not stay.
    """
    file = directory / FIT_FILE
    if not file.exists():
        return False
    facts = json.loads(file.read_text(encoding="utf-8"))
    return bool(facts["fitted_for"] == settings and facts["sampled"] >= _LEAST_SAMPLE)


def fit(embeddings: Mapping[str, pl.LazyFrame], settings: Pairing, progress: Progress) -> Quantizer:
    """Return quantisers fitted to a sample of all `embeddings` (tables by shard).

    Reads one shard at a time, twice: its ids, then the vectors that are of the sample. Memory holds the sample, of 64
    documents a cell, and one shard; with centring the sample twice. Advances `progress` by shards. Raises ValueError
    where the vectors of two shards have other dimensions, which it names, for vectors that are not finite or have no
    direction, with their ids, and where centring leaves nothing.
    """
    dimensions = {shard: _dimensions(frame) for shard, frame in sorted(embeddings.items())}
    first, dim = next(iter(dimensions.items()))
    if other := next((shard for shard, size in dimensions.items() if size != dim), None):
        raise ValueError(
            f"vectors of shard {first} have {dim} dimensions, of shard {other} {dimensions[other]}: materialise "
            "pairing/embeddings of all shards with one model"
        )
    total = _documents(embeddings)
    cells = cell_count(total) if settings.index == "ivf" else 1
    sample = _sample(embeddings, sample_size(cells), dim, progress)
    if settings.centring and settings.centring >= min(dim, max(len(sample) - 1, 1)):
        raise ValueError(
            f"pairing.centring: without {settings.centring} components nothing is left of vectors of {dim} dimensions "
            f"of {len(sample)} documents; lower it"
        )
    centring = Centring.fit(sample, settings.centring) if settings.centring is not None and len(sample) > 1 else None
    prepared = centring(sample) if centring else sample
    index = _fitted(prepared, dim, min(cells, _different(prepared, cells)))
    similarity, near = _nearest_cells(index, prepared, _PROBED)
    keys = np.bincount(near[:, 0], minlength=index.nlist).astype(np.int64)
    queries = np.bincount(near.ravel(), minlength=index.nlist).astype(np.int64)
    return Quantizer(index, centring, keys, queries, total, len(sample), _mean(similarity[:, 0]))


def require_directions(ids: pl.Series, vectors: np.ndarray, shard: str) -> None:
    """Raise ValueError, which names ids, for vectors that are not finite or have no direction."""
    norms = (vectors * vectors).sum(axis=1)
    bad = ~np.isfinite(norms) | (norms == 0)
    if bad.any():
        named = ", ".join(ids.filter(pl.Series(bad)).head(5))
        raise ValueError(
            f"shard {shard}: {int(bad.sum())} vectors are not finite or zero ({named}); materialise pairing/embeddings "
            "of that shard again"
        )


def _documents(embeddings: Mapping[str, pl.LazyFrame]) -> int:
    return sum(frame.select(pl.len()).collect().item() for frame in embeddings.values())


def sample_size(cells: int) -> int:
    """Return the number of documents that quantisers of so many cells are fitted to."""
    return max(_LEAST_SAMPLE, _SAMPLED_PER_CELL * cells)


def _nearest_cells(index: faiss.IndexIVF, vectors: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    wanted = min(cells, int(index.nlist))
    if not len(vectors):
        return np.zeros((0, wanted), np.float32), np.zeros((0, wanted), np.int64)
    return index.quantizer.search(vectors, wanted)  # type: ignore[no-any-return]


def _mean(similarity: np.ndarray) -> float:
    return round(float(similarity.mean()), 6) if len(similarity) else 0.0


def _dimensions(frame: pl.LazyFrame) -> int:
    return int(frame.collect_schema()["vector"].shape[0])  # type: ignore[attr-defined]


def _sample(embeddings: Mapping[str, pl.LazyFrame], size: int, dim: int, progress: Progress) -> np.ndarray:
    """Return the vectors of the `size` documents with the least salt, in the order of their salts, which differ."""
    progress.total = 2 * len(embeddings)
    least = np.zeros(0, np.uint64)
    for frame in embeddings.values():
        least = np.union1d(least, salt(frame.select("id").collect()["id"]))[:size]
        progress.advance()
    sample = np.zeros((len(least), dim), np.float32)
    for shard, frame in sorted(embeddings.items()):
        rows = frame.collect()
        salts = salt(rows["id"])
        chosen = np.flatnonzero(np.isin(salts, least))
        if len(chosen):
            found = vectors_of(rows[chosen.tolist()])
            require_directions(rows["id"].gather(chosen), found, shard)
            sample[np.searchsorted(least, salts[chosen])] = found
        progress.advance()
    return sample


def _fitted(sample: np.ndarray, dim: int, cells: int) -> faiss.IndexIVFScalarQuantizer:
    if not len(sample):
        sample = np.eye(1, dim, dtype=np.float32)
    if cells > 1:
        kmeans = faiss.Kmeans(dim, cells, niter=10, seed=0, spherical=True, min_points_per_centroid=1)
        kmeans.train(sample)
        centres = kmeans.centroids
    else:
        centres = sample.mean(axis=0, keepdims=True)
    # Centres in 16 bits. The scalar quantiser's kernel compares pair by pair; the matrix product of IndexFlatIP gives a
    # query other bits, and at a tie another cell, with other queries beside it.
    coarse = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    coarse.add(np.ascontiguousarray(centres, dtype=np.float32))
    by_residual = False  # a vector's code is then the same in every cell
    index = faiss.IndexIVFScalarQuantizer(
        coarse, dim, cells, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT, by_residual
    )
    index.train(sample)
    return index


def _different(vectors: np.ndarray, enough: int) -> int:
    """Return how many different rows there are, at least 1; counting stops at `enough`."""
    seen = set()
    for row in vectors:
        seen.add(row.tobytes())
        if len(seen) >= enough:
            break
    return max(1, len(seen))
