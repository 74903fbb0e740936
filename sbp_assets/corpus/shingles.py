r"""Words and shingles: the one way in which every stage cuts texts into words and compares runs of them.

Texts are compared in the form of `normalise`. Its words are, whatever the language:

- a run of letters, marks and digits, where the script puts spaces (or, as Tibetan, signs) between words;
- in a script that does not (UNSPACED), each letter with the marks that belong to it (for Thai, Khmer or Japanese text,
  about a grapheme cluster of Unicode's annex 29), for finding words there needs a dictionary per language;
- an emoji with its modifiers;
- a run of symbols that stand for something, so that `a + b` is not `a * b`: those that Unicode calls symbols
  (mathematics, currencies, `|`, `~`, `^`, arrows, degrees; not the quote `` ` ``) and `* / \ % # & @`, with
  hyphens-minus among them (`->`, `-=`). More than three of them between two words are a rule, the frame of a table or a
  drawing, and none of them counts.

Two of these characters are something else more often, and count with exceptions:

- asterisks where words begin or end are emphasis and no word (`*word*`); `a*b`, `a * b` and `a *= b` have theirs;
- a hyphen-minus is a hyphen or a dash and no word (`well-known`, `2024-01-02`, `3 - 4`, which differs from `3 + 4` all
  the same), but a sign and a word at the beginning of a text or after a space, opening bracket or comma, if a letter or
  digit follows (`-5`, which is U+2212 and 5).

Other punctuation, `_` included, separates words and is none. Only in a text of nothing else is each run of it a word,
so that two such texts can be told apart.

A run of n words is to be as much text in every script, so each word has a length, in UNITS_PER_WORD-ths: 2 units are a
Chinese character, 1 is a letter of another unspaced script, and 3 are any other word. So 13 words are 20 Chinese
characters or 39 Thai letters, and mixed text needs no rule of its own. The lengths are rounded from translations of one
software's messages (`benchmarks.word_lengths`): for an English word 1.5 characters of Chinese, 2.6 of Japanese (a fifth
of them Chinese), 3.2 letters of Thai, 2.5 of Khmer and 2.2 of Burmese. Languages with spaces have 0.7 (Tamil, Korean)
to 1.2 (French) words for an English one, and are taken as they are.

A shingle is a shortest run of words, from one of them on, that is n words long or more. A text shorter than that is one
shingle, and so is an empty one. Shingles are 64-bit hashes: any two different ones of 10**9 are taken for equal with a
probability of 3%.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np
import polars as pl

UNITS_PER_WORD = 3
# One-byte slots per known hash, at least: a sixteenth or less of all other hashes is searched for.
_SLOTS = 16
_BATCH, _CHARACTERS = 512, 4_000_000  # Texts that are cut at a time, and their characters once normalised.
# Those that Unicode's line breaking (annex 14) breaks without spaces: classes ID, CJ, SA and AK.
LOGOGRAPHIC = ("Han", "Khitan_Small_Script", "Tangut")
_TAI = ("Ahom", "Lao", "New_Tai_Lue", "Tai_Le", "Tai_Tham", "Tai_Viet", "Thai")
SYLLABIC = ("Bopomofo", "Hiragana", "Katakana", "Nushu", "Yi", "Balinese", "Javanese", "Khmer", "Myanmar", *_TAI)
UNSPACED = (*LOGOGRAPHIC, *SYLLABIC)
"""Scripts that put no space between words."""


def _letters(scripts: Sequence[str]) -> str:
    # By script extensions, which give Japanese its long vowels and repetition marks. Digits are not letters.
    classes = "".join(rf"\p{{scx={script}}}" for script in scripts)
    return rf"[[{classes}]&&[\p{{L}}\p{{Nl}}]]"


# What binds the next consonant into the same syllable: Myanmar, Khmer, Tai Tham, Balinese, Javanese.
_STACKERS = r"[\u{1039}\u{17d2}\u{1a60}\u{1b44}\u{a9c0}]"
_LETTER = _letters(UNSPACED)
_EMOJI = r"\p{Extended_Pictographic}\p{Regional_Indicator}"
_SYMBOL = rf"[[\p{{S}}*/\\%٪‰\#&@]--[`{_EMOJI}\p{{Emoji_Modifier}}]]"
_WORD = (
    rf"{_LETTER}(?:{_STACKERS}\p{{M}}*{_LETTER}|\p{{M}})*"
    rf"|[[\p{{L}}\p{{M}}\p{{N}}]--{_LETTER}]+"
    r"|\p{Regional_Indicator}{1,2}|\p{Extended_Pictographic}[\p{Emoji_Modifier}\p{M}]*"
    rf"|-?{_SYMBOL}[{_SYMBOL}-]*"
)
_DRAWING = rf"{_SYMBOL}(?:[^\p{{L}}\p{{M}}\p{{N}}{_EMOJI}]*{_SYMBOL}){{3,}}"
# By Python's expressions: those of polars have no look-behind, and take 25 times as long with \b in text that is not
# ASCII. Each begins with the one character that it looks for, which is found fast.
_SIGN = re.compile(r"-(?:(?<=^-)|(?<=[ (\[{,]-))(?=\w)")
_EMPHASIS = re.compile(
    r"""\*(?:(?<=^\*)|(?<=[ (\[{"']\*))\**(?=\w)"""
    r"""|\*(?<=[^ (\[{*/%٪‰\\#&@|~^<>=+-]\*)\**(?=[ ,.;:!?)\]}"'。、，；：！？）]|$)"""
)
# Unicode's Default_Ignorable_Code_Point: what shows nothing, such as the joiners in emoji, soft hyphens, variation
# selectors and the zero-width spaces that some Khmer and Thai text has between words, and its copy has not.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)
MARKS = 30
_MADE_MARKS = "\u0f73\u0f75\u0f81\uff9e\uff9f"  # Of no combining class themselves, but made marks by NFKC.
# Where a run of more than MARKS marks may be: only the last two of those are no \W.
_MAYBE_MARKS = re.compile(rf"[\W\uff9e\uff9f]{{{MARKS + 1},}}")


def normalise(text: str) -> str:
    """Return `text` as texts are compared: without case, forms of characters, invisible characters, and with one space.

    Forms are those that Unicode calls compatible (NFKC): full and half width, ligatures, composed or not. Of a run of
    marks the first MARKS count, as many as Unicode's stream-safe format has (annex 15): no language writes more than a
    few, and putting n of them into order takes n**2 steps.
    """
    if text.isascii():
        return " ".join(text.lower().split())
    text = _INVISIBLE.sub("", text)
    # A longer run has one of these characters; looking at all takes as long as all of the rest.
    if any(unicodedata.combining(character) or character in _MADE_MARKS for character in text[:: MARKS + 1]):
        text = _MAYBE_MARKS.sub(_first_marks, text)
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _first_marks(found: re.Match[str]) -> str:
    kept, run = [], 0
    for character in found[0]:
        parts = unicodedata.normalize("NFKD", character)
        run = run + len(parts) if unicodedata.combining(parts[0]) else 0
        if run <= MARKS:
            kept.append(character)
    return "".join(kept)


def segment(normalised: Iterable[str]) -> pl.Series:
    """Return a series of lists: the words of each of some texts that `normalise` returned."""
    texts = pl.Series(normalised, dtype=pl.String)
    told = pl.Series(map(_told, texts), dtype=pl.String)
    words = told.str.replace_all(_DRAWING, " ").str.extract_all(_WORD)
    wordless = words.list.len() == 0
    if not wordless.any():
        return words
    return pl.select(pl.when(wordless).then(texts.str.extract_all(r"\S+")).otherwise(words)).to_series()


def _unless_after_symbol(found: re.Match[str]) -> str:
    before = found.string[max(found.start() - 1, 0)]
    return found[0] if unicodedata.category(before).startswith("S") else " "


def _told(text: str) -> str:
    """Return `text` with minus signs (U+2212) for the hyphens that are signs, and without the asterisks of emphasis."""
    if "-" in text:
        text = _SIGN.sub("\u2212", text)
    if "*" in text:
        text = _EMPHASIS.sub(_unless_after_symbol, text)
    return text


@dataclass(frozen=True)
class Words:
    """The words of some texts, one text after another, and the hashes of runs of them.

    `hashes` (uint64) and `units` (lengths, uint8) have a value per word, `lengths` (int64) the words of each text.
    """

    hashes: np.ndarray
    units: np.ndarray
    lengths: np.ndarray

    # Odd, so that it has an inverse modulo 2**64 (Knuth's MMIX multiplier).
    _BASE = 6364136223846793005

    @classmethod
    def of(cls, segmented: pl.Series) -> Words:
        """Return the words of the lists that `segment` returned."""
        flat = segmented.explode(empty_as_null=False, keep_nulls=False)
        different = flat.unique()
        # Not polars' own hash, which may change with its version: what is made of these hashes is stored.
        digests = b"".join(blake2b(word.encode(), digest_size=8).digest() for word in different)
        logograms, letters = (different.str.contains(f"^{_letters(scripts)}") for scripts in (LOGOGRAPHIC, SYLLABIC))
        units = np.select([logograms, letters], [2, 1], UNITS_PER_WORD).astype(np.uint8)
        codes = flat.cast(pl.Enum(different)).to_physical().to_numpy()
        lengths = segmented.list.len().to_numpy().astype(np.int64)
        return cls(np.frombuffer(digests, np.dtype("<u8"))[codes], units[codes], lengths)

    def text_of(self, places: np.ndarray) -> np.ndarray:
        """Return the numbers of the texts that the words at `places` are of, (places,)."""
        return np.searchsorted(self.starts, places, side="right") - 1

    @cached_property
    def starts(self) -> np.ndarray:
        """Place of each text's first word, and the number of all words at the end, (texts + 1,)."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])

    @cached_property
    def reach(self) -> np.ndarray:
        """Units before each word, and those of all words at the end, (words + 1,)."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.units, dtype=np.int64)])

    @property
    def totals(self) -> np.ndarray:
        """Units of each text, (texts,)."""
        return np.diff(self.reach[self.starts])

    def runs(self, units: int) -> tuple[np.ndarray, np.ndarray]:
        """Return place and end, (runs,) each, of each text's shortest runs that are `units` long or more."""
        last = np.repeat(self.reach[self.starts[1:]], self.lengths)  # Units at the end of the word's text.
        places = np.flatnonzero(self.reach[:-1] + units <= last)
        return places, np.searchsorted(self.reach, self.reach[places] + units)

    def hash(self, places: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Return the uint64 hashes, (runs,), of the runs from words `places` up to and without words `ends`."""
        sums, inverses = self._polynomials
        return (sums[ends] - sums[places]) * inverses[places]

    @cached_property
    def _polynomials(self) -> tuple[np.ndarray, np.ndarray]:
        # uint64 arithmetic wraps around on purpose: polynomial hashes modulo 2**64 (Karp and Rabin, 1987).
        powers, inverses = (
            np.cumprod(np.full(len(self.hashes) + 1, base, np.uint64), dtype=np.uint64)
            for base in (self._BASE, pow(self._BASE, -1, 2**64))
        )
        return np.concatenate([np.zeros(1, np.uint64), np.cumsum(self.hashes * powers[:-1], dtype=np.uint64)]), inverses

    def shingles(self, words: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shingles of every text, (shingles,), and where those of each begin and the last end, (texts + 1,).

        They stand in the order of the texts, and repeat where the text repeats itself.
        """
        places, ends = self.runs(UNITS_PER_WORD * words)
        counts = np.bincount(self.text_of(places), minlength=len(self.lengths))
        short = counts == 0
        counts[short] = 1
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        found = np.empty(bounds[-1], np.uint64)
        whole = np.zeros(bounds[-1], bool)
        whole[bounds[:-1][short]] = True
        found[whole] = self.hash(self.starts[:-1][short], self.starts[1:][short])
        found[~whole] = self.hash(places, ends)
        return found, bounds


class KnownHashes:
    """A set of 64-bit hashes, and which of many others are in it."""

    def __init__(self, hashes: np.ndarray) -> None:
        self.hashes = np.unique(hashes)
        # Which hashes may be known, by their highest bits: a look-up that spares most of the searches.
        self._shift = np.uint64(64 - max(_SLOTS * len(self.hashes), 2).bit_length())
        self._maybe = np.zeros(1 << (64 - int(self._shift)), dtype=bool)
        self._maybe[self.hashes >> self._shift] = True

    def places(self, hashes: np.ndarray) -> np.ndarray:
        """Return where in `hashes` known ones stand."""
        maybe = np.flatnonzero(self._maybe[hashes >> self._shift])
        if not len(maybe):
            return maybe
        found = hashes[maybe]
        return maybe[self.hashes[np.minimum(np.searchsorted(self.hashes, found), len(self.hashes) - 1)] == found]


@dataclass(frozen=True)
class Text:
    """One text as it is compared with another one: its words, and its different shingles in rising order (uint64)."""

    words: Words
    shingles: np.ndarray
    whole: bool
    """Whether the text is shorter than a shingle, and so its only one."""

    @property
    def units(self) -> int:
        """Length of the text."""
        return int(self.words.reach[-1])


def shingled(texts: Iterable[str], words: int) -> Iterator[Text]:
    """Yield each of `texts` with its shingles of so many words; memory is that of a batch (`batched`)."""
    for batch in batched(texts):
        cut = Words.of(segment(batch))
        shingles, bounds = cut.shingles(words)
        short = cut.totals < UNITS_PER_WORD * words
        for number, whole in enumerate(short.tolist()):
            first, end = cut.starts[number : number + 2]
            yield Text(
                Words(cut.hashes[first:end], cut.units[first:end], cut.lengths[number : number + 1]),
                np.unique(shingles[bounds[number] : bounds[number + 1]]),
                whole,
            )


def batched(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield the texts normalised, in lists of _BATCH texts and _CHARACTERS at most, or of one text.

    So their words fit into memory: one takes about 60 bytes while its text is compared.
    """
    batch: list[str] = []
    characters = 0
    for text in map(normalise, texts):
        if batch and (len(batch) == _BATCH or characters + len(text) > _CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
    if batch:
        yield batch


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Return the share of all different shingles of two texts that both have, from 0 to 1 (of `Text.shingles`)."""
    both = _common(a, b)
    return both / (len(a) + len(b) - both)


def shared(d1: Text, d2: Text) -> float:
    """Return the share of d2's shingles that occur in d1, from 0 to 1.

    Where one of the two is shorter than a shingle, shingles are as long as the shorter one. A d2 without words adds
    nothing to d1, and the share is 1; else it is 0 of a d1 without words.
    """
    if not (d1.whole or d2.whole):
        return _common(d1.shingles, d2.shingles) / len(d2.shingles)
    units = min(d1.units, d2.units)
    if not units:
        return float(not d2.units)
    first, second = (np.unique(text.words.hash(*text.words.runs(units))) for text in (d1, d2))
    return _common(first, second) / len(second)


def overlap(d1: Text, d2: Text) -> float:
    """Return the share of d2's shingles that occur in d1, from 0 to 1, as near-copies are told.

    Where one of the two is shorter than a shingle, it is 1 if the shorter one stands in the other as a whole, else 0.
    """
    if d1.whole or d2.whole:
        shorter, longer = sorted((d1, d2), key=lambda text: text.units)
        return shared(longer, shorter)
    return shared(d1, d2)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many values two arrays of different values in rising order have in common; neither is empty."""
    places = np.searchsorted(a, b)
    return int(np.count_nonzero(a[np.minimum(places, len(a) - 1)] == b))
