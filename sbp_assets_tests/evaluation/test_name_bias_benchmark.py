"""Questions whose names are known alike, and what guessing by counts of names would score."""

from collections import Counter

import pytest

from benchmarks.name_bias import _endings, _evenly_known, _guess
from sbp_assets.corpus.concept_texts import ENTRIES, INVERTED
from sbp_assets.corpus.concepts import ConceptWorld, view_of
from sbp_assets.settings import ConceptsSource

WORLD = ConceptWorld(ConceptsSource(documents=300, concepts=120))
ASKED = [question for question in WORLD.questions(500) if question["view"] == INVERTED and question["concept"] < 50]


def test_wrong_names_are_of_the_same_kind_and_known_alike() -> None:
    names = {WORLD.names[question["concept"]] for question in ASKED}
    kind_of = dict(zip(WORLD.names, WORLD.kinds, strict=True))
    found = _evenly_known(WORLD, ASKED)
    for question in found:
        assert set(question["choices"]) <= names and len(set(question["choices"])) == 4
        assert len({kind_of[name] for name in question["choices"]}) == 1
        assert question["choices"][question["answer"]] == WORLD.names[question["concept"]]
    # Left out are those of a kind of which fewer than four concepts are asked about, and no others.
    kinds = Counter(kind_of[name] for name in names)
    kept = [question["question"] for question in ASKED if kinds[WORLD.kinds[question["concept"]]] >= 4]
    assert [question["question"] for question in found] == kept and 0 < len(kept) < len(ASKED)
    with pytest.raises(SystemExit, match="no kind of which"):
        _evenly_known(WORLD, [question for question in ASKED if question["concept"] < 3])


def test_guessing_by_counts_shares_the_point_of_equals() -> None:
    texts = [WORLD.document(number)["text"] for number in range(300)]
    counts = _endings(WORLD, texts)
    assert counts.total() == sum(view_of(text) == INVERTED for text in texts)
    assert not _endings(WORLD, [text for text in texts if view_of(text) == ENTRIES])
    assert _guess(ASKED, {}) == pytest.approx(0.25), "all are equal"
    first = ASKED[:1]
    right = first[0]["choices"][first[0]["answer"]]
    wrong = next(name for name in first[0]["choices"] if name != right)
    assert [_guess(first, of) for of in ({right: 2, wrong: 1}, {right: 2, wrong: 2}, {wrong: 1})] == [1, 0.5, 0]
