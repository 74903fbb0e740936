"""Every function of the audit reports the defect that it is there for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from sbp_assets.pairing.audit import (
    check_edges,
    check_embeddings,
    check_origin,
    check_pairs,
    check_texts,
)
from sbp_assets.pairing.embed import Embedder, embeddings_frame, vectors_of
from sbp_assets.pairing.filter import COUNTS_FILE, EDGE_SCHEMA, EDGES_FILE, PAIR_SCHEMA, bucket_edges, shard_pairs
from sbp_assets.settings import Deployment, Pairing
from sbp_assets.storage.progress import Progress
from sbp_assets_tests.pairing.searches import find

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
    settings = Pairing(min_similarity=0.3, max_shared_shingles=1.0, both_directions=both_directions, neighbors=8)
    candidates, texts = find(store, embeddings, neighbors=8), {s: table.lazy() for s, table in documents.items()}
    pairs = pairs_of_shard(store, candidates, documents, settings)
    candidates = {shard: table.lazy() for shard, table in candidates.items()}
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


def pairs_of_shard(store: Path, candidates: Tables, documents: Tables, settings: Pairing) -> pl.DataFrame:
    files: dict[str, dict[str, Path]] = {}
    for name, tables in (("candidates", candidates), ("documents", documents)):
        files[name] = {shard: store / f"{name}-{shard}.parquet" for shard in tables}
        for shard, table in tables.items():
            table.write_parquet(files[name][shard])
    (edges := store / "bucket" / "edges").mkdir(parents=True)
    with Progress("test", "pairs") as progress:
        bucket_edges(files["candidates"], files["documents"], list(candidates), settings, edges, "64MB", progress)
    assert check_edges(edges, list(candidates), settings)[0]
    return shard_pairs({"000": edges}, "00000", settings)[0]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (("e", "0", "f", "1", 0.4, 0.0), "similarities_out_of_bounds"),
        (("e", "0", "f", "1", 0.97, 0.0), "similarities_out_of_bounds"),
        (("e", "0", "f", "1", 0.8, 0.5), "near_copies"),
        (("e", "0", "e", "1", 0.8, 0.0), "self_pairs"),
        (("a", "0", "b", "1", 0.8, 0.0), "repeated_pairs"),
        (("e", "0", "f", "0", 0.8, 0.0), "d2_of_other_shards"),
        (("e", "0", "b", "1", 0.8, 0.0), "d2_over_cap"),
        (("e", "0", "f", "1", 0.8, 0.0), "edges_not_accounted_for"),
    ],
)
def test_edges(store: Path, row: tuple[object, ...], fault: str) -> None:
    rows = [("a", "0", "b", "1", 0.8, 0.0), ("c", "1", "b", "1", 0.7, 0.1)]
    counts = {"d1_shard": ["0", "1"], "candidates": [2, 1], "reversed": [0, 1], "too_dissimilar": [1, 0]}
    counts |= {"too_similar": [0, 0], "near_copies": [0, 0], "over_d2_cap": [0, 1]}
    pl.DataFrame(counts).write_parquet(store / COUNTS_FILE)

    def check(rows: list[tuple[object, ...]]) -> tuple[bool, dict[str, int | float | str]]:
        pl.DataFrame(rows, schema=EDGE_SCHEMA, orient="row").write_parquet(store / EDGES_FILE)
        return check_edges(store, ["1", "3"], PAIRING)

    assert check(list(rows))[0]
    passed, metadata = check([*rows, row])
    assert not passed and metadata[fault]
