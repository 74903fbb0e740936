"""The Bayesian reading of SBP tested: synthetic documents against the exact posterior predictive over D.

The paper (section 5) reads the synthesizer as P(d2 | d1) = sum over concepts c of P(d2 | c) P(c | d1). In a world of
`concepts` both factors can be computed for a learner who knows the world's rules and has read D and nothing else:

- Facts. Before D, every value of a concept's attribute is equally likely, independently of all others. A document names
  its concept and states it truly, whatever the values are, so D's likelihood is the same for every world that agrees
  with D and zero for the rest. After D, a fact that D states is therefore certain, and any other is uniform over its
  attribute's values.
- Concepts. P(c | d1) is proportional to P(c) P(d1 | c): P(c) is the share of D's documents that name c (the world's
  popularities are not for a reader of D to know); a document names its own concept, so P(d1 | c) is 0 where d1 names
  another; a value that d1 states has the probability that facts after D give it. Where d1 names its concept, all mass
  lies there; where the name was cut off, what d1 states decides; where nothing of d1 was read, P(c) is left.

A statement "attribute a of c is v" of a synthetic document has posterior predictive P(c | d1) P(v | c, a, D), and is
judged in these two parts. No learner that read only D can, over worlds, be right about the values more often than the
second part's mode. About facts that D states nowhere it is right one time in as many values as there are: a synthesizer
that does better has seen text outside D. Derivation and limits: docs/bayes.md. `posterior_table` sums the graded
statements up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import polars as pl

from sbp_assets.corpus.concept_texts import ATTRIBUTES
from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.corpus.split import UNIQUE
from sbp_assets.corpus.tokenizer import decode, related_id
from sbp_assets.storage.token_arrays import TokenArrays
from sbp_assets.synthesizer.examples import format_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")

CONCEPT = "concept"
STATEMENT_SCHEMA = {
    "seed_id": pl.String(), "group": pl.String(), "concept": pl.Int64(), "attribute": pl.String(),
    "value": pl.String(), "right": pl.Boolean(), "sampling": pl.Float64(), "mode": pl.Float64(),
    "chance": pl.Float64(),
}  # fmt: skip


@dataclass(frozen=True)
class Seed:
    """A seed document d1: its text, and the part of it that the synthesizer read."""

    text: str
    read: str


class Learner:
    """What can be known of `world` by its rules and the documents of D read so far. It never sees the ground truth."""

    def __init__(self, world: ConceptWorld) -> None:
        self.world = world
        self.facts: dict[tuple[int, str], str] = {}
        self.documents: Counter[int] = Counter()
        self._named: dict[str, int] = {}

    def read(self, texts: Iterable[str]) -> None:
        """Learn from the texts of documents of D."""
        for text in texts:
            if (concept := self.world.concept_of(text)) is not None:
                self.documents[concept] += 1
                self._named[self.world.names[concept]] = concept
            self.facts |= {(concept, attribute): value for concept, attribute, value in facts_of(self.world, text)}

    def values(self, concept: int, attribute: str) -> dict[str, float]:
        """Return P(value | concept, attribute, D): certain where D states the fact, else uniform."""
        if known := self.facts.get((concept, attribute)):
            return {known: 1.0}
        return dict.fromkeys(ATTRIBUTES[attribute], 1 / len(ATTRIBUTES[attribute]))

    def prior(self, concept: int) -> float:
        """Return P(concept): the share of D's documents that are about it."""
        return self.documents[concept] / max(self.documents.total(), 1)

    def concepts(self, text: str) -> dict[int, float]:
        """Return P(concept | text, D) for a document `text`, or a part of one; empty where nothing of D has been read.

        Of several names those that occur most often are candidates, which is the limit of names that are seldom
        wrong; of no name, all concepts of D.
        """
        named = Counter(self._named[name] for name in self.world.names_in(text) if name in self._named)
        candidates = [concept for concept, count in named.items() if count == max(named.values())] or [*self.documents]
        weights = {concept: self.prior(concept) for concept in candidates}
        if len(candidates) > 1:
            # Read as if the first candidate were named: what is said of "it" does not depend on who it is.
            said = {(a, v) for _, a, v in facts_of(self.world, f"{self.world.names[candidates[0]]}. {text}")}
            for concept in candidates:
                for attribute, value in said:
                    weights[concept] *= self.values(concept, attribute).get(value, 0.0)
        total = sum(weights.values())
        if not total:  # What is said is true of no candidate, which no document of the world does.
            weights = {concept: self.prior(concept) for concept in candidates}
            total = sum(weights.values())
        return {concept: weight / total for concept, weight in weights.items() if weight}


