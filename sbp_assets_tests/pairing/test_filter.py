from __future__ import annotations

import random
import tempfile
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbp_assets.pairing.filter import (
    EDGE_SCHEMA,
    EDGES_FILE,
    PAIR_SCHEMA,
    bucket_edges,
    bucket_shards,
    shard_pairs,
)
from sbp_assets.pairing.search import CANDIDATE_SCHEMA
from sbp_assets.settings import Pairing
from sbp_assets.storage.paths import read_table
from sbp_assets.storage.progress import Progress
from sbp_assets_tests.twins import TWINS, extract

Row = tuple[str, str, str, float, int]


def run(
    candidates: dict[str, list[Row]], documents: dict[str, dict[str, str]], buckets: int = 1, **settings: object
) -> tuple[dict[str, pl.DataFrame], dict[str, dict[str, int]]]:
    """Return pairs and counts by shard, of artifacts with a wildcard and a quote in their paths."""
    pairing = Pairing(**{"min_similarity": 0.5, "shingle_tokens": 3, **settings})  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="it's [a]? ") as folder:
        store = Path(folder)
        for shard, rows in candidates.items():
            pl.DataFrame(rows, schema=CANDIDATE_SCHEMA, orient="row").write_parquet(store / f"candidates-{shard}")
            texts = {"id": list(documents[shard]), "text": list(documents[shard].values())}
            table = pl.DataFrame(texts, schema={"id": pl.String, "text": pl.String})
            table.with_columns(split=pl.lit("unique")).write_parquet(store / f"documents-{shard}")
        found, asked = (
            {shard: store / f"{what}-{shard}" for shard in candidates} for what in ("candidates", "documents")
        )
        edges = {}
        for bucket in range(buckets):
            edges[str(bucket)] = store / str(bucket) / "edges"
            edges[str(bucket)].mkdir(parents=True)
            shards = bucket_shards(list(candidates), bucket, buckets)
            with Progress("filter", "pairs") as progress:
                counts = bucket_edges(found, asked, shards, pairing, edges[str(bucket)], "64MB", progress)
            written = read_table(edges[str(bucket)] / EDGES_FILE)
            assert written.schema == EDGE_SCHEMA and len(written) == counts["edges"]
            assert {path.name for path in edges[str(bucket)].parent.iterdir()} <= {"edges", "spill"}
        results = {shard: shard_pairs(edges, shard, pairing) for shard in candidates}
    assert all(pairs.schema == PAIR_SCHEMA for pairs, _ in results.values())
    return {s: pairs for s, (pairs, _) in results.items()}, {s: counts for s, (_, counts) in results.items()}


DOCUMENTS = {
    "0": {"a": "one two three four five", "b": "six seven eight nine ten"},
    "1": {"c": "red green blue white black", "d": "one two three four five six"},
}


def test_bounds_and_near_copies() -> None:
    candidates = {
        "0": [("a", "b", "0", 0.6, 1), ("a", "c", "1", 0.4, 2), ("b", "c", "1", 0.99, 1), ("a", "d", "1", 0.9, 3)],
        "1": [],
    }
    pairs, counts = run(candidates, DOCUMENTS, both_directions=False, max_similarity=0.95)
    assert pairs["0"].select("d1", "d2").rows() == [("a", "b")]
    assert counts["0"] == {
        "candidates": 4,
        "reversed": 0,
        "too_dissimilar": 1,
        "too_similar": 1,
        "near_copies": 1,
        "over_d2_cap": 0,
        "over_d1_cap": 0,
        "pairs": 1,
    }
    assert pairs["1"].is_empty()


def test_both_directions_give_every_pair_once_in_the_shard_of_its_d1() -> None:
    candidates = {"0": [("a", "c", "1", 0.8, 1), ("a", "b", "0", 0.7, 2)], "1": [("c", "a", "0", 0.81, 1)]}
    pairs, counts = run(candidates, DOCUMENTS)
    assert pairs["0"].select("d1", "d2").rows() == [("a", "c"), ("a", "b"), ("b", "a")]
    assert pairs["1"].select("d1", "d2", "d2_shard").rows() == [("c", "a", "0")]
    # Were there two similarities of a pair, the higher would stand.
    assert pairs["0"]["similarity"][0] == pairs["1"]["similarity"][0] == pytest.approx(0.81)
    assert counts["0"]["reversed"] == 1


