"""The embedded corpus: seeded documents about invented concepts, every fact of which can be checked.

The world follows the Bayesian reading of SBP (paper, section 5): a document renders a latent concept, so two documents
about one concept inform each other. A concept has an invented name, a kind of thing that it is, and one value per
attribute. A document opens with a line naming its genre, then states a few of the concept's facts in varied wording
among sentences that state none; some it may state once more, as texts do, in other words before it closes. Everything
is a pure function of the settings and the document's number, independent of the number of shards.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TypeVar

from sbp_assets.corpus.concept_texts import (
    ADJECTIVES,
    ATTRIBUTES,
    CLAUSES,
    CODAS,
    DOCUMENT_WORDS,
    FILLERS,
    GENRES,
    KINDS,
    NUMBERS,
    ONSETS,
    PERSONS,
    TEXT_WORDS,
    VOWELS,
    Genre,
)
from sbp_assets.settings import ConceptsSource

T = TypeVar("T")

CHOICES = 4  # of a question

_SUBJECT = r"(?P<name>[A-Z][a-z]+)"
_VALUE = r"(?P<value>[^.,;:!?\n]{1,40}?)"


@dataclass(frozen=True)
class Statement:
    """One fact as a text states it: `concept` is the concept's number, `true` tells whether it holds in the world."""

    concept: int
    attribute: str
    value: str
    true: bool


@dataclass(frozen=True)
class _Pattern:
    attribute: str
    regex: re.Pattern[str]
    literals: int  # Characters that are neither name nor value: of two readings of a place the more specific wins.


