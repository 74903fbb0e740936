"""What one shard's checks read of the others, and that the checks of all shards find what these do not see."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import polars as pl
import pytest

from sbp_assets.pairing.audit import Result, check_origin, check_pairs, sampled_shards
from sbp_assets.pairing.global_audit import check_all_candidates, check_all_pairs
from sbp_assets.pairing.search_audit import check_candidates
from sbp_assets.settings import Deployment, Pairing
from sbp_assets_tests.pairing.searches import fitted, sharded, unit
from sbp_assets_tests.pairing.worlds import Tables, World, make_world, with_first

SHARDS, OF_EACH, K = 64, 3, 4
SHARD = "00007"
OTHERS = Deployment().checked_shards
PAIRING = Pairing(max_similarity=1.0, max_shared_shingles=1.0, max_pairs_per_document=100, neighbors=K).model_copy(
    update={"min_similarity": -1.0}  # all of the nearest are pairs
)
# The worlds have vectors of 16 components.
QUANTIZER = fitted(sharded(["a", "b"], unit(2), [0, 0], 1), Pairing())


def candidates_of_a_shard(
    table: pl.DataFrame, queries: pl.DataFrame, embeddings: Mapping[str, pl.LazyFrame], shard: str, k: int, others: int
) -> Result:
    return check_candidates(table, queries, embeddings, shard, QUANTIZER, k, others)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(SHARDS, OF_EACH, K)


def lazy(tables: Tables) -> dict[str, pl.LazyFrame]:
    return {shard: table.lazy() for shard, table in tables.items()}


def of_candidates(world: World, candidates: Tables, scratch: Path, k: int = K) -> Result:
    scratch.mkdir()
    return check_all_candidates(lazy(candidates), lazy(world.embeddings), k, scratch, "1GB")


def of_pairs(world: World, pairs: Tables, scratch: Path, cap: int = 100) -> Result:
    scratch.mkdir()
    settings = PAIRING.model_copy(update={"max_pairs_per_document": cap})
    return check_all_pairs(lazy(pairs), lazy(world.documents), settings, scratch, "1GB")


@pytest.mark.parametrize("both_directions", [True, False])
def test_the_checks_of_a_shard_open_a_few_others_whatever_the_number_of_shards(
    world: World, both_directions: bool
) -> None:
    settings = PAIRING.model_copy(update={"both_directions": both_directions})
    for shard in list(world.documents)[::8]:
        found = []
        for check in ("candidates", "pairs", "origin"):
            opened = world.opened()
            documents, candidates, pairs = opened["documents"], opened["candidates"], world.pairs[shard]
            if check == "candidates":
                queries, embeddings = world.embeddings[shard], opened["embeddings"]
                found.append(candidates_of_a_shard(world.candidates[shard], queries, embeddings, shard, K, OTHERS))
                assert set(embeddings.times) == set(sampled_shards(shard, world.embeddings, OTHERS))
            elif check == "pairs":
                found.append(check_pairs(pairs, documents, shard, settings, OTHERS))
                assert len(documents.times) == 1 + OTHERS
            else:
                found.append(check_origin(pairs, candidates, documents, shard, settings, OTHERS))
                assert shard in documents.times and len(documents.times) > 1
            for name, tables in opened.items():
                assert len(tables.times) <= 1 + OTHERS, (check, name)
                assert all(times <= 2 for times in tables.times.values()), (check, name)
        assert all(passed for passed, _ in found), found


def test_the_checks_of_all_shards_open_each_table_once(world: World, tmp_path: Path) -> None:
    opened = world.opened()
    (tmp_path / "candidates").mkdir()
    passed, metadata = check_all_candidates(
        opened["candidates"], opened["embeddings"], K, tmp_path / "candidates", "1GB"
    )
    assert passed and metadata["documents"] == SHARDS * OF_EACH
    (tmp_path / "pairs").mkdir()
    passed, metadata = check_all_pairs(opened["pairs"], opened["documents"], PAIRING, tmp_path / "pairs", "1GB")
    assert passed and metadata["pairs"] == SHARDS * OF_EACH * K
    for tables in opened.values():
        assert tables.times == dict.fromkeys(world.documents, 1)


def unseen(world: World) -> str:
    """Return a shard in which d2 of SHARD lie, which its checks do not read."""
    occurring = world.pairs[SHARD]["d2_shard"].unique()
    read = {
        SHARD,
        *sampled_shards(SHARD, occurring, OTHERS),
        *sampled_shards(SHARD, world.embeddings, OTHERS),
    }
    return min(set(occurring) - read)


def test_an_unknown_neighbor_is_found_by_the_shard_where_it_reads_and_over_all_shards_anywhere(
    world: World, tmp_path: Path
) -> None:
    for place, shard in enumerate((sampled_shards(SHARD, world.embeddings, OTHERS)[0], unseen(world))):
        table = world.candidates[SHARD]
        there = pl.col("neighbor_shard") == shard
        if table.filter(there).is_empty():
            table = with_first(table, neighbor_shard=shard)
        damaged = table.with_columns(
            neighbor_id=pl.when(there & there.cum_sum().eq(1)).then(pl.lit("nowhere")).otherwise("neighbor_id")
        )
        _, own = candidates_of_a_shard(damaged, world.embeddings[SHARD], lazy(world.embeddings), SHARD, K, OTHERS)
        assert bool(own["unknown_ids"]) == (place == 0)
        _, full = candidates_of_a_shard(
            damaged, world.embeddings[SHARD], lazy(world.embeddings), SHARD, K, others=SHARDS
        )
        assert full["unknown_ids"] == 1
        passed, metadata = of_candidates(world, {**world.candidates, SHARD: damaged}, tmp_path / str(place))
        assert not passed and metadata["unknown_ids"] and "nowhere" in str(metadata["offending_ids"])


def test_candidates_of_all_shards(world: World, tmp_path: Path) -> None:
    good = world.candidates[SHARD]
    fewer = {shard: table.filter(pl.col("rank") < K) for shard, table in world.candidates.items()}
    no_query = good.filter(pl.col("query_id") != good["query_id"][0])
    damages = {
        "unknown_ids": [
            with_first(good, neighbor_id="d0000", neighbor_shard="00001"),  # a document of another shard
            with_first(good, neighbor_shard="99999"),
            good.with_columns(neighbor_shard=pl.lit(None, pl.String)),
            good.with_columns(neighbor_id=pl.lit(None, pl.String)),
            good.with_columns(query_id=pl.lit("nobody")),
        ],
        "queries_with_wrong_ranks": [good[1:], pl.concat([good, good[:1]])],
        "queries_without_neighbors": [good[:0], no_query],
    }
    for fault, tables in damages.items():
        for place, table in enumerate(tables):
            passed, metadata = of_candidates(world, {**world.candidates, SHARD: table}, tmp_path / f"{fault}{place}")
            assert not passed and metadata[fault], (fault, place)
    passed, metadata = of_candidates(world, fewer, tmp_path / "fewer")
    assert not passed and metadata["queries_with_wrong_ranks"] == SHARDS * OF_EACH
    assert of_candidates(world, fewer, tmp_path / "as_wanted", k=K - 1)[0]


def test_shards_of_few_documents_have_as_many_ranks_as_there_are_others(tmp_path: Path) -> None:
    # A document a shard: nine shards hold 9 documents, and the checks of one do not know whether there are more than k.
    world = make_world(12, 1, 10)
    for k, expected in ((10, True), (11, False)):
        assert of_candidates(world, world.candidates, tmp_path / str(k), k)[0] == expected
        for shard, table in world.candidates.items():
            _, metadata = candidates_of_a_shard(
                table, world.embeddings[shard], lazy(world.embeddings), shard, k, OTHERS
            )
            assert not metadata["queries_with_wrong_ranks"], "10 ranks are possible: only all shards tell"
            cut = table.filter(pl.col("rank") < 8)
            _, metadata = candidates_of_a_shard(cut, world.embeddings[shard], lazy(world.embeddings), shard, k, OTHERS)
            assert metadata["queries_with_wrong_ranks"] == 1
    alone, none = make_world(1, 1, 0), {"00000": world.candidates["00000"][:0]}
    assert of_candidates(alone, none, tmp_path / "alone")[0]
    assert candidates_of_a_shard(none["00000"], alone.embeddings["00000"], lazy(alone.embeddings), "00000", K, OTHERS)[
        0
    ]


def test_pairs_of_all_shards(world: World, tmp_path: Path) -> None:
    good, other = world.pairs[SHARD], world.pairs["00000"]
    places = pl.concat(list(world.pairs.values())).group_by("d2").len()["len"]
    most = max(int(places.max() or 0), K)  # type: ignore[arg-type]
    assert of_pairs(world, world.pairs, tmp_path / "at_cap", most)[0]
    for table in world.pairs.values():  # each shard by itself is below the cap
        assert table.group_by("d2").len()["len"].max() < most  # type: ignore[operator]
    passed, metadata = of_pairs(world, world.pairs, tmp_path / "over_cap", most - 1)
    assert not passed and metadata["d2_over_cap"] == (places == most).sum() and not metadata["documents_not_in_d"]
    damages = {
        "repeated_pairs": pl.concat([good, other[:1]]),  # kept by two shards
        "d1_over_cap": pl.concat([good, *([good[:1]] * 100)]),
        "documents_not_in_d": with_first(good, d2="heldout", d2_shard=unseen(world)),
    }
    for fault, table in damages.items():
        passed, metadata = of_pairs(world, {**world.pairs, SHARD: table}, tmp_path / fault)
        assert not passed and metadata[fault], fault
    table = damages["documents_not_in_d"]
    assert check_pairs(table, lazy(world.documents), SHARD, PAIRING, OTHERS)[0]
    assert not check_pairs(table, lazy(world.documents), SHARD, PAIRING, others=SHARDS)[0]
    # Held out, where D had it.
    documents = {**world.documents, "00000": world.documents["00000"].with_columns(split=pl.lit("heldout"))}
    (tmp_path / "split").mkdir()
    passed, metadata = check_all_pairs(lazy(world.pairs), lazy(documents), PAIRING, tmp_path / "split", "1GB")
    assert not passed and metadata["documents_not_in_d"] == OF_EACH
    assert of_pairs(world, {shard: table[:0] for shard, table in world.pairs.items()}, tmp_path / "none")[0]


@pytest.mark.parametrize("shards", [2, 9])
def test_of_nine_shards_a_shard_reads_all(shards: int) -> None:
    world = make_world(shards, OF_EACH, K)
    candidates, pairs = world.candidates["00000"], world.pairs["00000"]
    queries, embeddings, documents = world.embeddings["00000"], lazy(world.embeddings), lazy(world.documents)
    assert candidates_of_a_shard(candidates, queries, embeddings, "00000", K, OTHERS)[0]
    assert check_pairs(pairs, documents, "00000", PAIRING, OTHERS)[0]
    for row in range(len(candidates)):
        here = pl.int_range(pl.len()) == row
        wrong = candidates.with_columns(neighbor_id=pl.when(here).then(pl.lit("x")).otherwise("neighbor_id"))
        assert candidates_of_a_shard(wrong, queries, embeddings, "00000", K, OTHERS)[1]["unknown_ids"] == 1
        wrong = pairs.with_columns(d2=pl.when(here).then(pl.lit("x")).otherwise("d2"))
        assert check_pairs(wrong, documents, "00000", PAIRING, OTHERS)[1]["documents_not_in_d"] == 1
        assert (
            check_origin(wrong, lazy(world.candidates), documents, "00000", PAIRING, OTHERS)[1]["no_such_candidate"]
            == 1
        )
    for table in (with_first(pairs, d2_shard="99999"), pairs.with_columns(d2_shard=pl.lit(None, pl.String))):
        assert check_pairs(table, documents, "00000", PAIRING, OTHERS)[1]["documents_not_in_d"]
