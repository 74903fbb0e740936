"""Searches over the blocks of a few shards, as the assets do them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from sbp_assets.fan_out import PublishedFiles
from sbp_assets.pairing.embed import embeddings_frame, vectors_of
from sbp_assets.pairing.index import index_digest, write_index
from sbp_assets.pairing.quantizer import Quantizer, fit
from sbp_assets.pairing.search import (
    COVERAGE_FILE,
    BlockSearch,
    Coverage,
    assemble,
    merge,
    partial_tables,
    search_fingerprint,
)
from sbp_assets.settings import Pairing
from sbp_assets.storage.progress import Progress

Tables = dict[str, pl.DataFrame]


def unit(count: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def sharded(ids: list[str], vectors: np.ndarray, owners: list[int], shards: int) -> Tables:
    """Return the embeddings of each of so many shards, some of them perhaps without documents."""
    places = {f"{s:05d}": [row for row, owner in enumerate(owners) if owner == s] for s in range(shards)}
    return {
        shard: embeddings_frame(pl.Series([ids[row] for row in rows], dtype=pl.String), vectors[rows])
        for shard, rows in places.items()
    }


def fitted(tables: Tables, settings: Pairing) -> Quantizer:
    with Progress("fit", "shards") as progress:
        return fit({shard: table.lazy() for shard, table in tables.items()}, settings, progress)


def indexed(store: Path, tables: Tables, quantizer: Quantizer, nprobe: int = 4) -> dict[str, Path]:
    paths = {shard: store / f"index-{shard}" for shard in tables}
    for shard, path in paths.items():
        path.mkdir(parents=True)
        write_index(path, shard, tables[shard]["id"], vectors_of(tables[shard]), quantizer, nprobe)
    return paths


@dataclass
class Search:
    """A search of `tables` by blocks, whose artifacts lie in `store`."""

    store: Path
    tables: Tables
    settings: Pairing
    quantizer: Quantizer
    indexes: dict[str, Path]

    @classmethod
    def of(cls, store: Path, tables: Tables, quantizer: Quantizer | None = None, **settings: object) -> Search:
        pairing = Pairing(**settings)  # type: ignore[arg-type]
        quantizer = quantizer or fitted(tables, pairing)
        return cls(store, tables, pairing, quantizer, indexed(store, tables, quantizer, pairing.nprobe))

    def coverage(self) -> Coverage:
        versions = {shard: index_digest(path) for shard, path in self.indexes.items()}
        return Coverage(search_fingerprint("1", "quantizer", self.settings), versions, versions)

    def block(
        self,
        block: int,
        earlier: Path | None = None,
        tables: PublishedFiles | None = None,
        memory: float | None = None,
    ) -> tuple[Path, dict[str, int]]:
        made, scratch = (Path(tempfile.mkdtemp(dir=self.store)) for _ in range(2))
        tables = tables or PublishedFiles(tempfile.mkdtemp(dir=self.store), str(self.store))
        with tables.publish(COVERAGE_FILE) as path:
            self.coverage().write(path)
        with Progress("search", "queries") as progress:
            search, made_of = BlockSearch(block, self.settings, memory), self.coverage()
            counts = search.run(self.quantizer, self.indexes, made_of, earlier, tables, scratch, progress)
        assert not list(scratch.iterdir())
        assemble(tables, made)
        return made, counts

    def blocks(self) -> dict[str, Path]:
        return {f"{block:05d}": self.block(block)[0] for block in range(self.settings.key_blocks)}

    def candidates(self) -> Tables:
        blocks, k = self.blocks(), self.settings.neighbors
        return {shard: merge(partial_tables(blocks, shard), t["id"], k) for shard, t in self.tables.items()}


def find(store: Path, tables: Tables, quantizer: Quantizer | None = None, **settings: object) -> Tables:
    """Return the candidates of each shard."""
    return Search.of(Path(tempfile.mkdtemp(dir=store)), tables, quantizer, **settings).candidates()
