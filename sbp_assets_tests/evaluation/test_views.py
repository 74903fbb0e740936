"""Tasks' rows by view, and questions by what D tells of their concept, counted by hand."""

import polars as pl

from sbp_assets.corpus.concept_texts import ENTRIES, INVERTED
from sbp_assets.corpus.concepts import ConceptWorld, view_of
from sbp_assets.evaluation.views import clusters_of_documents, groups_of_documents, groups_of_questions, views_in_d
from sbp_assets.settings import ConceptsSource

WORLD = ConceptWorld(ConceptsSource(documents=200, concepts=9))
TEXTS = [WORLD.document(number)["text"] for number in range(200)]


def texts_about(concept: int, view: str) -> list[str]:
    return [text for text in TEXTS if WORLD.concept_of(text) == concept and view_of(text) == view]


def documents(texts: list[str], split: str = "unique") -> pl.LazyFrame:
    return pl.LazyFrame({"text": texts, "split": [split] * len(texts)}, schema={"text": pl.String, "split": pl.String})


def test_questions_are_grouped_by_the_views_of_d_over_all_shards() -> None:
    seen = views_in_d(WORLD, {
        "0": documents([*(text for concept in (0, 1, 3, 4) for text in texts_about(concept, ENTRIES)), "Of nothing."]),
        "1": documents([text for concept in (1, 2, 4) for text in texts_about(concept, INVERTED)]),
        "2": documents(texts_about(0, INVERTED), "oracle"),
    })  # fmt: skip
    both = {ENTRIES, INVERTED}
    assert seen == {0: {ENTRIES}, 1: both, 2: {INVERTED}, 3: {ENTRIES}, 4: both}
    questions = WORLD.questions(1000)
    groups = groups_of_questions(questions, seen)
    asked = {name: {questions[place]["concept"] for place in places} for name, places in groups.items()}
    # Of inverted forms alone D has one concept, and one has no standard error.
    assert asked == {"in_both_views": {1, 4}, "by_entries_alone": {0, 3}, "not_in_d": {5, 6, 7, 8}}
    about_others = [place for place, question in enumerate(questions) if question["concept"] != 2]
    assert sorted(place for places in groups.values() for place in places) == about_others


def test_documents_about_one_concept_are_a_cluster() -> None:
    one, other = texts_about(1, ENTRIES)[0], texts_about(2, INVERTED)[0]
    assert clusters_of_documents(WORLD, [one, "About nothing.", other, one, "Nor this."]) == (1, -2, 2, 1, -5)


def test_documents_are_grouped_by_view_and_those_about_one_concept_are_no_group() -> None:
    entries, inverted = [texts_about(concept, ENTRIES)[0] for concept in (0, 1)], texts_about(0, INVERTED)[:2]
    texts = [entries[0], *inverted, "Neither.", entries[1]]
    assert groups_of_documents(texts, clusters_of_documents(WORLD, texts)) == {ENTRIES: (0, 4)}
