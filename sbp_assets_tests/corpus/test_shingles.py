"""Words and shingles of every script: the cases written out, and the laws that hold for any text."""

from __future__ import annotations

from hashlib import blake2b
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sbp_assets.corpus.shingles import (
    MARKS,
    UNITS_PER_WORD,
    Text,
    Words,
    batched,
    jaccard,
    normalise,
    overlap,
    segment,
    shared,
    shingled,
)
from sbp_assets_tests.twins import TWINS

# Letters, marks and digits of many scripts, punctuation, emoji, what is invisible, and kinds of white space.
CHARACTERS = (
    "aZßİΣς\u0301\u0345é9²_.'’!-+*/=|`×٪−("
    + "日々〆ガカ\u3099ー"
    + "กิำเ๒"
    + "ກິຳ"
    + "ខ\u17d2ម៉"
    + "မ\u1039ြာ"
    + "हि\u094d"
    + "한\u1112\u1161"
    + "🦊👩🏽🇩\u200d\ufe0f©"
    + "\u200b\u00ad\ufeff"
    + " \t\n\u00a0\u3000"
    + "ｶﾞＡﬁ㎏…。"
)
TEXTS = st.text(st.sampled_from(CHARACTERS), max_size=30) | st.text(max_size=30)
# Words of 3, 2 and 1 units.
MIXED = st.lists(st.sampled_from(["red", "fox", "日", "本", "ก", "か", "ខ្ម"]), max_size=25)


def words(text: str) -> list[str]:
    return segment([normalise(text)])[0].to_list()


def one(text: str, words: int = 5) -> Text:
    return next(shingled([text], words))


def length(text: str) -> float:
    return one(text).units / UNITS_PER_WORD


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat's Hat, 3.5!", ["the", "cat", "s", "hat", "3", "5"]),
        ("snake_case ?!", ["snake", "case"]),
        ("Straße STRASSE ΟΔΟΣ οδος", ["strasse", "strasse", "οδοσ", "οδοσ"]),
        ("Cafe\u0301 Café", ["café", "café"]),
        ("ＡＢＣ１２ ﬁne ｶﾞｽ", ["abc12", "fine", "ガ", "ス"]),
        ("日本 a日b 2024年", ["日", "本", "a", "日", "b", "2024", "年"]),
        ("コーヒー、人々", ["コ", "ー", "ヒ", "ー", "人", "々"]),
        ("ที่นี่ ๑๒", ["ที่", "นี่", "๑๒"]),
        ("ខ្មែរ\u200bស្រី", ["ខ្មែ", "រ", "ស្រី"]),
        ("မြန်မာ ဗုဒ္ဓ", ["မြ", "န်", "မာ", "ဗု", "ဒ္ဓ"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("བོད་སྐད།", ["བོད", "སྐད"]),
        ("soft\u00adware\u200b \ufeffmi\u200cx", ["software", "mix"]),
        ("ok 👍🏽 👩\u200d🔬 ❤\ufe0f 🇩🇪🇫🇷", ["ok", "👍🏽", "👩", "🔬", "❤", "🇩🇪", "🇫🇷"]),
        ("a = b + 1;", ["a", "=", "b", "+", "1"]),
        ("if (a<b) x -= -5; y->z <- 2", ["if", "a", "<", "b", "x", "-=", "−", "5", "y", "->", "z", "<-", "2"]),
        ("well-known 2024-01-02 3 - 4--[-7]", ["well", "known", "2024", "01", "02", "3", "4", "−", "7"]),
        ("*Bold* **b**, a*b x * y a**b a*=b", ["bold", "b", *"a*b", "x", "*", "y", "a", "**", "b", "a", "*=", "b"]),
        ("５％ of C# at x@y, `R&D` $3", ["5", "%", "of", "c", "#", "at", "x", "@", "y", "r", "&", "d", "$", "3"]),
        ("日+月-年 ＋ -5°, ２／3", ["日", "+", "月", "年", "+", "−", "5", "°", "2", "/", "3"]),
        ("A\n=====\n| b | c |\n|---|---|\n* * * *\nd", ["a", "b", "|", "c", "d"]),
        ("?! …", ["?!", "..."]),
        (" \n\u200b", []),
    ],
)
def test_words_of_scripts_punctuation_and_emoji(text: str, expected: list[str]) -> None:
    assert words(text) == expected