def test_places_freed_by_near_copies_go_to_the_next_best_pair() -> None:
    documents = {"0": {"a": "p q r s t", "b": "one two three x y", "hub": "one two three four five", "e": "k l m n o"}}
    candidates = {"0": [("b", "hub", "0", 0.95, 1), ("a", "hub", "0", 0.9, 1), ("e", "hub", "0", 0.8, 1)]}
    pairs, counts = run(candidates, documents, both_directions=False, max_pairs_per_document=2)
    assert pairs["0"]["d1"].to_list() == ["a", "e"] and counts["0"]["near_copies"] == 1
    pairs, counts = run(candidates, documents, both_directions=False, max_pairs_per_document=1)
    assert pairs["0"]["d1"].to_list() == ["a"] and counts["0"]["over_d2_cap"] == 1


@pytest.mark.parametrize("language", TWINS)
def test_a_copied_passage_is_a_near_copy_in_every_language(language: str) -> None:
    passage, lake, letters = TWINS[language]
    documents = {"0": {"a": passage + lake, "b": passage + letters, "lake": lake * 2, "letters": letters * 2}}
    candidates = {"0": [("a", "b", "0", 0.9, 1), ("lake", "letters", "0", 0.8, 1)]}
    pairs, counts = run(candidates, documents, shingle_tokens=Pairing().shingle_tokens)
    assert pairs["0"].select("d1", "d2").rows() == [("lake", "letters"), ("letters", "lake")]
    assert pairs["0"]["shared_shingles"].to_list() == [0, 0]
    assert counts["0"]["near_copies"] == 2


@pytest.mark.parametrize("language", TWINS)
def test_a_text_shorter_than_a_shingle_is_a_near_copy_of_what_holds_all_of_it(language: str) -> None:
    passage, _, letters = TWINS[language]
    short = extract(passage, 8)
    documents = {"0": {"long": passage, "extract": short, "again": short.upper(), "other": extract(letters, 8)}}
    candidates = {
        "0": [("long", "extract", "0", 0.9, 1), ("extract", "again", "0", 0.9, 1), ("long", "other", "0", 0.8, 1)]
    }
    pairs, counts = run(candidates, documents, shingle_tokens=Pairing().shingle_tokens)
    assert pairs["0"].select("d1", "d2").rows() == [("long", "other"), ("other", "long")]
    assert counts["0"]["near_copies"] == 4


def test_a_candidate_without_document_is_named() -> None:
    with pytest.raises(ValueError, match="'ghost' is a neighbour candidate but not in corpus/documents"):
        run({"0": [("a", "ghost", "0", 0.9, 1)]}, {"0": DOCUMENTS["0"]}, both_directions=False)


