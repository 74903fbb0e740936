from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbp_assets.corpus.concept_texts import ATTRIBUTES, ENTRIES, GENRES, INVERTED, KINDS, NAMES, VIEWS
from sbp_assets.corpus.concepts import ConceptWorld, view_of
from sbp_assets.corpus.ingest import read_shard, source_manifest
from sbp_assets.corpus.shingles import jaccard, shingled
from sbp_assets.settings import ConceptsSource
from sbp_assets.storage.progress import Progress

SOURCE = ConceptsSource(documents=300, concepts=60, attributes=6)
WORLD = ConceptWorld(SOURCE)
TEXTS = [WORLD.document(number)["text"] for number in range(300)]
WORDINGS = sorted({(genre.line, attribute) for genre in GENRES for attribute in ATTRIBUTES})


def test_documents_do_not_depend_on_the_number_of_shards() -> None:
    def corpus(shards: int) -> dict[str, str]:
        with Progress("test", "docs") as progress:
            manifest, _ = source_manifest(SOURCE, shards, progress)
            parts = [read_shard(SOURCE, manifest, shard, shards, None, progress, 2**24)[0] for shard in range(shards)]
        return {name: text for part in parts for name, text in part.select("id", "text").iter_rows()}

    assert corpus(1) == corpus(3)
    assert list(corpus(1).values()) == TEXTS


@pytest.mark.parametrize("facts", [None, 2])
def test_documents_state_the_asked_facts_of_one_concept_in_either_order(facts: int | None) -> None:
    world = ConceptWorld(SOURCE.model_copy(update={"facts_per_document": facts}))
    views = Counter[str | None]()
    for number in range(300):
        text = world.document(number)["text"]
        statements, concept = world.statements(text), world.concept_of(text)
        assert concept is not None
        assert len({s.attribute for s in statements}) == len(statements) == (facts or SOURCE.attributes)
        assert all(s.true for s in statements) and {s.concept for s in statements} == {concept}
        name, values = world.names[concept], [text.index(s.value) for s in statements]
        view = view_of(text)
        views[view] += 1
        if view == ENTRIES:
            assert text.index(name) < min(values)
        else:
            assert text.endswith(f"{name}.") and text.count(name) == 1 and max(values) < text.index(name)
    assert set(views) == set(VIEWS)
    assert 0.3 < views[INVERTED] / 300 < 0.5


def test_documents_vary_in_wording_and_order() -> None:
    sets = [text.shingles for text in shingled(TEXTS, 5)]
    assert max(jaccard(a, b) for a, b in itertools.combinations(sets[:120], 2)) < 0.8
    orders = {tuple(s.attribute for s in WORLD.statements(text)) for text in TEXTS}
    assert len(orders) > 200
    assert {text.split("\n")[0] for text in TEXTS} == {genre.line for genre in GENRES}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_documents_can_be_of_one_view_alone(share: float) -> None:
    world = ConceptWorld(SOURCE.model_copy(update={"inverted_share": share}))
    assert {view_of(world.document(number)["text"]) for number in range(30)} == {INVERTED if share else ENTRIES}


@pytest.mark.parametrize(("line", "attribute"), WORDINGS)
def test_every_wording_of_every_genre_is_read_back_true_or_false(line: str, attribute: str) -> None:
    genre = next(genre for genre in GENRES if genre.line == line)
    concept = 3
    name, truth = WORLD.names[concept], WORLD.facts[concept][attribute]
    values = [*ATTRIBUTES[attribute][::40], truth, "polka dots"]
    for clause, frame, value in itertools.product(genre.clauses[attribute], (*genre.frames, "{clause}."), values):
        said = frame.format(clause=clause.format(name=name, value=value))
        opening, closing = (texts[-1].format(name=name, kind="teapot") for texts in (genre.openings, genre.closings))
        found = WORLD.statements(f"{genre.line}\n{opening} {said[0].upper()}{said[1:]} {closing}")
        assert [(s.concept, s.attribute, s.value, s.true) for s in found] == [
            (concept, attribute, value, value == truth)
        ]


def test_openings_and_closings_state_nothing_and_name_the_concept() -> None:
    for genre, kind in itertools.product(GENRES, KINDS):
        for said in (*genre.openings, *genre.closings):
            text = said.format(name=WORLD.names[0], kind=kind)
            assert WORLD.statements(text) == []
            assert list(WORLD.names_in(text)) == [WORLD.names[0]] * ("{name}" in said)
        named = genre.openings if genre.view == ENTRIES else genre.closings
        assert all(said.count("{name}") == 1 for said in named)


