"""What synthetic documents share with all of D, on texts whose answers are known, and against a search of all runs."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbp_assets.corpus.shingles import Words, normalise, segment
from sbp_assets.synthesis.novelty import (
    HELDOUT,
    NOVELTY_SCHEMA,
    SEED,
    CorpusComparison,
    LongestRuns,
    copying_problems,
    expected_rows,
    novelty_table,
    partner_similarities,
    subject_problems,
    table_problems,
)
from sbp_assets.synthesis.quality import SYNTHETIC
from sbp_assets_tests.twins import TWINS, extract

TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=12).map(" ".join), max_size=6)
D = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"


def words_of(texts: list[str]) -> Words:
    return Words.of(segment(map(normalise, texts)))


def table(
    written: list[str], real: list[str], corpus: list[str], copy_words: int = 3, **vectors: object
) -> pl.DataFrame:
    none = partner_similarities(*np.zeros((3, 0, 1)), 0.7)
    return novelty_table(written, real, [corpus], copy_words, vectors or none)  # type: ignore[arg-type]


def value(rows: pl.DataFrame, measure: str, corpus: str = SYNTHETIC, words: int | None = None) -> float:
    found = rows.filter(pl.col("words").eq_missing(words), measure=measure, corpus=corpus)
    return found["mean"].item()  # type: ignore[no-any-return]


@settings(max_examples=60, deadline=None)
@given(TEXTS, TEXTS, st.integers(1, 3))
def test_longest_runs_are_those_of_a_search_of_all_runs(texts: list[str], corpus: list[str], at_a_time: int) -> None:
    longest = LongestRuns(words_of(texts))
    for start in range(0, len(corpus), at_a_time):
        longest.feed(words_of(corpus[start : start + at_a_time]))
    expected = [
        max(
            (
                stop - start
                for start in range(len(text.split()))
                for stop in range(start + 1, len(text.split()) + 1)
                if any(f" {' '.join(text.split()[start:stop])} " in f" {other} " for other in corpus)
            ),
            default=0,
        )
        for text in texts
    ]
    assert longest.words.tolist() == expected


def test_a_copied_document_of_any_length_is_found_whole() -> None:
    long = " ".join(str(number) for number in range(5000))
    longest = LongestRuns(words_of([long, f"{D} new {D}", "new", ""]))
    longest.feed(words_of(["nothing of it"]))
    longest.feed(words_of([f"before {long} after", D]))
    assert longest.words.tolist() == [5000, 17, 0, 0]


@settings(max_examples=60, deadline=None)
@given(TEXTS, TEXTS, st.integers(1, 4))
def test_ngrams_are_those_of_a_search_of_all(texts: list[str], corpus: list[str], size: int) -> None:
    comparison = CorpusComparison(texts, [size])
    comparison.feed(corpus)
    grams = [
        [" ".join(text.split()[start : start + size]) for start in range(len(text.split()) - size + 1)]
        for text in texts
    ]
    held = [[any(f" {gram} " in f" {other} " for other in corpus) for gram in of_text] for of_text in grams]
    assert comparison.novel(size, np.ones(len(texts), bool)).tolist() == [not one for row in held for one in row]
    for text, row, share in zip(texts, held, comparison.copied(size), strict=True):
        whole = bool(text) and any(f" {text} " in f" {other} " for other in corpus)
        assert share == pytest.approx(np.mean(row) if row else float(whole))


def test_copying_is_from_any_document_of_d_and_held_out_documents_are_the_reference() -> None:
    other = " ".join(reversed(D.split()))
    rows = table([D, f"{other} {other}", "alpha beta gamma delta", "one two"], ["one two three omega"], [D, other])
    assert table_problems(rows, 3) == []
    assert rows.select("measure", "words", "corpus").rows() == expected_rows(3)
    assert value(rows, "copied_ngrams", words=3) == pytest.approx((1 + 30 / 32 + 0 + 1) / 4)
    assert value(rows, "mostly_copied", words=3) == 3 / 4 and value(rows, "mostly_copied", HELDOUT, 3) == 0
    assert value(rows, "copied_ngrams", HELDOUT, 3) == 1 / 2
    assert value(rows, "novel_ngrams", words=1) == pytest.approx(4 / (17 + 34 + 4 + 2))
    assert value(rows, "longest_copy") == (17 + 17 + 0 + 2) / 4
    assert rows.filter(measure="longest_copy", corpus=SYNTHETIC)["maximum"].item() == 17
    assert value(rows, "longest_copy_share", HELDOUT) == 3 / 4
    assert value(rows, "length") == (17 + 34 + 4 + 2) / 4
    [problem] = copying_problems(rows)
    assert "75.0%" in problem and not copying_problems(table(["omega"], ["omega"], [D]))


@pytest.mark.parametrize("language", TWINS)
def test_copying_is_found_in_every_language(language: str) -> None:
    passage, lake, letters = TWINS[language]
    rows = table([passage + lake, letters], [lake], [passage], 13)
    copied = rows.filter(measure="copied_ngrams", corpus=SYNTHETIC)
    assert copied["maximum"].item() > 0.3 and value(rows, "copied_ngrams", HELDOUT, 13) == 0
    whole = table([extract(passage, 5)], [lake], [passage], 13)
    assert value(whole, "longest_copy_share") == 1


def test_no_documents_give_no_values() -> None:
    rows = table([], [], [D])
    assert rows.schema == pl.Schema(NOVELTY_SCHEMA) and rows["mean"].null_count() == len(rows)
    assert table_problems(rows, 3) == [] and copying_problems(rows) == subject_problems(rows) == []


def test_a_partner_is_the_held_out_document_nearest_to_the_seed() -> None:
    heldout = np.eye(50)
    seeds = np.vstack([heldout[:40], np.full((1, 50), 50**-0.5)])
    related = partner_similarities(seeds, seeds, heldout, 0.9)
    assert len(related["partner_similarity", SYNTHETIC]) == 40, "the last seed has no partner that is similar enough"
    assert related["partner_similarity", SYNTHETIC].mean() == related["partner_similarity", SEED].mean() == 1
    assert related["random_similarity", SYNTHETIC].mean() < 0.2
    rows = table(["x"], ["y"], [D], **{})
    assert subject_problems(rows) == []
    near = novelty_table(["x"], ["y"], [[D]], 3, related)
    assert subject_problems(near) == [] and value(near, "nearer_to_partner") > 0.9
    unrelated = partner_similarities(heldout[-41:], seeds, heldout, 0.9)
    [problem] = subject_problems(novelty_table(["x"], ["y"], [[D]], 3, unrelated))
    assert "chance is 50%" in problem


@pytest.mark.parametrize(
    "broken",
    [{"mean": 1.5}, {"median": -1.0}, {"documents": 0}, {"corpus": "real"}],
)
def test_a_wrong_row_is_a_problem(broken: dict[str, object]) -> None:
    rows = table([D], [D], [D])
    wrong = pl.when((pl.col("measure") == "copied_ngrams") & (pl.col("corpus") == SYNTHETIC))
    changed = rows.with_columns(
        wrong.then(pl.lit(value)).otherwise(name).cast(NOVELTY_SCHEMA[name]).alias(name)
        for name, value in broken.items()
    )
    assert len(table_problems(changed, 3)) == 1