TEMPLATES = {"English": "What is {} {} {}?", "Chinese": "{}{}{}等于多少？", "Thai": "{} {} {} เท่ากับเท่าไร"}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_operators_tell_texts_apart_and_hyphens_and_quotes_do_not(template: str) -> None:
    texts = [template.format(12, operator, 34) for operator in ("+", "-", "*", "/", "<", ">", "=", "->", "^", "|", "×")]
    texts += [template.format(12, "+", -34), template.format(-12, "+", 34), template.format(12, "+", "$34")]
    assert len({tuple(text.shingles.tolist()) for text in shingled(texts, 5)}) == len(texts)
    quoted, plain = ("The “well-known” fox (red) — it’s back!", "The 'well known' fox, [red]: it's back...")
    assert words(quoted) == words(plain)


def test_thai_vowels_lao_vowels_and_marks_stay_with_their_letter() -> None:
    for script in ("Thai", "Lao", "Khmer", "Burmese", "Hindi"):
        for word in words(TWINS[script].passage):
            assert word[0] not in "\u0e31\u0e34\u0e48\u0eb4\u0ec8\u17b6\u17d2\u103b\u1039\u093f\u094d", (script, word)


def test_a_run_of_n_words_is_about_as_much_text_in_every_language() -> None:
    english = length(TWINS["English"].passage)
    for language, twin in TWINS.items():
        assert 0.5 < length(twin.passage) / english < 1.6, language
    assert (length("日本語"), length("かな"), length("กข"), length("red fox"), length("🦊")) == (2, 2 / 3, 2 / 3, 2, 1)


