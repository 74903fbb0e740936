from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from sbp_assets.pairing.index import KeyShard, build_index, cells, self_recall, write_index


def unit(count: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


@pytest.mark.parametrize("kind", ["flat", "ivf"])
@pytest.mark.parametrize("count", [0, 1, 2, 50, 3000])
def test_an_index_of_any_size_is_written_read_and_finds_its_own(store: Path, kind: str, count: int) -> None:
    vectors = unit(count)
    ids = pl.Series("id", [f"d{i}" for i in range(count)], dtype=pl.String)
    write_index(store, build_index(vectors, kind), ids)  # type: ignore[arg-type]
    key = KeyShard.load(store, nprobe=4)
    assert key.index.ntotal == count and key.ids.equals(ids)
    assert self_recall(key.index, vectors, 100) >= 0.99


def test_one_byte_is_kept_per_component() -> None:
    assert build_index(unit(10, 32), "flat").sa_code_size() == 32


def test_cells_grow_with_the_shard_and_can_be_trained() -> None:
    assert cells(0) == cells(1) == cells(40) == 1
    assert cells(1_000_000) == 4000
    assert all(cells(n) <= max(1, n // 39) for n in (10, 100, 1000, 10_000))


def test_equal_vectors_make_no_cells_of_equal_centres() -> None:
    index = build_index(np.repeat(unit(1), 2000, axis=0), "ivf")
    assert index.nlist == 1 and self_recall(index, np.repeat(unit(1), 2000, axis=0), 100) == 1
    assert build_index(np.concatenate([np.repeat(unit(1), 1000, axis=0), unit(1000)]), "ivf").nlist == cells(2000)


def test_self_recall_sees_keys_of_other_documents() -> None:
    assert self_recall(build_index(unit(50, seed=1), "flat"), unit(50, seed=2), 50) < 0.5


def test_ids_of_another_index_are_refused(store: Path) -> None:
    write_index(store, build_index(unit(3), "flat"), pl.Series("id", ["a", "b"]))
    with pytest.raises(ValueError, match="3 vectors but 2 ids"):
        KeyShard.load(store, nprobe=1)
