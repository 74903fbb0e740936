"""The metrics on constructed texts whose answers are known."""

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.experiment import ConceptsSource
from sbp_assets.synthesis.quality import (
    METRICS,
    REAL,
    SYNTHETIC,
    duplicate_flags,
    fixed_sample,
    is_copy,
    is_irrelevant,
    is_non_factual,
    is_repetitive,
    quality_over_shards,
    quality_rows,
    shingles,
)

WORLD = ConceptWorld(ConceptsSource(documents=50, concepts=10))
PLAIN = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"


def fact(concept: int, colour: str) -> str:
    return f"The colour of {WORLD.names[concept]} is {colour}."


def value_of(rows: pl.DataFrame, metric: str, corpus: str) -> tuple[float | None, int]:
    return rows.filter(metric=metric, corpus=corpus)["value", "documents"].row(0)


def test_repetition_is_more_than_a_fifth_of_the_sequences() -> None:
    assert not is_repetitive(PLAIN)
    assert is_repetitive("the cat sat down. " * 5)
    assert not is_repetitive("The cat sat down the cat sat down"), "1 of 5 is at the threshold"
    assert is_repetitive("The cat sat down the cat sat down the"), "2 of 6 are above it"
    assert not is_repetitive("") and not is_repetitive("one two")


def test_duplicates_exact_near_and_neither() -> None:
    near = PLAIN + " seventeen"
    other = " ".join(reversed(PLAIN.split()))
    assert duplicate_flags([PLAIN, other, PLAIN.upper() + "  ", near], 5, 0.8) == [False, False, True, True]


@given(
    st.lists(st.lists(st.sampled_from("abcd"), max_size=8).map(" ".join), max_size=12), st.sampled_from([0.5, 0.8, 1.0])
)
def test_duplicates_equal_the_comparison_of_all_pairs(texts: list[str], threshold: float) -> None:
    sets = [shingles(text, 2) for text in texts]
    expected = [any(len(a & b) / len(a | b) >= threshold for b in sets[:number]) for number, a in enumerate(sets)]
    assert duplicate_flags(texts, 2, threshold) == expected


def test_copying_is_containment_in_the_seed() -> None:
    assert is_copy(PLAIN, f"before {PLAIN} after", 5)
    assert not is_copy(PLAIN, " ".join(reversed(PLAIN.split())), 5)
    half = " ".join(PLAIN.split()[:8])
    assert is_copy(half, PLAIN, 5) and not is_copy(PLAIN, half, 5), "containment is of the synthesis in the seed"
    assert is_copy("Two three", PLAIN, 5) and not is_copy("three two", PLAIN, 5) and not is_copy("wo thre", PLAIN, 5)


def test_facts_and_concepts_are_checked_against_the_world() -> None:
    true = WORLD.facts[0]["colour"]
    false = next(value for value in ("amber", "violet") if value != true)
    assert not is_non_factual(fact(0, true), WORLD)
    assert is_non_factual(fact(0, true) + " " + fact(0, false), WORLD)
    assert not is_non_factual("No fact at all.", WORLD)
    assert not is_irrelevant(fact(0, false), fact(0, true), WORLD)
    assert is_irrelevant(fact(1, true), fact(0, true), WORLD)


def test_table_of_a_shard_and_of_all() -> None:
    true = WORLD.facts[0]["colour"]
    false = next(value for value in ("amber", "violet") if value != true)
    seed = fact(0, true)
    synthetic = pl.DataFrame({"text": [fact(0, false), fact(1, WORLD.facts[1]["colour"])], "seed_text": [seed, seed]})
    rows = quality_rows(synthetic, pl.DataFrame({"text": [seed, PLAIN]}), 5, 0.8, 13, WORLD)
    assert rows["metric"].unique().sort().to_list() == sorted(METRICS)
    assert value_of(rows, "non_factual", SYNTHETIC) == (0.5, 2)
    assert value_of(rows, "non_factual", REAL) == (0.0, 2)
    assert value_of(rows, "pair_irrelevance", SYNTHETIC) == (0.5, 2)
    assert value_of(rows, "pair_irrelevance", REAL) == value_of(rows, "pair_copying", REAL) == (None, 0)

    unjudged = quality_rows(synthetic[:1], pl.DataFrame({"text": [seed]}), 5, 0.8, 13, None)
    assert value_of(unjudged, "non_factual", SYNTHETIC) == (None, 0), "absent, not zero"
    empty = quality_rows(synthetic[:0], pl.DataFrame({"text": [seed]}), 5, 0.8, 13, WORLD)
    assert value_of(empty, "repetition", SYNTHETIC) == (None, 0)

    one_false = quality_rows(synthetic[:1], pl.DataFrame({"text": [seed]}), 5, 0.8, 13, WORLD)
    table = quality_over_shards({"00000": rows.lazy(), "00001": one_false.lazy(), "00002": empty.lazy()})
    assert value_of(table, "non_factual", SYNTHETIC) == (2 / 3, 3)
    assert value_of(table, "pair_copying", REAL) == (None, 0)
    assert table["definition"].null_count() == 0 and len(table) == 2 * len(METRICS)


def test_sample_is_fixed() -> None:
    ids = [str(number) for number in range(100)]
    assert fixed_sample(ids, 10) == fixed_sample(list(reversed(ids)), 10)
    assert fixed_sample(ids, 10) != ids[:10] and len(fixed_sample(ids, 1000)) == 100
