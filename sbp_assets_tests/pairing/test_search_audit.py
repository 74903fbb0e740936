"""Every function of the search's audit reports the defect that it is there for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from sbp_assets.pairing.embed import embeddings_frame, vectors_of
from sbp_assets.pairing.index import CODES_FILE, KEYS_FILE, PROBES_FILE, VECTORS_FILE
from sbp_assets.pairing.search_audit import check_candidates, check_drift, check_index, check_partials, check_quantizer
from sbp_assets.settings import Deployment, Pairing
from sbp_assets_tests.pairing.searches import Search, Tables, find, fitted, indexed

OTHERS = Deployment().checked_shards


def test_drift(embeddings: Tables) -> None:
    quantizer = fitted(embeddings, Pairing())
    frames = {shard: table.lazy() for shard, table in embeddings.items()}
    assert check_drift(quantizer, frames)[0]
    others = {s: embeddings_frame(t["id"], -vectors_of(t)).lazy() for s, t in embeddings.items()}
    for changed in (others, {f"{shard}{copy}": frame for copy in range(4) for shard, frame in frames.items()}):
        passed, metadata = check_drift(quantizer, changed)
        assert not passed and "sbp run --refit" in str(metadata["advice"])


def test_quantizer(embeddings: Tables) -> None:
    frames = {shard: table.lazy() for shard, table in embeddings.items()}
    quantizer = fitted(embeddings, Pairing(index="ivf", centring=1))
    passed, metadata = check_quantizer(quantizer, frames, OTHERS)
    assert passed and metadata["sample"] == 40 and float(metadata["least_cosine"]) > 0.999
    others = {s: embeddings_frame(t["id"], np.roll(vectors_of(t), 7, axis=1)).lazy() for s, t in embeddings.items()}
    assert check_quantizer(quantizer, others, OTHERS)[1]["directions_lost"]
    assert not check_quantizer(quantizer, others, OTHERS)[0]


def test_index(store: Path, embeddings: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbp_assets.pairing.quantizer._VECTORS_PER_CELL", 2)
    quantizer = fitted(embeddings, Pairing(index="ivf", centring=1))
    paths = indexed(store, embeddings, quantizer)
    for shard, table in embeddings.items():
        assert check_index(paths[shard], table, quantizer, 4)[0]
    path, table = paths["00000"], embeddings["00000"]
    assert not check_index(path, embeddings["00001"], quantizer, 4)[1]["same_ids"]
    assert not check_index(path, table[1:], quantizer, 4)[1]["same_ids"]
    others = embeddings_frame(table["id"], -vectors_of(table))
    assert check_index(path, others, quantizer, 4)[1]["keys_of_other_vectors"] == len(table)
    for file in (CODES_FILE, VECTORS_FILE, PROBES_FILE):
        intact = (path / file).read_bytes()
        np.save(path / file, np.load(path / file)[::-1])
        assert check_index(path, table, quantizer, 4)[1]["keys_of_other_vectors"]
        (path / file).write_bytes(intact)
    assert not check_index(path, table, quantizer, 3)[0], "probes of another pairing.nprobe"
    keys = pl.read_parquet(path / KEYS_FILE)
    keys.reverse().write_parquet(path / KEYS_FILE)
    assert not check_index(path, table, quantizer, 4)[1]["in_order"]


def test_partials(store: Path, embeddings: Tables) -> None:
    search = Search.of(store, embeddings, neighbors=5, key_blocks=2)
    made, _ = search.block(1)

    def check(indexes: dict[str, Path] = search.indexes) -> tuple[bool, dict[str, int | float | str]]:
        return check_partials(made, indexes, "001", search.settings, OTHERS)

    passed, metadata = check()
    assert passed and metadata["shards_read"] == 3 and metadata["candidates_read"]
    assert check(search.indexes | {"00009": search.indexes["00000"]})[1] == {**check()[1], "tables_missing": 1} | {
        "of_other_keys": 1
    }
    file = made / "00000.parquet"
    good = pl.read_parquet(file)

    def fault(table: pl.DataFrame) -> dict[str, int | float | str]:
        table.write_parquet(file)
        passed, metadata = check()
        good.write_parquet(file)
        assert not passed
        return metadata

    assert fault(good.with_columns(neighbor_id="query_id"))["own_neighbors"] == len(good)
    assert fault(pl.concat([good] * 3))["documents_with_too_many"]
    assert fault(good.with_columns(pl.col("similarity").reverse()))["similarities_not_of_the_vectors"]
    assert fault(good.with_columns(neighbor_id=pl.lit("x")))["similarities_not_of_the_vectors"]
    file.unlink()
    assert check()[1]["tables_missing"] == 1


def test_candidates(store: Path, embeddings: Tables) -> None:
    queries, k = embeddings["00000"], 5
    quantizer = fitted(embeddings, Pairing(centring=0))
    good = find(store, embeddings, quantizer, neighbors=k, centring=0)["00000"]
    frames = {shard: table.lazy() for shard, table in embeddings.items()}

    def fault(table: pl.DataFrame) -> dict[str, int | float | str]:
        passed, metadata = check_candidates(table, queries, frames, "00000", quantizer, k, OTHERS)
        assert not passed
        return metadata

    passed, metadata = check_candidates(good, queries, frames, "00000", quantizer, k, OTHERS)
    assert passed and metadata["recall_at_5"] >= 0.95, metadata
    row = pl.int_range(pl.len()) == 0
    assert fault(good[1:])["queries_with_wrong_ranks"] == 1
    assert fault(good.filter(pl.col("query_id") != queries["id"][0]))["queries_without_neighbors"] == 1
    assert fault(good.with_columns(rank=pl.when(row).then(2).otherwise("rank")))["queries_with_wrong_ranks"] == 1
    assert fault(good.with_columns(neighbor_id=pl.when(row).then("query_id").otherwise("neighbor_id")))["own_neighbors"]
    assert fault(good.with_columns(neighbor_id=pl.when(row).then(pl.lit("x")).otherwise("neighbor_id")))["unknown_ids"]
    assert fault(good.with_columns(similarity=pl.when(row).then(1.5).otherwise("similarity")))[
        "similarities_out_of_range"
    ]
    assert fault(good.with_columns(similarity=pl.col("similarity").reverse()))["similarities_rising_with_rank"]
    assert fault(good.with_columns(similarity=pl.col("similarity") - 0.1))["similarities_not_of_the_vectors"]
    half = len(good) // 2
    others = pl.concat([good[half:], good[:half]]).select("neighbor_id", "neighbor_shard")
    assert float(fault(pl.concat([good.drop(others.columns), others], how="horizontal"))["recall_at_5"]) < 0.1
