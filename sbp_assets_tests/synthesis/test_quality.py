"""The metrics on constructed texts whose answers are known."""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.corpus.shingles import jaccard, shingled
from sbp_assets.settings import ConceptsSource, Dedup
from sbp_assets.synthesis.judge import judged_rows
from sbp_assets.synthesis.quality import (
    CORPORA,
    DETAILS,
    EXACT,
    HEURISTIC,
    JUDGE,
    METRICS,
    NEEDS_A_JUDGE,
    QUALITY_SCHEMA,
    REAL,
    SYNTHETIC,
    copies,
    duplicate_flags,
    duplicates_over_shards,
    expected_rows,
    fixed_sample,
    is_irrelevant,
    quality_over_shards,
    quality_rows,
    repetitive,
)
from sbp_assets_tests.synthesis.test_judge import JUDGEMENTS
from sbp_assets_tests.twins import TWINS, extract

WORLD = ConceptWorld(ConceptsSource(documents=50, concepts=10))
PLAIN = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
BACKWARDS = " ".join(reversed(PLAIN.split()))
NO_JUDGE = pl.DataFrame(schema=QUALITY_SCHEMA)


def fact(concept: int, emblem: str) -> str:
    return f"{WORLD.names[concept]} carries the sign of a {emblem}."


def rows_of(synthetic: pl.DataFrame, real: pl.DataFrame, world: ConceptWorld | None, scratch: Path) -> pl.DataFrame:
    return quality_rows(synthetic, real, Dedup(), 13, world, scratch, "1GB")


def flags_of(batches: Iterable[Sequence[str]], words: int = 5, threshold: float = 0.8) -> list[bool]:
    with tempfile.TemporaryDirectory() as scratch:
        return duplicate_flags(batches, Dedup(shingle_words=words, threshold=threshold), Path(scratch), "1GB")


def value_of(rows: pl.DataFrame, metric: str, corpus: str, method: str = EXACT) -> tuple[float | None, int]:
    return rows.filter(metric=metric, corpus=corpus, method=method)["value", "documents"].row(0)


def test_repetition_is_more_than_a_fifth_of_the_sequences() -> None:
    assert repetitive([PLAIN, "the cat sat down. " * 5]) == [False, True]
    at, above = "The cat sat down the cat sat down", "The cat sat down the cat sat down the"
    assert repetitive([at, above]) == [False, True], "1 of 5 is at the threshold, 2 of 6 are above it"
    assert repetitive(["", "one two"]) == [False, False]


@pytest.mark.parametrize("language", TWINS)
def test_repetition_is_found_in_every_language(language: str) -> None:
    passage, lake, _ = TWINS[language]
    texts = [lake * 20, passage + lake, passage + passage, extract(lake, 3), ""]
    assert repetitive(texts) == [True, False, True, False, False]


def test_duplicates_exact_near_and_neither_also_across_batches() -> None:
    texts = [PLAIN, BACKWARDS, PLAIN.upper() + "  ", PLAIN + " seventeen"]
    assert flags_of([texts]) == [False, False, True, True]
    assert flags_of([texts[:1], [], texts[1:3], texts[3:]]) == [False, False, True, True]
    assert flags_of([]) == [] and flags_of([["", " "]]) == [False, True]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abcd"), max_size=8).map(" ".join), max_size=12), st.sampled_from([0.5, 0.8, 1.0])
)
def test_duplicates_equal_the_comparison_of_all_pairs(texts: list[str], threshold: float) -> None:
    sets = [text.shingles for text in shingled(texts, 2)]
    expected = [any(jaccard(a, b) >= threshold for b in sets[:number]) for number, a in enumerate(sets)]
    assert flags_of([texts], 2, threshold) == expected


def test_duplicates_are_counted_across_shards_in_one_sample_of_both(tmp_path: Path) -> None:
    shards = {
        "00000": pl.LazyFrame({"id": ["a", "b"], "text": [PLAIN, BACKWARDS]}),
        "00001": pl.LazyFrame({"id": ["c"], "text": [PLAIN]}),
    }
    found = duplicates_over_shards({SYNTHETIC: shards, REAL: {}}, 10, Dedup(), tmp_path, "1GB")
    assert found.filter(corpus=SYNTHETIC)["value", "documents", "sample"].row(0) == (1 / 3, 3, 3)
    assert found.filter(corpus=REAL)["value", "sample"].row(0) == (None, 0)
    within = duplicates_over_shards({"one": {"00000": shards["00000"]}}, 10, Dedup(), tmp_path / "one", "1GB")
    assert within["value"].item() == 0, "each shard alone holds none"
    cut = duplicates_over_shards({SYNTHETIC: shards}, 2, Dedup(), tmp_path / "cut", "1GB")
    assert cut["sample"].item() == 2


