"""Groups of the concepts world's tasks: held-out documents by view, questions by what D tells of their concept.

What D tells of a concept in one view alone cannot be answered in the other by repeating it (see `corpus.concepts`), so
the questions of a view are also scored apart for concepts of which D has entries alone, inverted forms alone, or both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import polars as pl

from sbp_assets.corpus.concept_texts import ENTRIES, INVERTED, VIEWS
from sbp_assets.corpus.concepts import ConceptWorld, Question, view_of
from sbp_assets.corpus.split import UNIQUE
from sbp_assets.evaluation.tasks import CONCEPT_QUESTIONS, REVERSED_QUESTIONS

BOTH, NEITHER = "in_both_views", "not_in_d"
ALONE = {view: f"by_{view}_alone" for view in VIEWS}  # "by_entries_alone"
# Lines of the score tables: what D tells of a concept in one view, asked in the other. No repetition of D teaches it.
REVERSED_BY_ENTRIES = f"{REVERSED_QUESTIONS}_{ALONE[ENTRIES]}"
FORWARD_BY_INVERTED = f"{CONCEPT_QUESTIONS}_{ALONE[INVERTED]}"
Groups = dict[str, tuple[int, ...]]  # By name, the places of a task's rows that belong to the group.


def views_in_d(world: ConceptWorld, documents: Mapping[str, pl.LazyFrame]) -> dict[int, set[str]]:
    """Return the views of D's documents about each concept that has any, by the concept's number.

    `documents` (text, split) are frames by shard; one shard's texts are in memory at a time.
    """
    seen: defaultdict[int, set[str]] = defaultdict(set)
    for shard in sorted(documents):
        for text in documents[shard].filter(pl.col("split") == UNIQUE).select("text").collect()["text"]:
            if (concept := world.concept_of(text)) is not None and (view := view_of(text)):
                seen[concept].add(view)
    return dict(seen)


def clusters_of_documents(world: ConceptWorld, texts: Sequence[str]) -> tuple[int, ...]:
    """Return the number of each document's concept, of one about none a number of its own."""
    concepts = (world.concept_of(text) for text in texts)
    return tuple(-1 - place if concept is None else concept for place, concept in enumerate(concepts))


def groups_of_documents(texts: Sequence[str], clusters: Sequence[int]) -> Groups:
    """Return the documents of either view, by their texts and `clusters_of_documents`."""
    return _groups([view_of(text) for text in texts], VIEWS, clusters)


def groups_of_questions(questions: Sequence[Question], seen: Mapping[int, set[str]]) -> Groups:
    """Return the questions by the views of D's documents about their concept (`views_in_d`)."""

    def known(concept: int) -> str:
        views = seen.get(concept, set())
        return BOTH if len(views) > 1 else ALONE[next(iter(views))] if views else NEITHER

    concepts = [question["concept"] for question in questions]
    return _groups([known(concept) for concept in concepts], (BOTH, *ALONE.values(), NEITHER), concepts)


def _groups(of: Sequence[str | None], names: Sequence[str], concepts: Sequence[int]) -> Groups:
    places = {name: tuple(place for place, own in enumerate(of) if own == name) for name in names}
    # What is about one concept has no standard error.
    return {name: rows for name, rows in places.items() if len({concepts[place] for place in rows}) > 1}
