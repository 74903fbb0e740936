from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sbp_assets.fan_out import PublishedFiles
from sbp_assets.pairing.embed import embeddings_frame, vectors_of
from sbp_assets.pairing.index import KeyBlock, ShardIndex
from sbp_assets.pairing.search import (
    CANDIDATE_SCHEMA,
    COVERAGE_FILE,
    Coverage,
    exact_neighbors,
    merge,
    nearest,
    partial_tables,
    recall,
)
from sbp_assets.settings import Pairing
from sbp_assets_tests.pairing.searches import Search, Tables, find, fitted, indexed, sharded, unit

IDS = [f"d{row:04d}" for row in range(3000)]


def of_shards(vectors: np.ndarray, shards: int) -> Tables:
    return sharded(IDS[: len(vectors)], vectors, [row % shards for row in range(len(vectors))], shards)


def rows(candidates: Tables) -> pl.DataFrame:
    """Return the candidates of all shards without what the number of shards is seen in."""
    return pl.concat(candidates.values()).drop("neighbor_shard").sort("query_id", "rank")


def shards(counts: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if name not in ("keys", "queries")}


@pytest.fixture
def several_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells for a few documents; `nprobe` is more than they are."""
    monkeypatch.setattr("sbp_assets.pairing.quantizer._VECTORS_PER_CELL", 2)


@given(
    owners=st.lists(st.integers(0, 3), min_size=1, max_size=25),
    different=st.integers(1, 25),
    k=st.integers(1, 6),
    kind=st.sampled_from(["flat", "ivf"]),
    blocks=st.integers(1, 4),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_candidates_are_the_nearest_of_the_nearest_codes(
    store: Path, several_cells: None, owners: list[int], different: int, k: int, kind: str, blocks: int
) -> None:
    # Few different vectors: equal documents, hence ties, across and within shards and blocks.
    vectors = unit(different)[np.arange(len(owners)) % different]
    ids = IDS[: len(owners)]
    tables = sharded(ids, vectors, owners, 4)
    quantizer = fitted(tables, Pairing(index=kind))  # type: ignore[arg-type]
    found = pl.concat(find(store, tables, quantizer=quantizer, index=kind, neighbors=k, key_blocks=blocks).values())
    assert found.schema == CANDIDATE_SCHEMA
    codes = quantizer.index.sq.decode(quantizer.codes(vectors))
    for i, name in enumerate(ids):
        others = [j for j in range(len(ids)) if j != i]
        coded = sorted(others, key=lambda j: (-round(float(vectors[i] @ codes[j]), 4), ids[j]))[: 2 * k]
        expected = sorted(coded, key=lambda j: (-round(float(vectors[i] @ vectors[j]), 4), ids[j]))[:k]
        mine = found.filter(pl.col("query_id") == name)
        assert mine["rank"].to_list() == list(range(1, len(expected) + 1))
        exact = [float(vectors[i] @ vectors[j]) for j in expected]
        assert np.allclose(mine["similarity"].to_numpy(), exact, atol=1e-4)
        assert mine["neighbor_shard"].to_list() == [f"{owners[ids.index(n)]:05d}" for n in mine["neighbor_id"]]


@pytest.mark.parametrize("kind", ["flat", "ivf"])
@pytest.mark.parametrize("centring", [None, 2])
def test_candidates_are_the_same_for_any_number_of_shards_and_blocks(
    store: Path, kind: str, centring: int | None
) -> None:
    vectors = unit(1000)
    vectors[100:140] = vectors[100]
    how = {"index": kind, "centring": centring, "nprobe": 3, "neighbors": 5}
    one = rows(find(store, of_shards(vectors, 1), **how))
    for shards, blocks in ((4, 1), (1, 4), (16, 8)):
        assert rows(find(store, of_shards(vectors, shards), key_blocks=blocks, **how)).equals(one)


def test_ties_across_the_cut_go_to_the_smaller_id(store: Path) -> None:
    found = rows(find(store, of_shards(np.repeat(unit(1), 40, axis=0), 2), neighbors=3, key_blocks=2))
    assert found.filter(pl.col("query_id") == "d0020")["neighbor_id"].to_list() == ["d0000", "d0001", "d0002"]
    assert found.filter(pl.col("query_id") == "d0001")["neighbor_id"].to_list() == ["d0000", "d0002", "d0003"]


def test_pairs_are_rescored_alike_in_batches_of_any_size(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = of_shards(unit(40), 2)
    whole = rows(find(store, tables, neighbors=5))
    monkeypatch.setattr("sbp_assets.pairing.search._PAIRS", 7)  # 10 codes a query: the last batch is a shorter one.
    assert rows(find(store, tables, neighbors=5)).equals(whole)


def test_ties_of_a_query_cost_the_other_queries_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pairs of equal documents: at any cut some query of a block has one of each side.
    asked = list[int]()

    def counted(self: KeyBlock, queries: np.ndarray, probes: np.ndarray, k: int) -> object:
        asked.append(len(queries) * k)
        return search(self, queries, probes, k)

    search = KeyBlock.search
    monkeypatch.setattr(KeyBlock, "search", counted)
    find(store, of_shards(np.repeat(unit(1000), 2, axis=0), 1), neighbors=5)
    assert sum(asked) < 2000 * 12 * 4, "to the end it would be 2000 * 2000 in one call"


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_real_documents_find_their_subject(store: Path, embeddings: Tables, kind: str) -> None:
    everything = pl.concat(list(embeddings.values()))
    found = pl.concat(find(store, embeddings, index=kind, neighbors=5).values())
    same = found["query_id"].str.split("-").list.first() == found["neighbor_id"].str.split("-").list.first()
    assert same.mean() > 0.95
    assert not (found["query_id"] == found["neighbor_id"]).any()
    quantizer = fitted(embeddings, Pairing(index=kind))  # type: ignore[arg-type]
    frames = {shard: table.lazy() for shard, table in embeddings.items()}
    exact = exact_neighbors(everything["id"].to_list(), vectors_of(everything), frames, 5, quantizer)
    assert recall(found, exact, 5) >= 0.98
    assert recall(found.filter(pl.col("rank") > 2), exact, 5) < 0.7


def test_a_new_shard_is_searched_for_all_and_in_all_and_no_more(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, how = unit(600), {"index": "ivf", "neighbors": 5, "nprobe": 2, "key_blocks": 2}
    four = of_shards(vectors, 4)
    three = {shard: table for shard, table in four.items() if shard != "00003"}
    quantizer = fitted(three, Pairing(**how))  # type: ignore[arg-type]
    (store / "three").mkdir()
    old = Search.of(store / "three", three, quantizer, **how)
    grown = Search.of(store, four, quantizer, **how)
    earlier, whole = old.blocks(), grown.blocks()
    opened = list[str]()
    opening = ShardIndex.open
    monkeypatch.setattr(ShardIndex, "open", lambda path: (opened.append(path.name), opening(path))[1])
    for block in range(2):
        made, counts = grown.block(block, earlier[f"{block:05d}"])
        assert shards(counts) == {"resumed": 0, "unchanged": 0, "extended": 3, "searched": 1}
        for file in sorted(whole[f"{block:05d}"].iterdir()):
            assert (made / file.name).read_bytes() == file.read_bytes()
    # All keys for the new shard's queries, the new shard's keys for the others, and every shard's queries once.
    assert sorted(opened) == sorted(2 * (2 * [f"index-{shard}" for shard in four] + ["index-00003"]))


def test_what_other_keys_were_searched_for_is_not_used(store: Path) -> None:
    tables, how = of_shards(unit(60), 3), {"neighbors": 3}
    search = Search.of(store, tables, **how)
    made, counts = search.block(0)
    assert counts["searched"] == 3
    assert search.block(0, made)[1]["searched"] == 3, "the same again: somebody wants it made again"
    left = PublishedFiles(f"{store}/left", str(store))
    search.block(0, tables=left)
    assert search.block(0, made, tables=left)[1]["searched"] == 3, "with what it published, too"
    other = Coverage.of(made)
    for changed in (
        Coverage("another search", other.queries, other.keys),
        Coverage(other.search, other.queries, other.keys | {"00000": "another version"}),
        Coverage(other.search, other.queries, other.keys | {"00009": "of a shard that is gone"}),
    ):
        changed.write(made / COVERAGE_FILE)
        assert search.block(0, made)[1]["searched"] == 3
    Coverage(other.search, other.queries | {"00001": "another version"}, other.keys).write(made / COVERAGE_FILE)
    assert shards(search.block(0, made)[1]) == {"resumed": 0, "unchanged": 2, "extended": 0, "searched": 1}


def test_a_stopped_search_is_resumed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search, tables = Search.of(store, of_shards(unit(60), 3), neighbors=3), PublishedFiles(f"{store}/x", str(store))
    whole, _ = search.block(0)

    def stopped(keys: KeyBlock, ids: pl.Series, *others: Any) -> pl.DataFrame:
        if "d0002" in ids:
            raise KeyboardInterrupt
        return nearest(keys, ids, *others)

    with monkeypatch.context() as patch:
        patch.setattr("sbp_assets.pairing.search.nearest", stopped)
        with pytest.raises(KeyboardInterrupt):
            search.block(0, tables=tables)
    made, counts = search.block(0, tables=tables)
    assert counts == {"resumed": 2, "unchanged": 0, "extended": 0, "searched": 1, "keys": 60, "queries": 20}
    assert {f.name: f.read_bytes() for f in made.iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}
    # Not recorded, perhaps: the store was away. Nothing is read for it again.
    _, counts = search.block(0, tables=tables)
    assert counts["resumed"] == 3 and counts["keys"] == counts["queries"] == 0


def test_keys_are_read_once_and_queries_once_per_block(store: Path) -> None:
    search = Search.of(store, of_shards(unit(60), 3), neighbors=3, key_blocks=4)
    counts = [search.block(block)[1] for block in range(4)]
    assert sum(count["keys"] for count in counts) == 60 and min(count["keys"] for count in counts) > 0
    assert [count["queries"] for count in counts] == [60] * 4


def test_a_neighbour_that_is_nearer_by_less_than_the_tolerance_is_not_missed():
    mine = pl.DataFrame({"query_id": ["q", "q"], "neighbor_id": ["a", "b"], "similarity": [0.9, 0.8]})
    exact = {"q": pl.DataFrame({"neighbor_id": ["a", "c", "b"], "similarity": [0.9, 0.803, 0.8]})}
    assert recall(mine, exact, 2) == 2 / 3 and recall(mine, exact, 2, tolerance=0.005) == 1
    assert recall(mine, exact, 2, tolerance=0.001) == 2 / 3


def test_a_full_disk_is_named_and_ends_no_process(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = Search.of(store, of_shards(unit(10), 1), neighbors=3)

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        search.block(0)


def test_empty_shards_and_a_corpus_of_one_document(store: Path, embeddings: Tables) -> None:
    none = find(store, embeddings, neighbors=5)["00002"]
    assert none.is_empty() and none.schema == CANDIDATE_SCHEMA
    alone = find(store, {"00000": embeddings["00000"][:1]}, neighbors=5)["00000"]
    assert alone.is_empty() and alone.schema == CANDIDATE_SCHEMA


def test_partials_of_other_documents_are_refused(store: Path) -> None:
    search = Search.of(store, of_shards(unit(10), 1), neighbors=3)
    with pytest.raises(ValueError, match=r"not of the shard \(d0009\).*partial_candidates"):
        merge(partial_tables(search.blocks(), "00000"), pl.Series(IDS[:9]), 3)


def test_vectors_without_direction_are_named(store: Path) -> None:
    search, vectors = Search.of(store, of_shards(unit(6), 2), neighbors=3), unit(6)[::2].copy()
    vectors[1] = np.nan
    search.tables["00000"] = embeddings_frame(search.tables["00000"]["id"], vectors)
    with pytest.raises(ValueError, match="shard 00000: 1 vectors are not finite or zero \\(d0002\\)"):
        indexed(store / "again", search.tables, search.quantizer)