def test_copying_is_containment_in_the_seed() -> None:
    assert copies([PLAIN, PLAIN], [f"before {PLAIN} after", BACKWARDS], 5) == [True, False]
    half = " ".join(PLAIN.split()[:8])
    assert copies([half, PLAIN], [PLAIN, half], 5) == [True, False], "containment is of the synthesis in the seed"
    assert copies(["Two three", "three two", "wo thre", ""], [PLAIN] * 4, 5) == [True, False, False, False]


@pytest.mark.parametrize("language", TWINS)
def test_copying_and_duplicates_are_found_in_every_language(language: str) -> None:
    passage, lake, letters = TWINS[language]
    shorter = extract(passage, 8)
    synthetic = [passage + extract(lake, 2), letters + lake, shorter, extract(letters, 8), passage, ""]
    seeds = [passage, passage, passage, passage, shorter, passage]
    assert copies(synthetic, seeds, 13) == [True, False, True, False, False, False]
    edited = passage + lake[: -len(lake) // 6]
    assert flags_of([[passage + lake, letters, edited], [letters + lake]]) == [False, False, True, False]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("ab日ก .", max_size=40), max_size=4))
def test_flags_do_not_depend_on_the_batch(texts: list[str]) -> None:
    assert repetitive(texts) == [repetitive([text])[0] for text in texts]
    assert copies(texts, texts[::-1], 2) == [copies([a], [b], 2)[0] for a, b in zip(texts, texts[::-1], strict=True)]


def test_irrelevance_is_about_the_seeds_concept() -> None:
    assert not is_irrelevant(fact(0, "red fox"), fact(0, "blue hen"), WORLD)
    assert is_irrelevant(fact(1, "red fox"), fact(0, "red fox"), WORLD)
    assert is_irrelevant("No concept.", fact(0, "red fox"), WORLD)


@pytest.mark.parametrize("known", [True, False])
def test_a_threshold_on_word_sequences_is_a_heuristic_whatever_is_known_of_the_world(known: bool) -> None:
    methods = {(metric, method) for metric, _, method in expected_rows(known, judged=False)}
    heuristics = {(metric, method) for metric, method in methods if method == HEURISTIC}
    assert heuristics >= {("repetition", HEURISTIC), ("pair_copying", HEURISTIC)}
    of_the_world = ("non_factual", "false_statements", "pair_irrelevance", "no_concept")
    told = {(metric, EXACT) for metric in of_the_world} if known else {(metric, JUDGE) for metric in of_the_world[::2]}
    assert methods - heuristics == told | {("duplicates", EXACT)}


def test_table_of_a_shard_and_of_all(tmp_path: Path) -> None:
    true = WORLD.facts[0]["emblem"]
    false = next(value for value in ("red fox", "blue hen") if value != true)
    seed = fact(0, true)
    texts = [fact(0, true) + " " + fact(0, false), fact(1, WORLD.facts[1]["emblem"]), "Nothing at all."]
    synthetic = pl.DataFrame({"text": texts, "seed_text": [seed] * 3})
    rows = rows_of(synthetic, pl.DataFrame({"text": [seed, PLAIN]}), WORLD, tmp_path / "a")
    assert rows.select("metric", "corpus", "method").rows() == expected_rows(True, judged=False)
    assert value_of(rows, "non_factual", SYNTHETIC) == (1 / 3, 3)
    assert value_of(rows, "false_statements", SYNTHETIC) == (1 / 3, 3), "of three statements in three documents"
    assert value_of(rows, "no_concept", SYNTHETIC) == (1 / 3, 3)
    assert value_of(rows, "non_factual", REAL) == (0.0, 2)
    assert value_of(rows, "pair_irrelevance", SYNTHETIC) == (2 / 3, 3)
    assert value_of(rows, "pair_irrelevance", REAL) == value_of(rows, "pair_copying", REAL, HEURISTIC) == (None, 0)

    empty = rows_of(synthetic[:0], pl.DataFrame({"text": [seed]}), WORLD, tmp_path / "b")
    assert value_of(empty, "repetition", SYNTHETIC, HEURISTIC) == (None, 0)
    assert value_of(empty, "false_statements", SYNTHETIC) == (None, 0)

    one_false = rows_of(synthetic[:1], pl.DataFrame({"text": [seed]}), WORLD, tmp_path / "c")
    shards = {"00000": rows.lazy(), "00001": one_false.lazy(), "00002": empty.lazy()}
    copies = {"00000": pl.LazyFrame({"id": ["a", "b"], "text": [PLAIN, PLAIN]})}
    duplicates = duplicates_over_shards({SYNTHETIC: copies, REAL: copies}, 9, Dedup(), tmp_path / "d", "1GB")
    table = quality_over_shards(shards, duplicates, NO_JUDGE, None)
    assert table.select("metric", "corpus", "method").rows() == expected_rows(True, judged=False)
    assert value_of(table, "non_factual", SYNTHETIC) == (2 / 4, 4)
    assert value_of(table, "false_statements", SYNTHETIC) == (2 / 5, 4), "shards weigh by their statements"
    assert value_of(table, "pair_copying", REAL, HEURISTIC) == (None, 0)
    assert value_of(table, "duplicates", SYNTHETIC) == (1 / 2, 2), "not a mean of shards"
    assert "duplicates@2" in table.filter(metric="duplicates")["definition"][0]
    assert table["definition"].null_count() == 0