class ConceptWorld:
    """The concepts of `source`, their facts, and the documents and questions about them."""

    def __init__(self, source: ConceptsSource) -> None:
        if source.facts_per_document > source.attributes:
            raise ValueError(
                f"corpus.source.facts_per_document ({source.facts_per_document}) is above corpus.source.attributes "
                f"({source.attributes}): a document cannot state more facts than there are"
            )
        if source.restatements > source.facts_per_document:
            raise ValueError(
                f"corpus.source.restatements ({source.restatements}) is above corpus.source.facts_per_document "
                f"({source.facts_per_document}): a document restates only what it states"
            )
        self.source = source
        self.attributes = list(ATTRIBUTES)[: source.attributes]
        rng = random.Random(f"world-{source.seed}")
        names: dict[str, None] = {}
        taken = {word.lower() for values in ATTRIBUTES.values() for value in values for word in value.split()}
        while len(names) < source.concepts:
            name = "".join(_pick(rng, ONSETS) + _pick(rng, VOWELS) for _ in range(2 + (rng.random() < 0.5)))
            name = (name + _pick(rng, CODAS)).capitalize()
            if len(name) >= 5 and name.lower() not in taken and name not in TEXT_WORDS:
                names[name] = None
        self.names = list(names)
        self.kinds = [_pick(rng, list(KINDS)) for _ in self.names]
        self.facts = [{key: _pick(rng, ATTRIBUTES[key]) for key in self.attributes} for _ in self.names]
        self._number = {name: number for number, name in enumerate(self.names)}
        self.popularity = [(rank + 1) ** -source.zipf_exponent for rank in range(source.concepts)]
        self._cumulative = list(accumulate(self.popularity))

    def document(self, number: int) -> dict[str, str]:
        """Return document `number` (from 0): id, text, url, source; a pure function of the settings and the number."""
        rng = random.Random(f"document-{self.source.seed}-{number}")
        concept = min(bisect(self._cumulative, rng.random() * self._cumulative[-1]), len(self.names) - 1)
        genre = _pick(rng, GENRES)
        facts = _sample(rng, self.attributes, self.source.facts_per_document)
        sentences, unused = [], {}
        for attribute in facts:
            clause = _pick(rng, CLAUSES[attribute])
            unused[attribute] = [other for other in CLAUSES[attribute] if other != clause]
            sentences.append(self._fact(rng, concept, genre, attribute, clause))
        restated = [
            self._fact(rng, concept, genre, attribute, _pick(rng, unused[attribute]))
            for attribute in _sample(rng, facts, self.source.restatements)
        ]
        opening, closing = (
            self._say(_pick(rng, genre.openings), concept),
            self._say(_pick(rng, genre.closings), concept),
        )
        target = DOCUMENT_WORDS[0] + int(rng.random() * (DOCUMENT_WORDS[1] - DOCUMENT_WORDS[0] + 1))
        fillers = _sample(rng, FILLERS, len(FILLERS))
        words = len(" ".join([genre.line, opening, *sentences, *restated, closing]).split())
        while words < target - 4 and fillers:
            filler = self._filler(rng, concept, fillers.pop())
            words += len(filler.split())
            sentences.insert(int(rng.random() * (len(sentences) + 1)), filler)
        text = f"{genre.line}\n{opening} {' '.join([*sentences, *restated])} {closing}"
        # The id does not name the concept, so that reading ids reveals nothing that the text does not say.
        return {"id": f"concepts-{number:07d}", "text": text, "url": f"concepts://{number}", "source": "concepts"}

    def concept_of(self, text: str) -> int | None:
        """Return the number of the concept that `text` names most often (the first such), or None without a name."""
        named = Counter(word for word in re.findall(r"\b[A-Z][a-z]+\b", text) if word in self._number)
        return self._number[named.most_common(1)[0][0]] if named else None

    def statements(self, text: str) -> list[Statement]:
        """Return every fact sentence of `text`, in order, true or not; values outside the vocabulary are false.

        A sentence about a name that is no concept states nothing checkable and is left out.
        """
        named = [(m.start(), m.group()) for m in re.finditer(r"\b[A-Z][a-z]+\b", text) if m.group() in self._number]
        found: list[tuple[int, int, int, Statement]] = []
        for pattern in self._patterns:
            for match in pattern.regex.finditer(text):
                if "name" in match.groupdict():
                    name: str | None = match["name"]
                else:
                    name = next((n for start, n in reversed(named) if start < match.start()), None)
                if name is None or name not in self._number:
                    continue
                concept, value = self._number[name], match["value"].strip()
                true = self.facts[concept][pattern.attribute] == value
                statement = Statement(concept, pattern.attribute, value, true)
                found.append((-pattern.literals, match.start(), match.end(), statement))
        chosen: list[tuple[int, int, Statement]] = []
        for _, start, end, statement in sorted(found, key=lambda item: item[:3]):
            if all(end <= s or start >= e for s, e, _ in chosen):
                chosen.append((start, end, statement))
        return [statement for _, _, statement in sorted(chosen, key=lambda item: item[0])]

    def questions(self, count: int, seed: int = 0) -> list[dict[str, str | int | list[str]]]:
        """Return at most `count` cloze questions: question, choices (4), answer (index), concept, attribute.

        The question is the beginning of a document up to (and without) the space before the value: a model scores
        question + ' ' + choice. Facts are drawn by popularity without replacement (Efraimidis and Spirakis, 2006);
        there are concepts * attributes of them.
        """
        rng = random.Random(f"questions-{self.source.seed}-{seed}")
        keyed = [
            (math.log(1 - rng.random()) / weight, concept, attribute)
            for concept, weight in enumerate(self.popularity)
            for attribute in self.attributes
        ]
        questions: list[dict[str, str | int | list[str]]] = []
        for _, concept, attribute in sorted(keyed, reverse=True)[:count]:
            genre, value = _pick(rng, GENRES), self.facts[concept][attribute]
            clause, frame = _pick(rng, CLAUSES[attribute]), _pick(rng, genre.frames)
            sentence = _sentence(frame.format(clause=clause.replace("{name}", self.names[concept])))
            opening = self._say(_pick(rng, genre.openings), concept)
            wrong = _sample(rng, [v for v in ATTRIBUTES[attribute] if v != value], CHOICES - 1)
            answer = int(rng.random() * CHOICES)
            questions.append(
                {
                    "question": f"{genre.line}\n{opening} {sentence.split(' {value}')[0]}",
                    "choices": [*wrong[:answer], value, *wrong[answer:]],
                    "answer": answer,
                    "concept": concept,
                    "attribute": attribute,
                }
            )
        return questions

    @cached_property
    def _patterns(self) -> list[_Pattern]:
        patterns = []
        for attribute in self.attributes:
            for clause in CLAUSES[attribute]:
                # A clause may open a sentence, so its first letter may be a capital.
                first = clause[0]
                escaped = re.escape(clause).replace(r"\{name\}", _SUBJECT, 1).replace(r"\{value\}", _VALUE, 1)
                if first != "{":
                    escaped = f"[{first}{first.upper()}]" + escaped[1:]
                end = r"(?=[.,;:!?\n]|$)" if clause.endswith("{value}") else ""
                literals = len(clause.replace("{name}", "").replace("{value}", ""))
                patterns.append(_Pattern(attribute, re.compile(r"\b" + escaped + end), literals))
        return patterns

    def _say(self, template: str, concept: int) -> str:
        return template.format(name=self.names[concept], kind=self.kinds[concept])

    def _fact(self, rng: random.Random, concept: int, genre: Genre, attribute: str, clause: str) -> str:
        clause = clause.format(name=self.names[concept], value=self.facts[concept][attribute])
        return _sentence(_pick(rng, genre.frames).format(clause=clause))

    def _filler(self, rng: random.Random, concept: int, template: str) -> str:
        a, b, c = KINDS[self.kinds[concept]]
        person, other = _sample(rng, PERSONS, 2)
        adjective, other_adjective = _sample(rng, ADJECTIVES, 2)
        number = _pick(rng, NUMBERS)
        if not template.startswith("{number}"):
            number = number.lower()
        sentence = template.format(
            a=a,
            b=b,
            c=c,
            person=person,
            other=other,
            adjective=adjective,
            other_adjective=other_adjective,
            number=number,
        )
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", sentence)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _pick(rng: random.Random, items: list[T] | tuple[T, ...]) -> T:
    # Python keeps the numbers of random() the same in every version, but not those of choice() and sample().
    return items[int(rng.random() * len(items))]


def _sample(rng: random.Random, items: list[T] | tuple[T, ...], count: int) -> list[T]:
    """Return `count` different items in random order."""
    pool = list(items)
    return [pool.pop(int(rng.random() * len(pool))) for _ in range(count)]
