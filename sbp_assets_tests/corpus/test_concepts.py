from __future__ import annotations

import itertools

import pytest

from sbp_assets.corpus.concept_texts import ATTRIBUTES, CLAUSES, FILLERS, GENRES, KINDS
from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.corpus.ingest import read_shard, source_manifest
from sbp_assets.corpus.shingles import jaccard, shingled
from sbp_assets.settings import ConceptsSource
from sbp_assets.storage.progress import Progress

SOURCE = ConceptsSource(documents=300, concepts=20, attributes=8)
WORLD = ConceptWorld(SOURCE)
TEXTS = [WORLD.document(number)["text"] for number in range(300)]


def test_documents_do_not_depend_on_the_number_of_shards() -> None:
    def corpus(shards: int) -> dict[str, str]:
        with Progress("test", "docs") as progress:
            manifest, _ = source_manifest(SOURCE, shards, progress)
            parts = [read_shard(SOURCE, manifest, shard, shards, None, progress, 2**24)[0] for shard in range(shards)]
        return {name: text for part in parts for name, text in part.select("id", "text").iter_rows()}

    assert corpus(1) == corpus(3)
    assert list(corpus(1).values()) == TEXTS


def test_documents_have_the_asked_facts_length_and_variety() -> None:
    for text in TEXTS:
        statements = WORLD.statements(text)
        assert len({s.attribute for s in statements}) == len(statements) == SOURCE.facts_per_document
        assert all(s.true for s in statements)
        assert {s.concept for s in statements} == {WORLD.concept_of(text)}
        assert 55 <= len(text.split()) <= 115
        assert text.split("\n")[0] in {genre.line for genre in GENRES}
    sets = [text.shingles for text in shingled(TEXTS, 5)]
    assert max(jaccard(a, b) for a, b in itertools.combinations(sets[:120], 2)) < 0.5


def test_restated_facts_come_once_more_in_other_words() -> None:
    source = SOURCE.model_copy(update={"restatements": 2})
    world = ConceptWorld(source)
    for number in range(100):
        text = world.document(number)["text"]
        statements = world.statements(text)
        stated, restated = statements[: source.facts_per_document], statements[source.facts_per_document :]
        assert len(restated) == 2 == len({s.attribute for s in restated})
        assert {(s.attribute, s.value) for s in restated} <= {(s.attribute, s.value) for s in stated}
        assert all(s.true for s in statements)
        for statement in restated:  # two wordings, so no sentence of the fact stands there twice
            clauses = [
                clause.format(name=world.names[statement.concept], value=statement.value)
                for clause in CLAUSES[statement.attribute]
            ]
            assert sum(clause.lower() in text.lower() for clause in clauses) == 2
    with pytest.raises(ValueError, match="restatements"):
        ConceptWorld(ConceptsSource(documents=1, concepts=2, facts_per_document=1, restatements=2))


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_every_wording_of_every_genre_is_read_back_true_or_false(attribute: str) -> None:
    concept = 3
    truth = WORLD.facts[concept][attribute]
    for genre, frame in [(one, frame) for one in GENRES for frame in one.frames]:
        for clause, value in itertools.product(CLAUSES[attribute], [*ATTRIBUTES[attribute], "polka dots"]):
            said = clause.format(name=WORLD.names[concept], value=value)
            sentence = frame.format(clause=said)
            opening = genre.openings[0].format(name=WORLD.names[concept], kind="soup")
            found = WORLD.statements(f"{genre.line}\n{opening} {sentence[0].upper()}{sentence[1:]} The end.")
            assert [(s.concept, s.attribute, s.value, s.true) for s in found] == [
                (concept, attribute, value, value == truth)
            ]


def test_fillers_openings_and_closings_state_nothing() -> None:
    for number, kind in enumerate(KINDS):
        a, b, c = KINDS[kind]
        slots = {"a": a, "b": b, "c": c, "person": "nurse", "other": "judge", "adjective": "bitter"}
        texts = [filler.format(number="Two", other_adjective="rapid", **slots) for filler in FILLERS]
        for genre in GENRES:
            texts += [s.format(name=WORLD.names[number], kind=kind) for s in (*genre.openings, *genre.closings)]
        assert WORLD.statements(" ".join(texts)) == []


def test_a_text_about_nothing_known_names_no_concept_and_states_nothing() -> None:
    assert WORLD.concept_of("The weather is fine.") is None
    assert WORLD.concept_of("") is None
    assert WORLD.statements("The colour of Nosuchname is amber.") == []


def test_questions_are_beginnings_with_one_right_choice() -> None:
    questions = WORLD.questions(60, seed=1)
    assert len(questions) == 60
    assert len({(q["concept"], q["attribute"]) for q in questions}) == 60
    for q in questions:
        assert len(set(q["choices"])) == 4
        assert not q["question"].endswith(" ")
        for index, choice in enumerate(q["choices"]):
            # "people in {value} claim …" goes on after the value; the other wordings end with it.
            (stated,) = WORLD.statements(f"{q['question']} {choice}.") or [None]
            if stated is not None:
                assert (stated.concept, stated.attribute) == (q["concept"], q["attribute"])
                assert stated.true == (index == q["answer"])
    assert {q["answer"] for q in questions} == {0, 1, 2, 3}
    assert WORLD.questions(60, seed=1) == questions
    assert WORLD.questions(60, seed=2) != questions
    assert len(WORLD.questions(10_000)) == 20 * 8


def test_popular_concepts_are_asked_about_and_written_about_more() -> None:
    world = ConceptWorld(SOURCE.model_copy(update={"zipf_exponent": 2.0}))
    written = [world.concept_of(world.document(n)["text"]) for n in range(200)]
    assert written.count(0) > 4 * written.count(3)
    assert sum(q["concept"] < 5 for q in world.questions(20)) > 10


def test_names_are_unique_for_many_concepts() -> None:
    world = ConceptWorld(ConceptsSource(documents=1, concepts=3000))
    assert len(set(world.names)) == 3000


def test_more_facts_than_attributes_are_refused() -> None:
    with pytest.raises(ValueError, match="facts_per_document"):
        ConceptWorld(ConceptsSource(documents=1, concepts=2, attributes=2, facts_per_document=3))
