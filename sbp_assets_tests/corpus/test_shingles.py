"""The three segmentations, each against its behaviour written out: artifacts depend on every one of them."""

from __future__ import annotations

import re
import unicodedata

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbp_assets.corpus.shingles import (
    UNSPACED,
    jaccard,
    normalise,
    segmented_shingles,
    segmented_words,
    shared,
    whitespace_shingles,
    whitespace_words,
    words_without_punctuation,
)

# Letters of several scripts, punctuation, emoji, an underscore, combining accents and kinds of white space.
CHARACTERS = "aZßİé\u0301日本ก가 \t\n\u00a0\u3000_7'’-.!🦊\u200d"
TEXTS = st.text(st.sampled_from(CHARACTERS), max_size=30) | st.text(max_size=30)


@pytest.mark.parametrize(
    ("text", "segmented", "spaced", "without_punctuation"),
    [
        ("The cat's Hat!", ["the", "cat", "'", "s", "hat", "!"], ["the", "cat's", "hat!"], ["the", "cat", "s", "hat"]),
        ("日本 a日b", ["日", "本", "a", "日", "b"], ["日本", "a日b"], ["日", "本", "a", "日", "b"]),
        ("snake_case ?!", ["snake_case", "?!"], ["snake_case", "?!"], ["snake", "case"]),
        ("Straße", ["strasse"], ["straße"], ["straße"]),
        ("Cafe\u0301", ["café"], ["cafe\u0301"], ["café"]),
        ("🦊🦊 …", ["🦊🦊", "…"], ["🦊🦊", "…"], []),
        (" \n", [], [], []),
    ],
)
def test_the_segmentations_differ_in_punctuation_scripts_and_case(
    text: str, segmented: list[str], spaced: list[str], without_punctuation: list[str]
) -> None:
    assert segmented_words(normalise(text)) == segmented
    assert whitespace_words(text) == spaced
    assert words_without_punctuation(pl.Series([text]))[0].to_list() == without_punctuation


@given(TEXTS)
def test_normalised_text_is_composed_case_folded_and_single_spaced(text: str) -> None:
    assert normalise(text) == " ".join(unicodedata.normalize("NFC", text).casefold().split())


def is_unspaced(character: str) -> bool:
    return re.fullmatch(f"[{UNSPACED}]", character) is not None


def expected_segments(text: str) -> list[str]:
    """One character after another, as the pattern of the segments says it at once."""
    found: list[str] = []
    last = ""
    for character in text:
        if is_unspaced(character):
            kind = "single"
        elif re.fullmatch(r"\w", character):
            kind = "word"
        else:
            kind = "space" if character.isspace() and re.fullmatch(r"\s", character) else "punctuation"
        if kind == last and kind in ("word", "punctuation"):
            found[-1] += character
        elif kind != "space":
            found.append(character)
        last = kind
    return found


@given(TEXTS, st.integers(1, 6))
def test_segmented_shingles_are_runs_of_segments_and_a_short_text_is_one(text: str, words: int) -> None:
    normalised = normalise(text)
    segments = expected_segments(normalised)
    assert segmented_words(normalised) == segments
    runs = {" ".join(segments[start : start + words]) for start in range(len(segments) - words + 1)}
    assert segmented_shingles(normalised, words) == (runs or {" ".join(segments)})


@given(TEXTS, st.integers(1, 6))
def test_whitespace_shingles_are_hashed_runs_of_spaced_words_and_an_empty_text_has_none(text: str, words: int) -> None:
    split = text.lower().split()
    assert whitespace_words(text) == split
    runs = {hash(tuple(split[start : start + words])) for start in range(len(split) - words + 1)}
    assert whitespace_shingles(text, words) == (runs or ({hash(tuple(split))} if split else set()))


@given(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)))
def test_similarities_of_sets(a: set[int], b: set[int]) -> None:
    strings = {str(n) for n in a}, {str(n) for n in b}
    assert jaccard(*strings) == (len(a & b) / len(a | b) if a | b else 1.0)
    assert shared(a, b) == (sum(n in a for n in b) / len(b) if b else 1.0)


def test_shared_shingles_of_pairs() -> None:
    assert len(whitespace_shingles("a b c d", 3)) == 2
    assert whitespace_shingles("A  b\nC", 3) == whitespace_shingles("a b c", 3)
    assert len(whitespace_shingles("a b", 13)) == 1 and whitespace_shingles("  ", 13) == set()
    assert shared(whitespace_shingles("a b c d", 2), whitespace_shingles("c d e", 2)) == 0.5
