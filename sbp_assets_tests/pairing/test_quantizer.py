from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbp_assets.pairing.embed import embeddings_frame, vectors_of
from sbp_assets.pairing.quantizer import (
    Centring,
    Pieces,
    Quantizer,
    cell_count,
    fit,
    may_stay,
    require_directions,
    salt,
)
from sbp_assets.settings import Pairing
from sbp_assets.storage.progress import Progress
from sbp_assets_tests.pairing.searches import Tables, fitted, sharded, unit

IDS = [f"d{row:05d}" for row in range(3000)]


def of_shards(vectors: np.ndarray, shards: int) -> Tables:
    return sharded(IDS[: len(vectors)], vectors, [row % shards for row in range(len(vectors))], shards)


@pytest.mark.parametrize("kind", ["flat", "ivf"])
@pytest.mark.parametrize("centring", [None, 0, 2])
def test_a_fit_depends_on_the_documents_alone(tmp_path: Path, kind: str, centring: int | None) -> None:
    vectors, pairing = unit(3000), Pairing(index=kind, centring=centring)  # type: ignore[arg-type]
    one, many = (fitted(of_shards(vectors, shards), pairing) for shards in (1, 7))
    for name, quantizer in (("one", one), ("many", many)):
        (tmp_path / name).mkdir()
        quantizer.save(tmp_path / name, "v")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert ("centring.npz" in files) == (centring is not None)
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "many" / file).read_bytes(), file
    again = Quantizer.load(tmp_path / "many")
    prepared = one.prepared(vectors)
    assert np.array_equal(again.prepared(vectors), prepared)
    assert np.array_equal(again.codes(prepared), one.codes(prepared))
    assert again.cells == (1 if kind == "flat" else cell_count(3000)) and again.sampled == again.documents == 3000
    # Neither depends on what is beside.
    assert np.array_equal(one.nearest_cells(prepared[5:6], 8)[1][0], one.nearest_cells(prepared, 8)[1][5])
    assert np.array_equal(one.prepared(vectors[5:6])[0], prepared[5])


def test_a_sample_is_of_the_documents_with_the_least_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbp_assets.pairing.quantizer._LEAST_SAMPLE", 100)
    vectors = unit(3000)
    some = fitted(of_shards(vectors, 3), Pairing())
    least = np.argsort(salt(IDS))[:100]
    alone = fitted(sharded([IDS[row] for row in least], vectors[least], [0] * 100, 1), Pairing())
    assert some.sampled == 100 and some.documents == 3000
    assert np.array_equal(some.codes(vectors), alone.codes(vectors))


def test_a_pin_is_for_its_settings_and_of_a_whole_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not may_stay(tmp_path, "v")
    fitted(of_shards(unit(5), 1), Pairing()).save(tmp_path, "v")
    assert not may_stay(tmp_path, "v")
    monkeypatch.setattr("sbp_assets.pairing.quantizer._LEAST_SAMPLE", 5)
    assert may_stay(tmp_path, "v") and not may_stay(tmp_path, "w")


@pytest.mark.parametrize(("components", "documents"), [(16, 100), (20, 100), (9, 10), (1, 2), (1, 1)])
def test_centring_that_leaves_nothing_is_refused(components: int, documents: int) -> None:
    with pytest.raises(ValueError, match=f"pairing.centring: without {components} components"):
        fitted(of_shards(unit(documents), 1), Pairing(centring=components))


@pytest.mark.parametrize("kind", ["flat", "ivf"])
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_a_corpus_of_any_size_is_fitted(kind: str, count: int) -> None:
    pairing = Pairing(index=kind, centring=0)  # type: ignore[arg-type]
    quantizer = fitted(of_shards(unit(count), 2), pairing)
    assert quantizer.cells == 1
    assert quantizer.codes(quantizer.prepared(unit(3))).shape == (3, 16)


