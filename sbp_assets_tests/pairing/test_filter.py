from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbp_assets.pairing.filter import (
    PAIR_SCHEMA,
    d2_places,
    filter_pairs,
    histogram,
    histogram_markdown,
)
from sbp_assets.pairing.search import CANDIDATE_SCHEMA
from sbp_assets.settings import Pairing
from sbp_assets.storage.progress import Progress
from sbp_assets_tests.twins import TWINS, extract

Row = tuple[str, str, str, float, int]


def tables(rows: dict[str, list[Row]]) -> dict[str, pl.LazyFrame]:
    return {s: pl.DataFrame(part, schema=CANDIDATE_SCHEMA, orient="row").lazy() for s, part in rows.items()}


def texts(shards: dict[str, dict[str, str]]) -> dict[str, pl.LazyFrame]:
    schema = {"id": pl.String, "text": pl.String}
    return {s: pl.DataFrame({"id": list(d), "text": list(d.values())}, schema=schema).lazy() for s, d in shards.items()}


def run(
    candidates: dict[str, list[Row]], documents: dict[str, dict[str, str]], **settings: object
) -> tuple[dict[str, pl.DataFrame], dict[str, dict[str, int]]]:
    pairing = Pairing(**{"min_similarity": 0.5, "shingle_tokens": 3, **settings})  # type: ignore[arg-type]
    pairs, counts = {}, {}
    for shard in candidates:
        with Progress("filter", "pairs") as progress:
            pairs[shard], counts[shard] = filter_pairs(tables(candidates), texts(documents), shard, pairing, progress)
        assert pairs[shard].schema == PAIR_SCHEMA
    return pairs, counts


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
    # Found from both sides with two roundings: the higher stands.
    assert pairs["0"]["similarity"][0] == pairs["1"]["similarity"][0] == pytest.approx(0.81)
    assert counts["0"]["reversed"] == 1


def test_places_freed_by_near_copies_go_to_the_next_best_pair_of_the_shard() -> None:
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
@settings(max_examples=40, deadline=None)
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
    pairs, counts = run(candidates, documents, max_pairs_per_document=cap, both_directions=both)
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


def test_the_places_of_a_hub_are_dealt_to_its_most_similar_documents() -> None:
    candidates = tables(
        {
            "0": [("a", "hub", "1", 0.9, 1), ("b", "hub", "1", 0.6, 1)],
            "1": [("c", "hub", "1", 0.8, 1), ("d", "hub", "1", 0.7, 1)],
        }
    )
    pairing = Pairing(min_similarity=0.5, max_pairs_per_document=3, both_directions=False)
    assert d2_places(pl.Series(["hub"]), candidates, "0", pairing).rows() == [("hub", 1)]
    assert d2_places(pl.Series(["hub"]), candidates, "1", pairing).rows() == [("hub", 2)]


def test_histogram_counts_every_similarity() -> None:
    table = histogram(pl.Series([0.0, 0.51, 0.52, 1.0, -0.2], dtype=pl.Float32))
    assert table["pairs"].sum() == 5 and table["pairs"][19] == 1 and table["pairs"][0] == 2
    assert "| 0.500 – 0.550 | 2 |" in histogram_markdown(table)
    assert histogram_markdown(histogram(pl.Series([], dtype=pl.Float32))) == "No pairs."
