"""Questions whose names are known alike, and what guessing by counts of names would score."""

import pytest

from benchmarks.name_bias import _endings, _evenly_known, _guess
from sbp_assets.corpus.concept_texts import ENTRIES, INVERTED
from sbp_assets.corpus.concepts import ConceptWorld, view_of
from sbp_assets.settings import ConceptsSource

WORLD = ConceptWorld(ConceptsSource(documents=300, concepts=40))
ASKED = [question for question in WORLD.questions(200) if question["view"] == INVERTED and question["concept"] < 12]


def test_wrong_names_are_those_of_the_concepts_asked_about() -> None:
    names = {WORLD.names[question["concept"]] for question in ASKED}
    assert len(names) == 12
    for before, question in zip(ASKED, _evenly_known(WORLD, ASKED), strict=True):
        assert set(question["choices"]) <= names and len(set(question["choices"])) == 4
        assert question["choices"][question["answer"]] == WORLD.names[question["concept"]]
        assert question["question"] == before["question"]
    with pytest.raises(SystemExit, match="a question has 4 choices"):
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