def test_cells_grow_with_the_corpus_and_can_be_trained() -> None:
    assert cell_count(0) == cell_count(1) == cell_count(40) == 1
    assert cell_count(1_000_000) == 4000
    assert all(cell_count(n) <= max(1, n // 39) for n in (10, 100, 1000, 10_000))


def test_equal_vectors_make_no_cells_of_equal_centres() -> None:
    pairing = Pairing(index="ivf")
    assert fitted(of_shards(np.repeat(unit(1), 2000, axis=0), 1), pairing).cells == 1
    mixed = np.concatenate([np.repeat(unit(1), 1000, axis=0), unit(1000)])
    assert fitted(of_shards(mixed, 1), pairing).cells == cell_count(2000)


def test_centring_removes_what_all_vectors_share() -> None:
    template = np.zeros(16, np.float32)
    template[0] = 3
    subjects = unit(400)
    vectors = (
        subjects + template + 2 * np.random.default_rng(1).normal(size=(400, 1)).astype(np.float32) * unit(1, seed=9)
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    centred = Centring.fit(vectors, 1)(vectors)
    assert np.allclose(np.linalg.norm(centred, axis=1), 1, atol=1e-5)
    assert np.abs((centred * unit(1, seed=9)).sum(axis=1)).mean() < 0.2
    assert np.abs((vectors @ vectors.T).mean()) > 0.3 and np.abs((centred @ centred.T).mean()) < 0.05
    alike = np.repeat(unit(1), 5, axis=0)
    assert not Centring.fit(alike, 1)(alike).any()


@given(
    keys=st.lists(st.integers(0, 1000), min_size=1, max_size=40),
    blocks=st.integers(1, 8),
    seed=st.integers(0, 3),
)
@settings(max_examples=50, deadline=None)
def test_every_key_is_in_one_block_and_blocks_are_even(keys: list[int], blocks: int, seed: int) -> None:
    counts = np.array(keys)
    quantizer = fitted(of_shards(unit(3), 1), Pairing())
    quantizer = Quantizer(quantizer.index, None, counts, counts, 0, 0, 0.0)
    pieces = quantizer.pieces(blocks)
    assert pieces.first[-1] == len(pieces.block) and set(pieces.block) <= set(range(blocks))
    work = (counts + 1.0) ** 2
    of_piece = np.repeat(work / np.diff(pieces.first), np.diff(pieces.first))
    loads = np.bincount(pieces.block, of_piece, minlength=blocks)
    # Longest first: the fullest block has at most one piece, an eighth of its share, above the others.
    assert loads.max() <= work.sum() / blocks * (1 + 1 / 8) + 1e-6
    cells = np.random.default_rng(seed).integers(0, len(keys), 2000)
    where = pieces.blocks(cells, salt(str(row) for row in range(2000)))
    assert set(where) <= set(range(blocks))


def test_a_hot_cell_is_dealt_evenly_to_its_pieces() -> None:
    pieces = Pieces(np.array([0, 1, 5]), np.array([0, 0, 1, 2, 3], dtype=np.int32))
    where = np.bincount(pieces.blocks(np.ones(8000, np.int64), salt(str(row) for row in range(8000))))
    assert where.min() > 1900 and where.max() < 2100


def test_growth_and_documents_of_another_kind_show() -> None:
    near = unit(400) * 0.3 + unit(1, seed=5)
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    tables = of_shards(near, 2)
    quantizer = fitted(tables, Pairing())

    def drift(tables: Tables) -> dict[str, float]:
        with Progress("drift", "shards") as progress:
            return quantizer.drift({shard: table.lazy() for shard, table in tables.items()}, progress)

    assert drift(tables) == {"growth": 1, "lost_similarity": 0}
    assert drift(of_shards(np.concatenate([near] * 5), 2))["growth"] == 5
    assert drift(of_shards(unit(400, seed=8), 2))["lost_similarity"] > 0.5


def test_vectors_that_cannot_be_searched_are_named() -> None:
    tables = of_shards(unit(4), 2) | {"00007": embeddings_frame(pl.Series(["x"]), unit(1, dim=8))}
    with pytest.raises(ValueError, match="shard 00000 have 16 dimensions, of shard 00007 8"):
        fitted(tables, Pairing())
    for value in (np.nan, np.inf, 0.0):
        vectors = unit(4)
        vectors[2] = value
        with (
            Progress("fit", "shards") as progress,
            pytest.raises(ValueError, match=r"shard 00000: 1 vectors .*d00002"),
        ):
            fit({s: t.lazy() for s, t in of_shards(vectors, 1).items()}, Pairing(), progress)
        with pytest.raises(ValueError, match="d00002"):
            require_directions(pl.Series(IDS[:4]), vectors, "00000")
    quantizer = fitted(of_shards(unit(4), 1), Pairing())
    with pytest.raises(ValueError, match=r"of 8 dimensions for a quantizer of 16.*--refit"):
        quantizer.prepared(vectors_of(tables["00007"]))