@given(
    found=st.lists(
        st.tuples(st.integers(0, 11), st.integers(0, 11), st.sampled_from([0.4, 0.6, 0.7, 0.7, 0.9])), max_size=60
    ),
    shards=st.integers(1, 3),
    cap=st.integers(1, 4),
    both=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_caps_hold_over_the_corpus_and_no_pair_occurs_twice(
    found: list[tuple[int, int, float]], shards: int, cap: int, both: bool
) -> None:
    names = [f"d{i:02d}" for i in range(12)]
    documents: dict[str, dict[str, str]] = {str(s): {} for s in range(shards)}
    for i, name in enumerate(names):
        documents[str(i % shards)][name] = f"{name} w{i % 3} x y{i} z"
    candidates: dict[str, list[Row]] = {str(s): [] for s in range(shards)}
    for (q, n), similarity in {(q, n): s for q, n, s in found if q != n}.items():
        candidates[str(q % shards)].append((names[q], names[n], str(n % shards), similarity, 1))
    pairs, counts = run(candidates, documents, 2, max_pairs_per_document=cap, both_directions=both)
    everything = pl.concat(list(pairs.values()))
    assert not everything.select(pl.struct("d1", "d2").is_duplicated().any()).item()
    for side in ("d1", "d2"):
        assert (everything.group_by(side).len()["len"] <= cap).all()
    assert (everything["similarity"] >= 0.5).all()
    for shard, kept in pairs.items():
        assert set(kept["d1"]) <= set(documents[shard])
        c = counts[shard]
        lost = c["too_dissimilar"] + c["too_similar"] + c["near_copies"] + c["over_d2_cap"] + c["over_d1_cap"]
        assert c["candidates"] + c["reversed"] - lost == c["pairs"] == len(kept)


def test_a_hub_keeps_its_most_similar_pairs_of_all_shards() -> None:
    names = ["a", "b", "c", "d"]
    documents = {"0": {"a": "a b c", "b": "d e f"}, "1": {"c": "g h i", "d": "j k l", "hub": "x y z"}}
    candidates: dict[str, list[Row]] = {
        "0": [("a", "hub", "1", 0.9, 1), ("b", "hub", "1", 0.6, 1)],
        "1": [("c", "hub", "1", 0.8, 1), ("d", "hub", "1", 0.7, 1)],
    }
    how = {"both_directions": False, "buckets": 2}
    pairs, counts = run(candidates, documents, max_pairs_per_document=3, **how)
    assert pairs["0"]["d1"].to_list() == ["a"] and pairs["1"]["d1"].to_list() == ["c", "d"]
    assert counts["0"]["over_d2_cap"] == 1 and counts["1"]["over_d2_cap"] == 0
    everything, _ = run(candidates, documents, max_pairs_per_document=None, **how)
    assert sorted(pl.concat(everything.values())["d1"]) == names


@pytest.mark.parametrize("both", [True, False])
def test_pairs_are_the_same_for_any_number_of_buckets_and_shards(both: bool) -> None:
    draw = random.Random(0)
    names = [f"d{i:02d}" for i in range(30)]
    texts = {name: " ".join(draw.choice("abcde") for _ in range(8)) for name in names}
    found = {(q, n): draw.choice([0.4, 0.6, 0.7, 0.9]) for q in names for n in draw.sample(names, 6) if q != n}
    seen = []
    for shards, buckets in ((1, 1), (3, 1), (5, 2), (5, 9)):
        of = {name: str(i % shards) for i, name in enumerate(names)}
        documents: dict[str, dict[str, str]] = {str(s): {} for s in range(shards)}
        candidates: dict[str, list[Row]] = {str(s): [] for s in range(shards)}
        for name, text in texts.items():
            documents[of[name]][name] = text
        for (q, n), similarity in found.items():
            candidates[of[q]].append((q, n, of[n], max(similarity, found.get((n, q), 0)), 1))
        pairs, counts = run(
            candidates, documents, buckets, max_pairs_per_document=2, both_directions=both, max_shared_shingles=0.3
        )
        totals = {name: sum(count[name] for count in counts.values()) for name in counts["0"]}
        seen.append((pl.concat(pairs.values()).drop("d2_shard").sort("d1", "d2").rows(), totals))
    assert seen[0][0] and all(one == seen[0] for one in seen)


def test_more_texts_than_are_kept_are_compared_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = {"0": [("a", "c", "1", 0.8, 1), ("a", "b", "0", 0.7, 2)], "1": [("c", "d", "1", 0.8, 1)]}
    whole = run(candidates, DOCUMENTS)
    monkeypatch.setattr("sbp_assets.pairing.filter.PAIRS_PER_BATCH", 1)
    monkeypatch.setattr("sbp_assets.pairing.filter.SHINGLES_KEPT", 1)
    parts = run(candidates, DOCUMENTS)
    assert parts[1] == whole[1] and all(parts[0][s].equals(whole[0][s]) for s in whole[0])
