from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sbp_assets.pairing.embed import embeddings_frame, vectors_of
from sbp_assets.pairing.index import KeyShard, build_index, write_index
from sbp_assets.pairing.search import CANDIDATE_SCHEMA, exact_neighbors, merge, reading_order, recall, search
from sbp_assets.storage.progress import Progress
from sbp_assets_tests.pairing.test_index import unit

ROWS = {"query": pl.UInt32, "neighbor_id": pl.String, "neighbor_shard": pl.String, "similarity": pl.Float32}


def write_shards(store: Path, tables: dict[str, pl.DataFrame], kind: str = "flat") -> dict[str, Path]:
    paths = {}
    for shard, table in tables.items():
        paths[shard] = store / shard
        paths[shard].mkdir(parents=True, exist_ok=True)
        write_index(paths[shard], build_index(vectors_of(table), kind), table["id"])  # type: ignore[arg-type]
    return paths


def find(queries: pl.DataFrame, keys: dict[str, Path], k: int, shard: str = "00000") -> pl.DataFrame:
    with Progress("search", "queries") as progress:
        return search(queries["id"], vectors_of(queries), keys, k, 16, shard, progress)


SCORES = st.lists(st.sampled_from([0.1, 0.25, 0.5, 0.75]), min_size=12, max_size=12)


@given(
    scores=st.lists(SCORES, min_size=1, max_size=3),
    owners=st.lists(st.integers(0, 3), min_size=12, max_size=12),
    order=st.permutations(range(4)),
    k=st.integers(1, 12),
)
@settings(max_examples=60, deadline=None)
def test_merged_shards_equal_one_index(scores: list[list[float]], owners: list[int], order: list[int], k: int) -> None:
    rows = pl.DataFrame(
        [(q, f"d{j:02d}", str(owners[j]), value) for q, line in enumerate(scores) for j, value in enumerate(line)],
        schema=ROWS,
        orient="row",
    )
    empty = rows.clear()
    merged = empty
    for shard in order:  # what a shard hands over is its own top k
        merged = merge(merged, merge(empty, rows.filter(pl.col("neighbor_shard") == str(shard)), k), k)
    assert merged.equals(merge(empty, rows, k))
    for q, line in enumerate(scores):
        expected = sorted(range(12), key=lambda j: (-line[j], j))[:k]
        assert merged.filter(pl.col("query") == q)["neighbor_id"].to_list() == [f"d{j:02d}" for j in expected]