def facts_of(world: ConceptWorld, text: str) -> set[tuple[int, str, str]]:
    """Return the facts that `text` states, true or not; a value cut off in the middle is none.

    A fact is (concept, attribute, value).
    """
    return {(s.concept, s.attribute, s.value) for s in world.statements(text) if s.value in ATTRIBUTES[s.attribute]}


def mode_accuracy(distribution: Mapping[T, float], truth: T) -> float:
    """Return how often the most probable item is `truth`, ties being broken at random."""
    most = max(distribution.values(), default=0.0)
    top = [item for item, p in distribution.items() if p == most]
    return (truth in top) / len(top) if top else 0.0


def seed_documents(
    arrays: TokenArrays, tokenizer: PreTrainedTokenizerFast, max_document_tokens: int, conditional: bool
) -> dict[str, Seed]:
    """Return D's documents in `arrays` by id, cut as the synthesizer's prompts are.

    Without `conditional` the synthesizer reads nothing of them.
    """
    related = related_id(tokenizer)
    seeds = {}
    for number in np.flatnonzero(arrays.documents["split"].to_numpy() == UNIQUE):
        document = arrays.tokens[arrays.offsets[number] : arrays.offsets[number + 1]]
        prompt = format_prompt(document, related, max_document_tokens)
        read = decode(tokenizer, prompt[1:-1]) if conditional else ""
        seeds[arrays.documents["id"][int(number)]] = Seed(decode(tokenizer, document[1:-1]), read)
    return seeds


def grade(learner: Learner, seeds: Mapping[str, Seed], synthetic: pl.DataFrame) -> pl.DataFrame:
    """Return every fact that `synthetic` (seed_id, text) states, beside what `learner` would have got right.

    The rows are of STATEMENT_SCHEMA. `sampling` is the posterior predictive's probability of the ground truth, `mode`
    how often its most probable value is the ground truth. A fact stated twice in a document counts once. Each fact has
    a second row of group "concept", which asks not for its value but for whom it is about. A value outside the
    vocabulary is null.

    Raises ValueError where a synthetic document's seed is not in `seeds`.
    """
    if unknown := set(synthetic["seed_id"]) - set(seeds):
        raise ValueError(
            f"synthetic documents name seed {min(unknown)!r}, which is no document of D; "
            "re-materialise synthesis/synthetic_documents"
        )
    world = learner.world
    rows: list[tuple[object, ...]] = []
    for (seed_id,), group in synthetic.group_by("seed_id", maintain_order=True):
        seed = seeds[str(seed_id)]
        own = world.concept_of(seed.text)
        read = {(own, attribute) for concept, attribute, _ in facts_of(world, seed.read) if concept == own}
        posterior = learner.concepts(seed.read)
        about = (posterior.get(own, 0.0), mode_accuracy(posterior, own), learner.prior(own)) if own is not None else ()
        for text in group["text"]:
            for fact in dict.fromkeys(world.statements(text)):
                key, vocabulary = (fact.concept, fact.attribute), ATTRIBUTES[fact.attribute]
                if about:
                    rows.append((seed_id, CONCEPT, *key, None, fact.concept == own, *about))
                known = "known" if key in learner.facts else "unknown"
                kind = "restated" if key in read else f"{'new' if fact.concept == own else 'other'}_{known}"
                values, truth = learner.values(*key), world.facts[fact.concept][fact.attribute]
                answer = fact.value if fact.value in vocabulary else None
                expected = (values.get(truth, 0.0), mode_accuracy(values, truth), 1 / len(vocabulary))
                rows.append((seed_id, kind, *key, answer, fact.true, *expected))
    return pl.DataFrame(rows, schema=STATEMENT_SCHEMA, orient="row")