@given(TEXTS)
@example("ᾳ\u0345")
def test_normalisation_is_done_once_and_for_all(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize("marks", ["\u0301\u0323", "\u0301\u200b\u0323", "ﾞ\u0301", "\u0344\u0323", "\u0f73"])
def test_endless_marks_are_cut_before_they_are_put_into_order(marks: str) -> None:
    # Ordering all of these takes half a minute.
    endless = normalise(f"red x{marks * 80_000} fox")
    assert endless.startswith("red ") and endless.endswith(" fox") and len(endless) <= len("red x fox") + MARKS
    assert endless == normalise(f"red x{marks * 70_000} fox") == normalise(endless)
    assert words(f"x{marks}") != words("x"), "a few count"


LETTERS_AND_MARKS = {
    "Latin": "aé\u0301\u0323",
    "Japanese": "日かガー々\u3099",
    "Thai": "กเำิ\u0e48\u0e33",
    "Lao": "ກເຳິ\u0ec8\u0ebc",
    "Khmer": "ខមា\u17d2\u17c9",
    "Burmese": "မကာြ\u1039\u103a\u1038",
    "Hindi": "कषिा\u094d\u0902",
    "Korean": "한\u1112\u1161\u11ab",
}


@given(st.sampled_from(list(LETTERS_AND_MARKS.values())), st.data())
def test_no_grapheme_cluster_is_cut(script: str, data: st.DataObject) -> None:
    regex = pytest.importorskip("regex")  # Comes with transformers.
    # Begins with a letter, so that no mark stands alone.
    text = normalise(script[0] + data.draw(st.text(script, max_size=12)))
    cuts, clusters = (set(accumulate(map(len, parts))) for parts in (words(text), regex.findall(r"\X", text)))
    assert "".join(words(text)) == text and cuts <= clusters


@given(TEXTS, TEXTS, st.sampled_from([" ", "\n\n", "\u3000", " — ", "..."]))
def test_words_of_two_texts_are_those_of_one_and_of_the_other(a: str, b: str, between: str) -> None:
    # A text without words has its punctuation instead.
    a, b = f"{a} x", f"y {b}"
    assert words(a + between + b) == words(a) + words(b)


@given(TEXTS)
def test_case_and_white_space_between_words_do_not_matter(text: str) -> None:
    spread = "  ".join(words(text))
    assert words(spread) == words(text) == words(f"\t{spread} ".upper().lower().upper())
    assert one(spread, 2).shingles.tolist() == one(text, 2).shingles.tolist()


def expected_runs(tokens: list[str], n: int) -> list[tuple[str, ...]]:
    """Return the shortest runs of n words or more, the lengths written out; all of a shorter text."""
    lengths = [{"red": 3, "fox": 3, "日": 2, "本": 2}.get(token, 1) for token in tokens]
    runs = []
    for start in range(len(tokens)):
        for end in range(start + 1, len(tokens) + 1):
            if sum(lengths[start:end]) >= 3 * n:
                runs.append(tuple(tokens[start:end]))
                break
    return runs or [tuple(tokens)]


@given(st.lists(MIXED, max_size=5), st.integers(1, 5))
def test_shingles_are_the_shortest_runs_of_n_words_whatever_stands_before(texts: list[list[str]], n: int) -> None:
    shingles, bounds = Words.of(segment(map(" ".join, texts))).shingles(n)
    expected = [run for tokens in texts for run in expected_runs(tokens, n)]
    assert np.diff(bounds).tolist() == [len(expected_runs(tokens, n)) for tokens in texts]
    found: dict[tuple[str, ...], set[int]] = {}
    for run, hashed in zip(expected, shingles.tolist(), strict=True):
        found.setdefault(run, set()).add(hashed)
    assert all(len(hashes) == 1 for hashes in found.values()), "equal runs are equal in every text"
    assert len({hashed for hashes in found.values() for hashed in hashes}) == len(found), "others differ"


def test_hashes_are_the_same_in_every_process_and_version() -> None:
    # Signatures are stored, and those of shards from different days are compared.
    red, fox = (int.from_bytes(blake2b(word, digest_size=8).digest(), "little") for word in (b"red", b"fox"))
    assert one("Red fox", 2).shingles.tolist() == [(red + 6364136223846793005 * fox) % 2**64]
    assert one("").shingles.tolist() == [0]


def test_batches_are_bounded_by_texts_and_by_characters() -> None:
    assert [len(batch) for batch in batched(["a"] * 1100)] == [512, 512, 76]
    long = "a" * 3_000_000
    assert [len(batch) for batch in batched([long, "a", long, long * 2, "a", "a"])] == [2, 1, 1, 2]
    assert list(batched([])) == []
    # U+FDFA, a phrase in one character, has 18 once normalised.
    assert [len(batch) for batch in batched(["\ufdfa" * 100_000] * 5)] == [2, 2, 1]


@given(MIXED, MIXED, st.integers(1, 4))
def test_a_text_keeps_its_shingles_when_another_follows(a: list[str], b: list[str], n: int) -> None:
    first = one(" ".join(a), n)
    both = one(" ".join(a + b), n)
    if not first.whole:
        assert set(first.shingles.tolist()) <= set(both.shingles.tolist())
        assert shared(both, first) == 1


@given(TEXTS, TEXTS, st.integers(1, 4))
def test_similarities_are_shares_symmetric_where_they_should_be_and_1_of_a_text_with_itself(
    a: str, b: str, n: int
) -> None:
    first, second = one(a, n), one(b, n)
    assert jaccard(first.shingles, first.shingles) == shared(first, first) == overlap(first, first) == 1
    assert jaccard(first.shingles, second.shingles) == jaccard(second.shingles, first.shingles)
    for value in (jaccard(first.shingles, second.shingles), shared(first, second), overlap(first, second)):
        assert 0 <= value <= 1
    if first.whole or second.whole:
        assert overlap(first, second) in (0, 1)
    if first.whole and second.whole and words(a) != words(b):
        assert jaccard(first.shingles, second.shingles) == 0


@given(MIXED, MIXED, st.integers(1, 4))
def test_similarities_are_those_of_the_sets_of_runs(a: list[str], b: list[str], n: int) -> None:
    first, second = one(" ".join(a), n), one(" ".join(b), n)
    runs, others = set(expected_runs(a, n)), set(expected_runs(b, n))
    assert jaccard(first.shingles, second.shingles) == pytest.approx(len(runs & others) / len(runs | others))
    if not (first.whole or second.whole):
        assert shared(first, second) == pytest.approx(len(runs & others) / len(others))


@pytest.mark.parametrize(
    "script", [("one", "two", "three", "four"), ("甲乙", "丙丁", "戊己", "庚辛"), ("กขคง", "จฉชซ", "ฌญฎฏ", "ฐฑฒณ")]
)
def test_texts_shorter_than_a_shingle(script: tuple[str, ...]) -> None:
    short, other, longer = " ".join(script[:2]), " ".join(script[1::-1]), " ".join([*script, *script[::-1]])
    a, b, c, empty = (one(text, 5) for text in (short, other, longer, ""))
    assert a.whole and b.whole and empty.whole and not c.whole
    assert jaccard(a.shingles, a.shingles) == 1 and jaccard(a.shingles, b.shingles) == 0
    assert overlap(a, c) == overlap(c, a) == 1, "it stands there whole, in whichever of the two"
    assert overlap(a, b) == 0
    assert shared(c, a) == 1 and 0 < shared(a, c) < 0.5, "little of the long one stands in the short one"
    assert shared(a, empty) == overlap(a, empty) == overlap(empty, a) == jaccard(empty.shingles, empty.shingles) == 1
    assert shared(empty, a) == jaccard(a.shingles, empty.shingles) == 0
