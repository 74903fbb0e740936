from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from sbp_assets.pairing.embed import vectors_of
from sbp_assets.pairing.index import CODES_FILE, KeyBlock, ShardIndex, index_digest
from sbp_assets.settings import Pairing
from sbp_assets_tests.pairing.searches import fitted, indexed, sharded, unit


def ids(count: int) -> list[str]:
    return [f"d{row:04d}" for row in np.random.default_rng(0).permutation(count)]


@pytest.mark.parametrize("count", [0, 1, 500])
def test_an_index_holds_each_document_in_the_order_of_cells(store: Path, count: int) -> None:
    tables = sharded(ids(count), unit(count), [0] * count, 1)
    quantizer = fitted(tables, Pairing(index="ivf"))
    index = ShardIndex.open(indexed(store, tables, quantizer)["00000"])
    assert index.keys.equals(index.keys.sort("cell", "salt", "id")) and len(index.keys) == count
    assert index.codes.shape == (count, 16) and index.codes.dtype == np.uint8
    by_id = dict(zip(tables["00000"]["id"], vectors_of(tables["00000"]), strict=True))
    assert all(np.array_equal(index.vectors[row], by_id[name]) for row, name in enumerate(index.keys["id"]))
    found = index.vectors_of(pl.Series(["d0000", "elsewhere"] if count else ["elsewhere"]))
    assert np.isnan(found[-1]).all() and (not count or np.array_equal(found[0], by_id["d0000"]))


def test_the_digest_tells_other_keys(store: Path) -> None:
    tables = sharded(ids(20), unit(20), [row % 2 for row in range(20)], 2)
    quantizer = fitted(tables, Pairing())
    one, again = indexed(store, tables, quantizer), indexed(store / "again", tables, quantizer)
    assert index_digest(one["00000"]) == index_digest(again["00000"]) != index_digest(one["00001"])


@pytest.mark.parametrize("blocks", [1, 3])
def test_blocks_hold_every_key_once(store: Path, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbp_assets.pairing.index._COPIED", 7)
    tables = sharded(ids(900), unit(900), [row % 4 for row in range(900)], 4)
    quantizer = fitted(tables, Pairing(index="ivf"))
    paths, pieces, seen = indexed(store, tables, quantizer), quantizer.pieces(blocks), list[str]()
    of = {name: (shard, row) for shard, table in tables.items() for row, name in enumerate(table["id"])}
    for block in range(blocks):
        (scratch := store / str(block)).mkdir()
        keys = KeyBlock.load(paths, quantizer, pieces, block, 20, scratch)
        assert keys.index.ntotal == len(keys.ids) == len(keys.vectors)
        seen.extend(keys.ids)
        for row, name in enumerate(keys.ids):
            shard, place = of[name]
            assert keys.shard_names[keys.shards[row]] == shard
            assert np.array_equal(keys.vectors[row], vectors_of(tables[shard])[place])
    assert sorted(seen) == sorted(of)


def test_of_many_equal_keys_few_are_held(store: Path) -> None:
    vectors = unit(3000)
    vectors[::2] = vectors[0]
    tables = sharded(ids(3000), vectors, [row % 2 for row in range(3000)], 2)
    quantizer = fitted(tables, Pairing(index="ivf"))
    keys = KeyBlock.load(indexed(store, tables, quantizer), quantizer, quantizer.pieces(1), 0, 5, store)
    assert keys.index.ntotal == 1500 + 6


def test_a_block_that_is_too_large_says_how_many_fit(store: Path) -> None:
    tables = sharded(ids(9000), unit(9000), [0] * 9000, 1)
    quantizer = fitted(tables, Pairing())
    paths, pieces = indexed(store, tables, quantizer), quantizer.pieces(2)
    with pytest.raises(
        ValueError, match=r"key block 0 of 2 .* deployment.memory_per_worker .*key_blocks to (\d+)"
    ) as e:
        KeyBlock.load(paths, quantizer, pieces, 0, 5, store, memory=400_000)
    wanted = int(str(e.value).split("key_blocks to ")[1].split()[0])
    pieces = quantizer.pieces(wanted)
    for block in range(wanted):
        KeyBlock.load(paths, quantizer, pieces, block, 5, store, memory=400_000)


def test_codes_of_another_index_are_refused(store: Path) -> None:
    tables = sharded(ids(6), unit(6), [0, 0, 0, 0, 1, 1], 2)
    paths = indexed(store, tables, fitted(tables, Pairing()))
    (paths["00000"] / CODES_FILE).write_bytes((paths["00001"] / CODES_FILE).read_bytes())
    with pytest.raises(ValueError, match=r"4 ids, but rows of {'codes.npy': 2}"):
        ShardIndex.open(paths["00000"])