@given(st.lists(st.integers(0, 299), min_size=2, max_size=2, unique=True))
def test_statements_are_about_the_concept_named_before_or_else_after(numbers: list[int]) -> None:
    first, second = (TEXTS[number] for number in numbers)
    found = WORLD.statements(f"{first}\n{second}")
    assert found[: SOURCE.attributes] == WORLD.statements(first)
    if view_of(second) == ENTRIES:
        assert found[SOURCE.attributes :] == WORLD.statements(second)


def test_a_fact_without_a_subject_or_of_an_unknown_name_is_none() -> None:
    unknown = next(f"{a} {b}" for a in NAMES[0] for b in NAMES[1] if f"{a} {b}" not in WORLD.names)
    assert WORLD.statements("I grew up in Ardbourne. Who am I?") == []
    assert WORLD.statements(f"I grew up in Ardbourne. Who am I? {unknown}.") == []
    assert WORLD.statements(f"{unknown} stands in Ardbourne.") == []
    assert WORLD.concept_of(f"{unknown} and the weather") is None and WORLD.concept_of("") is None
    assert view_of("The weather is fine.") is None


def test_no_value_belongs_to_two_attributes_and_all_are_many() -> None:
    values = [value for pool in ATTRIBUTES.values() for value in pool]
    assert len(values) == len(set(values)) and min(map(len, ATTRIBUTES.values())) >= 400
    capitals = {word for value in values for word in re.findall(r"[A-Z][a-z]+", value)}
    assert not capitals & {word for part in NAMES for word in part}, "a name's word would be a value's"


def test_questions_are_beginnings_with_one_right_choice() -> None:
    questions = WORLD.questions(60, seed=1)
    assert [q["view"] for q in questions] == [ENTRIES] * 60 + [INVERTED] * 60
    assert len({(q["concept"], q["fact"]) for q in questions}) == 120
    for q in questions:
        assert len(set(q["choices"])) == 4 and not q["question"].endswith(" ")
        name = WORLD.names[q["concept"]]
        for index, choice in enumerate(q["choices"]):
            said = WORLD.statements(f"{q['question']} {choice}.")
            if q["view"] == ENTRIES:
                [fact] = said
                assert (fact.concept, fact.attribute) == (q["concept"], q["fact"])
                assert fact.true == (index == q["answer"])
            else:
                assert (choice == name) == (index == q["answer"]) and name not in q["question"]
                assert len(said) == SOURCE.attributes, "all of the concept's facts are given"
                assert all(s.true for s in said) == (choice == name)
                kind = WORLD.kinds[q["concept"]]
                assert WORLD.kinds.count(kind) < 4 or WORLD.kinds[WORLD.names.index(choice)] == kind
    assert {q["answer"] for q in questions} == {0, 1, 2, 3}
    assert WORLD.questions(60, seed=1) == questions != WORLD.questions(60, seed=2)
    assert len(WORLD.questions(10_000)) == 60 * (6 + 3)


def test_few_concepts_of_a_kind_are_asked_for_among_all() -> None:
    world = ConceptWorld(ConceptsSource(documents=1, concepts=5))
    assert all(len(set(q["choices"])) == 4 and set(q["choices"]) <= set(world.names)
               for q in world.questions(9) if q["view"] == INVERTED)  # fmt: skip


def test_popular_concepts_are_asked_about_and_written_about_more() -> None:
    world = ConceptWorld(SOURCE.model_copy(update={"zipf_exponent": 2.0}))
    written = [world.concept_of(world.document(n)["text"]) for n in range(200)]
    assert written.count(0) > 4 * written.count(3)
    assert sum(q["concept"] < 5 for q in world.questions(20)) > 20


def test_names_are_unique_up_to_as_many_as_there_are() -> None:
    world = ConceptWorld(ConceptsSource(documents=1, concepts=3600))
    assert len(set(world.names)) == 3600 == len(NAMES[0]) * len(NAMES[1])


def test_more_facts_than_attributes_are_refused() -> None:
    with pytest.raises(ValueError, match="facts_per_document"):
        ConceptWorld(ConceptsSource(documents=1, concepts=4, attributes=2, facts_per_document=3))
