"""The measures of a sample on documents whose relations are known."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.pilot.measures import (
    Documents,
    RareWords,
    density,
    facts_shared,
    mean,
    pairs_among,
    random_partners,
    random_similarities,
    subject_kept,
)
from sbp_assets.settings import ConceptsSource, Pairing

TOPICS, OF_TOPIC = 40, 5


@pytest.fixture(scope="module")
def documents() -> Documents:
    """Documents of 40 topics, five of each: a topic's vectors are near to each other, and so are its words."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(TOPICS, 64))
    rows = [(topic, number) for number in range(OF_TOPIC) for topic in range(TOPICS)]
    vectors = np.array([centres[topic] + 0.2 * generator.normal(size=64) for topic, _ in rows], np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    texts = [f"here is the tale of name{topic} and value{topic}, told as told{topic}x{n} for all" for topic, n in rows]
    return Documents([f"{topic:02d}-{number}" for topic, number in rows], texts, vectors)


def pairs(documents: Documents, folder: Path, floor: float = 0.8, cap: int | None = 8) -> pl.DataFrame:
    folder.mkdir()
    return pairs_among(documents, Pairing(neighbors=6, max_pairs_per_document=cap), folder, "1GB", floor)


def test_the_pairs_of_a_threshold_are_those_that_the_filter_keeps_with_it(documents: Documents, tmp_path: Path):
    for cap in (2, None):
        low, high = (pairs(documents, tmp_path / f"{floor}-{cap}", floor, cap) for floor in (0.1, 0.95))
        kept = low.filter(pl.col("similarity") >= 0.95)
        assert set(kept.rows()) == set(high.rows()) and 0 < len(high) < len(low)


def test_documents_of_a_smaller_d_have_fewer_pairs(documents: Documents, tmp_path: Path):
    found = {}
    for size in (TOPICS, 2 * TOPICS, 5 * TOPICS):
        of_size = pairs(documents.first(size), tmp_path / str(size))
        found[size] = density(of_size, size)
    # One document of each topic has no partner, two have one, five have four.
    assert [found[size]["paired_share"] for size in found] == [0, 1, 1]
    assert [found[size]["pairs_per_document"] for size in found] == [0, 1, 4]


def test_of_random_pairs_as_many_are_similar_as_are_of_one_topic(documents: Documents):
    share = (random_similarities(documents, Pairing()) >= 0.7).mean()
    assert share == pytest.approx((OF_TOPIC - 1) / (len(documents) - 1), abs=0.005)


def test_a_partner_has_the_rare_words_that_a_random_document_lacks(documents: Documents, tmp_path: Path):
    found = pairs(documents, tmp_path / "pairs")
    first, second = found["d1"].to_list(), found["d2"].to_list()
    # Ten of 400 documents have a topic's name and value: more than 2%, so that they are not rare.
    twice = Documents([*documents.ids, *(f"{i}-" for i in documents.ids)], documents.texts * 2, np.zeros(0))
    assert mean(RareWords(twice).shares(first, second)) == 0
    # Of 600 they are rare: two of a document's three rare words are in its partner, the third in itself alone.
    rare = RareWords(Documents([*twice.ids, *map(str, range(200))], [*twice.texts, *["x"] * 200], np.zeros(0)))
    assert mean(rare.shares(first, second)) == pytest.approx(2 / 3)
    assert (mean(rare.shares(random_partners(found, documents), second)) or 0) < 0.05


def test_documents_without_a_rare_word_have_no_share():
    rare = RareWords(Documents(list("abcdef"), ["one two", "two one"] * 3, np.zeros(0)))
    assert mean(rare.shares(["a"], ["b"])) is None


def test_the_share_of_rare_words_is_near_to_the_truth_in_the_world_of_concepts():
    world = ConceptWorld(ConceptsSource(documents=400, concepts=200, facts_per_document=2))
    rows = [world.document(number) for number in range(400)]
    texts = {row["id"]: row["text"] for row in rows}
    by_concept: dict[int | None, list[str]] = {}
    for row in rows:
        by_concept.setdefault(world.concept_of(row["text"]), []).append(row["id"])
    same = [pair for ids in by_concept.values() for pair in pairwise(ids)]
    first, second = map(list, zip(*same, strict=True))
    exact = facts_shared(first, second, texts, world)
    assert exact["one_concept"] == 1 and 0.5 < exact["facts_in_d1"] < 0.8 and 0.3 < exact["crossing"] < 0.7
    other = facts_shared(first, second[50:] + second[:50], texts, world)
    assert other["one_concept"] < 0.05 and other["facts_in_d1"] < 0.05
    measured = RareWords(Documents(list(texts), list(texts.values()), np.zeros(0))).shares(first, second)
    # The names, which both have, count as well.
    assert exact["facts_in_d1"] - 0.05 < (mean(measured) or 0) < exact["facts_in_d1"] + 0.25


def test_a_synthetic_document_keeps_its_subject_where_it_is_nearest_to_its_seed(documents: Documents):
    seeds = documents.ids[:100]
    own = subject_kept(seeds, documents.vectors[:100], documents, Pairing())
    assert own["kept"] == 1 and own["to_seed"] == pytest.approx(1) and own["to_random"] < 0.2
    other = subject_kept(seeds, documents.vectors[1:101], documents, Pairing(centring=2))
    assert other["kept"] < 0.05
