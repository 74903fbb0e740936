"""Word segmentation and shingles: the ways in which the stages cut a text into words and compare runs of them.

A shingle is a run of consecutive words. There are three segmentations, because the artifacts of each user
depend on its own:

| segmentation | words | case and Unicode | used by |
|---|---|---|---|
| `segmented_words` | runs of letters, single characters of unspaced scripts, runs of punctuation | of `normalise` (NFC, case folded) | corpus de-duplication, duplicates of the quality metrics |
| `words_without_punctuation` | the same without punctuation, `_` included | NFC, lower case | contamination of the evaluation sets |
| `whitespace_words` | what white space separates, punctuation included | lower case | near-copies among pairs, repetition and pair copying of the quality metrics |
"""  # noqa: E501 (a table)

from __future__ import annotations

import re
import unicodedata

import polars as pl

# Scripts without spaces between words count each character as a word.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
# Punctuation and emoji are words too, so that a document of nothing else has shingles.
_SEGMENT = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]+")
_WITHOUT_PUNCTUATION = rf"[{UNSPACED}]|[^\W_{UNSPACED}]+"


def normalise(text: str) -> str:
    """Return `text` as duplicates are judged: composed (NFC), case folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def segmented_words(normalised: str) -> list[str]:
    """Return the words of a text that `normalise` returned, punctuation included, unspaced scripts by character."""
    return _SEGMENT.findall(normalised)


def whitespace_words(text: str) -> list[str]:
    """Return what white space separates in `text`, in lower case."""
    return text.lower().split()


def words_without_punctuation(texts: pl.Series) -> pl.Series:
    """Return a series of lists: the words of each text, composed (NFC) and in lower case, without punctuation."""
    return texts.str.normalize("NFC").str.to_lowercase().str.extract_all(_WITHOUT_PUNCTUATION)


def segmented_shingles(normalised: str, words: int) -> set[str]:
    """Return the runs of `words` segmented words, joined by spaces.

    A shorter text is one shingle, and so is an empty one: the empty string.
    """
    tokens = segmented_words(normalised)
    return {" ".join(tokens[i : i + words]) for i in range(max(len(tokens) - words + 1, 1))}


def whitespace_shingles(text: str, words: int) -> set[int]:
    """Return hashes of the runs of `words` white-space words, which only this process can compare.

    A shorter text is one shingle; an empty one has none.
    """
    split = whitespace_words(text)
    if not split:
        return set()
    words = min(words, len(split))
    return {hash(run) for run in zip(*(split[i:] for i in range(words)), strict=False)}


def jaccard(a: set[str], b: set[str]) -> float:
    """Return the share of all different shingles that both sets hold, from 0 to 1; 1 for two empty sets."""
    return len(a & b) / len(a | b) if a or b else 1.0


def shared(d1: set[int], d2: set[int]) -> float:
    """Return the share of d2's shingles that occur in d1, from 0 to 1.

    It is 1 for a d2 without words, which adds nothing to d1.
    """
    return len(d1 & d2) / len(d2) if d2 else 1.0