@pytest.mark.parametrize("judge", [None, "model"])
def test_without_a_truth_only_a_judge_tells(judge: str | None, tmp_path: Path) -> None:
    synthetic = pl.DataFrame({"text": [PLAIN, PLAIN], "seed_text": [PLAIN, BACKWARDS]})
    rows = rows_of(synthetic, synthetic.select("text"), None, tmp_path / "rows")
    assert value_of(rows, "pair_copying", SYNTHETIC, HEURISTIC) == (0.5, 2)
    duplicates = duplicates_over_shards({SYNTHETIC: {}, REAL: {}}, 9, Dedup(), tmp_path, "1GB")
    judged = judged_rows(JUDGEMENTS) if judge else NO_JUDGE
    table = quality_over_shards({"00000": rows.lazy()}, duplicates, judged, judge)
    assert table.select("metric", "corpus", "method").rows() == expected_rows(False, judged=judge is not None)
    assert set(table["metric"]) == set(METRICS) and not set(DETAILS) & set(table["metric"])
    non_factual = table.filter(metric="non_factual", corpus=SYNTHETIC).row(0, named=True)
    if judge:
        assert (non_factual["value"], non_factual["documents"], non_factual["sample"]) == (0.5, 2, 3)
        assert "Judge: model." in non_factual["definition"]
    else:
        assert non_factual["value"] is None and non_factual["documents"] == 0, "absent, not zero"
        assert NEEDS_A_JUDGE in non_factual["definition"]
    assert non_factual["method"] == JUDGE


def test_a_judge_stands_beside_the_truth(tmp_path: Path) -> None:
    text = pl.DataFrame({"text": [fact(0, WORLD.facts[0]["emblem"])], "seed_text": [PLAIN]})
    rows = rows_of(text, text.select("text"), WORLD, tmp_path / "rows")
    duplicates = duplicates_over_shards({SYNTHETIC: {}, REAL: {}}, 9, Dedup(), tmp_path, "1GB")
    table = quality_over_shards({"00000": rows.lazy()}, duplicates, judged_rows(JUDGEMENTS), "model")
    assert table.select("metric", "corpus", "method").rows() == expected_rows(True, judged=True)
    assert value_of(table, "non_factual", SYNTHETIC) == (0, 1)
    assert value_of(table, "non_factual", SYNTHETIC, JUDGE) == (0.5, 2)
    assert [value_of(table, "pair_irrelevance", corpus, JUDGE)[1] for corpus in CORPORA] == [1, 0]


def test_sample_is_fixed_and_drawn_from_all_shards() -> None:
    ids = [str(number) for number in range(100)]
    halves = {"00000": ids[:50], "00001": ids[50:]}
    chosen = fixed_sample(halves, 20)
    assert sum(map(len, chosen.values())) == 20 and all(len(part) > 3 for part in chosen.values())
    assert fixed_sample({"00000": list(reversed(ids[:50])), "00001": iter(ids[50:])}, 20) == chosen
    assert sorted(fixed_sample({"one": ids}, 20)["one"]) == sorted(chosen["00000"] + chosen["00001"])
    more = fixed_sample(halves | {"00002": [str(number) for number in range(100, 110)]}, 20)
    assert len(set(more["00000"]) - set(chosen["00000"])) == 0, "added ids push others out and bring none back"
    assert fixed_sample({"00000": ids[:3], "00001": []}, 20) == {"00000": chosen_all(ids[:3])}


def chosen_all(ids: list[str]) -> list[str]:
    return fixed_sample({"x": ids}, len(ids))["x"]