@given(
    owners=st.lists(st.integers(0, 3), min_size=2, max_size=25),
    repeats=st.integers(1, 25),
    k=st.integers(1, 6),
    kind=st.sampled_from(["flat", "ivf"]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_search_over_shards_ranks_all_their_codes(
    store: Path, owners: list[int], repeats: int, k: int, kind: str
) -> None:
    # Few different vectors: equal documents, hence ties, across and within shards.
    vectors = unit(repeats)[np.arange(len(owners)) % repeats]
    ids = [f"d{i:02d}" for i in range(len(owners))]
    tables = {
        str(s): embeddings_frame(
            pl.Series([ids[i] for i in range(len(ids)) if owners[i] == s], dtype=pl.String),
            vectors[[i for i in range(len(ids)) if owners[i] == s]],
        )
        for s in range(4)
    }
    keys = write_shards(store, tables, kind)
    codes = {}
    for path in keys.values():
        key = KeyShard.load(path, 16)
        if kind == "ivf":
            key.index.make_direct_map()
        for row, id_ in enumerate(key.ids):
            codes[id_] = key.index.reconstruct(row)
    everything = embeddings_frame(pl.Series(ids), vectors)
    found = find(everything, keys, k)
    for i, id_ in enumerate(ids):
        truth = sorted(
            ((-float(np.clip(vectors[i] @ code, -1, 1)), other) for other, code in codes.items() if other != id_)
        )
        mine = found.filter(pl.col("query_id") == id_)
        assert mine["rank"].to_list() == list(range(1, min(k, len(ids) - 1) + 1))
        assert np.allclose(mine["similarity"].to_numpy(), [-s for s, _ in truth[:k]], atol=1e-5)
        for neighbor, similarity in mine.select("neighbor_id", "similarity").iter_rows():
            assert abs(similarity - np.clip(vectors[i] @ codes[neighbor], -1, 1)) < 1e-5


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_many_equal_documents_are_ranked_exactly_from_few_of_them(store: Path, kind: str) -> None:
    # Every other document begins with the same licence.
    vectors = unit(3000)
    vectors[::2] = vectors[0]
    table = embeddings_frame(pl.Series([f"d{i:04d}" for i in np.random.default_rng(0).permutation(3000)]), vectors)
    keys = write_shards(store, {"0": table}, kind)
    assert KeyShard.load(keys["0"], 16).without_excess(5).index.ntotal == 1500 + 6
    found = find(table[:40], keys, 5)
    same = table[::2]["id"].sort().to_list()
    for query in table[:40:2]["id"]:
        mine = found.filter(pl.col("query_id") == query)
        assert mine["neighbor_id"].to_list() == [other for other in same[:6] if other != query][:5]
        assert mine["similarity"].n_unique() == 1


def test_ties_of_a_query_cost_the_other_queries_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pairs of equal documents: at any cut some query of a block has one of each side.
    table = embeddings_frame(pl.Series([f"d{i:04d}" for i in range(2000)]), np.repeat(unit(1000), 2, axis=0))
    keys, asked = write_shards(store, {"0": table}), []

    def counted(self: KeyShard, queries: np.ndarray) -> Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
        look = searcher(self, queries)
        return lambda some, k: (asked.append(len(some) * k), look(some, k))[1]

    searcher = KeyShard.searcher
    monkeypatch.setattr(KeyShard, "searcher", counted)
    find(table, keys, 5)
    assert sum(asked) < 2000 * 7 * 4, "to the end it would be 2000 * 2000 in one call"


def test_ties_across_the_cut_go_to_the_smaller_id(store: Path) -> None:
    same = np.repeat(unit(1), 40, axis=0)
    table = embeddings_frame(pl.Series([f"d{i:02d}" for i in range(40)]), same)
    found = find(table, write_shards(store, {"0": table[::2], "1": table[1::2]}), 3)
    assert found.filter(pl.col("query_id") == "d20")["neighbor_id"].to_list() == ["d00", "d01", "d02"]
    assert found.filter(pl.col("query_id") == "d01")["neighbor_id"].to_list() == ["d00", "d02", "d03"]


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_real_documents_find_their_subject_whatever_the_sharding(
    store: Path, embeddings: dict[str, pl.DataFrame], kind: str
) -> None:
    everything = pl.concat(list(embeddings.values()))
    one = find(everything, write_shards(store / "one", {"00000": everything}, kind), 5)
    many = find(everything, write_shards(store / "many", embeddings, kind), 5)
    assert one.select("query_id", "neighbor_id").join(many, on=["query_id", "neighbor_id"]).height / len(one) >= 0.95
    same = many["query_id"].str.split("-").list.first() == many["neighbor_id"].str.split("-").list.first()
    assert same.mean() > 0.95
    assert not (many["query_id"] == many["neighbor_id"]).any()
    exact = exact_neighbors(
        everything["id"].to_list(), vectors_of(everything), {s: t.lazy() for s, t in embeddings.items()}, 5
    )
    assert recall(many, exact, 5) >= 0.95
    assert recall(many.filter(pl.col("rank") > 2), exact, 5) < 0.7


def test_a_neighbour_that_is_nearer_by_less_than_the_tolerance_is_not_missed():
    mine = pl.DataFrame({"query_id": ["q", "q"], "neighbor_id": ["a", "b"], "similarity": [0.9, 0.8]})
    exact = {"q": pl.DataFrame({"neighbor_id": ["a", "c", "b"], "similarity": [0.9, 0.803, 0.8]})}
    assert recall(mine, exact, 2) == 2 / 3 and recall(mine, exact, 2, tolerance=0.005) == 1
    assert recall(mine, exact, 2, tolerance=0.001) == 2 / 3


def test_empty_query_and_key_shards(store: Path, embeddings: dict[str, pl.DataFrame]) -> None:
    keys = write_shards(store, embeddings)
    none = find(embeddings["00002"], keys, 5)
    assert none.is_empty() and none.schema == CANDIDATE_SCHEMA
    alone = find(embeddings["00000"][:1], write_shards(store / "one", {"00000": embeddings["00000"][:1]}), 5)
    assert alone.is_empty() and alone.schema == CANDIDATE_SCHEMA


def test_every_shard_is_read_once_from_its_own_start() -> None:
    shards = [f"{i:05d}" for i in range(16)]
    orders = {tuple(reading_order(shards, shard)) for shard in shards}
    assert len(orders) > 5 and all(sorted(order) == shards for order in orders)
    assert reading_order([], "x") == []
