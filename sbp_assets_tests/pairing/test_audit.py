"""Every function of the audit reports the defect that it is there for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from sbp_assets.pairing.audit import (
    check_candidates,
    check_embeddings,
    check_index,
    check_origin,
    check_pairs,
    check_texts,
)
from sbp_assets.pairing.embed import Embedder, embeddings_frame, vectors_of
from sbp_assets.pairing.filter import PAIR_SCHEMA, filter_pairs
from sbp_assets.settings import Deployment, Pairing
from sbp_assets.storage.progress import Progress
from sbp_assets_tests.pairing.test_search import find, write_shards

Tables = dict[str, pl.DataFrame]


def test_embeddings(embeddings: Tables) -> None:
    table = embeddings["00000"]
    assert check_embeddings(table, table["id"])[0]
    assert check_embeddings(table[:0], table["id"][:0])[0]
    vectors = vectors_of(table).copy()
    vectors[1] *= 1.01
    vectors[2, 0] = np.nan
    passed, metadata = check_embeddings(embeddings_frame(table["id"], vectors), table["id"])
    assert not passed and metadata["not_unit_length"] == 2 and table["id"][2] in str(metadata["offending_ids"])
    assert not check_embeddings(table[1:], table["id"])[0]
    assert not check_embeddings(table, table["id"][1:])[0]
    assert not check_embeddings(pl.concat([table, table[:1]]), table["id"])[0]


def test_vectors_of_other_texts(embeddings: Tables, documents: Tables, embedder: Embedder) -> None:
    engine, settings = embedder.load("all-MiniLM-L6-v2", "bfloat16", "cpu"), Pairing()
    table, texts = embeddings["00000"], documents["00000"].lazy()
    passed, metadata = check_texts(table, texts, engine, settings, 16)
    assert passed and float(metadata["least_cosine"]) > 0.999, metadata
    assert check_texts(table[:0], texts, engine, settings, 16)[0]
    passed, metadata = check_texts(table.with_columns(id=pl.col("id").reverse()), texts, engine, settings, 16)
    assert not passed and metadata["of_another_text"] == metadata["sample"] == 8


def test_index(store: Path, embeddings: Tables) -> None:
    paths = write_shards(store, embeddings)
    for shard, table in embeddings.items():
        assert check_index(paths[shard], table, 16)[0]
    assert not check_index(paths["00000"], embeddings["00001"], 16)[0]
    assert not check_index(paths["00000"], embeddings["00000"][1:], 16)[0]
    others = embeddings_frame(embeddings["00000"]["id"], -vectors_of(embeddings["00000"]))
    assert check_index(paths["00000"], others, 16)[1]["self_recall"] == 0


def test_candidates(store: Path, embeddings: Tables) -> None:
    queries, k = embeddings["00000"], 5
    good = find(queries, write_shards(store, embeddings), k)
    frames = {shard: table.lazy() for shard, table in embeddings.items()}

    def fault(table: pl.DataFrame) -> dict[str, int | float | str]:
        passed, metadata = check_candidates(table, queries, frames, "00000", k, OTHERS)
        assert not passed
        return metadata

    passed, metadata = check_candidates(good, queries, frames, "00000", k, OTHERS)
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
    far = find(embeddings_frame(queries["id"], -vectors_of(queries)), write_shards(store, embeddings), k)
    assert float(fault(far)["recall_at_5"]) < 0.1


OTHERS = Deployment().checked_shards
PAIRING = Pairing(min_similarity=0.5, max_similarity=0.95, max_pairs_per_document=2)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (("bread-00", "rivers-00", "00000", 0.4, 0.0), "similarities_out_of_bounds"),
        (("bread-00", "rivers-00", "00000", 0.97, 0.0), "similarities_out_of_bounds"),
        (("bread-00", "rivers-00", "00000", 0.8, 0.5), "near_copies"),
        (("bread-00", "bread-00", "00000", 0.8, 0.0), "self_pairs"),
        (("bread-02", "bread-01", "00001", 0.7, 0.0), "repeated_pairs"),
        (("bread-02", "bread-03", "00001", 0.7, 0.0), "d1_over_cap"),
        (("stars-00", "bread-01", "00001", 0.7, 0.0), "d2_over_cap"),
        (("bread-10", "rivers-00", "00000", 0.8, 0.0), "documents_not_in_d"),  # held out
        (("bread-01", "rivers-00", "00000", 0.8, 0.0), "documents_not_in_d"),  # d1 of another shard
    ],
)
def test_pairs(documents: Tables, row: tuple[object, ...], fault: str) -> None:
    good = pl.DataFrame(
        [
            ("bread-02", "bread-01", "00001", 0.8, 0.0),
            ("bread-02", "bread-04", "00000", 0.7, 0.1),
            ("chess-02", "bread-01", "00001", 0.6, 0.0),
        ],
        schema=PAIR_SCHEMA,
        orient="row",
    )
    frames = {shard: table.lazy() for shard, table in documents.items()}
    assert check_pairs(good, frames, "00000", PAIRING, OTHERS)[0]
    assert check_pairs(good[:0], frames, "00000", PAIRING, OTHERS)[0]
    passed, metadata = check_pairs(
        pl.concat([good, pl.DataFrame([row], schema=PAIR_SCHEMA, orient="row")]),
        frames,
        "00000",
        PAIRING,
        OTHERS,
    )
    assert not passed and metadata[fault]


@pytest.mark.parametrize("both_directions", [True, False])
def test_pairs_that_were_never_found(store: Path, documents: Tables, embeddings: Tables, both_directions: bool) -> None:
    settings = Pairing(min_similarity=0.3, max_shared_shingles=1.0, both_directions=both_directions)
    paths = write_shards(store, embeddings)
    candidates = {shard: find(table, paths, 8, shard).lazy() for shard, table in embeddings.items()}
    texts = {shard: table.lazy() for shard, table in documents.items()}
    with Progress("test", "pairs") as progress:
        pairs, _ = filter_pairs(candidates, texts, "00000", settings, progress)
    assert len(pairs)

    def fault(table: pl.DataFrame) -> dict[str, int | float | str]:
        passed, metadata = check_origin(table, candidates, texts, "00000", settings, OTHERS)
        assert passed == (not metadata["no_such_candidate"] and not metadata["other_shared_shingles"])
        return metadata

    assert fault(pairs) == {**fault(pairs), "no_such_candidate": 0, "other_shared_shingles": 0}
    assert not fault(pairs[:0])["sample"]
    other = pairs.select("d2", "d2_shard")[(np.arange(len(pairs)) + len(pairs) // 2) % len(pairs)]
    assert fault(pairs.with_columns(other))["no_such_candidate"]
    lower = fault(pairs.with_columns(similarity=pl.col("similarity") - 0.1))
    assert lower["no_such_candidate"] == lower["sample"] == 100
    assert fault(pairs.with_columns(shared_shingles=pl.lit(0.5)))["other_shared_shingles"] == 100
