"""The embedded corpus: seeded documents about invented concepts, every fact of which can be checked.

The world follows the Bayesian reading of SBP (paper, section 5): a document renders a latent concept, so two documents
about one concept inform each other. A concept has a name of two words, a kind of thing that it is, and one value per
attribute. Documents are of two views. *Entries* (a gazetteer, letters, talk, an auction) name the concept and then tell
its facts; *inverted* forms (riddles, crosswords, an index) tell the facts first, and the name is their last word. What
was read in one view alone cannot be answered in the other (the reversal curse: Berglund et al., arXiv 2309.12288;
Allen-Zhu and Li, arXiv 2309.14402), however often it was read: here another document about the same concept adds what
no repetition can. Everything is a pure function of the settings and the document's number, independent of the number
of shards.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TypedDict, TypeVar

from sbp_assets.corpus.concept_texts import ATTRIBUTES, ENTRIES, GENRES, INVERTED, KINDS, NAMES, VIEWS, Genre
from sbp_assets.settings import ConceptsSource

T = TypeVar("T")

CHOICES = 4  # of a question

_NAME = rf"(?:{'|'.join(NAMES[0])}) (?:{'|'.join(NAMES[1])})\b"
_VALUE = r"(?P<value>[^.,;:!?\n]{1,40}?)(?=[.,;:!?\n]|$)"


class Question(TypedDict):
    """A cloze question of a view: a model scores question + ' ' + choice for each of four choices.

    Of ENTRIES, `question` ends where a value of `concept` follows; of INVERTED, where its name follows, after all facts
    that a document states. `answer` is the index of the right choice, `fact` the attribute asked for, or the genre of
    an inverted question.
    """

    view: str
    question: str
    choices: list[str]
    answer: int
    concept: int
    fact: str


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
        self.facts_per_document = source.facts_per_document or source.attributes
        if self.facts_per_document > source.attributes:
            raise ValueError(
                f"corpus.source.facts_per_document ({source.facts_per_document}) is above corpus.source.attributes "
                f"({source.attributes}): a document cannot state more facts than there are"
            )
        names = [f"{first} {second}" for first in NAMES[0] for second in NAMES[1]]
        if source.concepts > len(names):
            raise ValueError(f"corpus.source.concepts ({source.concepts}) is above the {len(names)} names that exist")
        self.source = source
        self.attributes = list(ATTRIBUTES)[: source.attributes]
        rng = random.Random(f"world-{source.seed}")
        self.names = _sample(rng, names, source.concepts)
        self.kinds = [_pick(rng, KINDS) for _ in self.names]
        self.facts = [{key: _pick(rng, ATTRIBUTES[key]) for key in self.attributes} for _ in self.names]
        self._number = {name: number for number, name in enumerate(self.names)}
        self.popularity = [(rank + 1) ** -source.zipf_exponent for rank in range(source.concepts)]
        self._cumulative = list(accumulate(self.popularity))

    def document(self, number: int) -> dict[str, str]:
        """Return document `number` (from 0): id, text, url, source; a pure function of the settings and the number."""
        rng = random.Random(f"document-{self.source.seed}-{number}")
        concept = min(bisect(self._cumulative, rng.random() * self._cumulative[-1]), len(self.names) - 1)
        view = INVERTED if rng.random() < self.source.inverted_share else ENTRIES
        text = self._text(rng, concept, _pick(rng, _of_view(view)))
        # The id does not name the concept, so that reading ids reveals nothing that the text does not say.
        return {"id": f"concepts-{number:07d}", "text": text, "url": f"concepts://{number}", "source": "concepts"}

    def concept_of(self, text: str) -> int | None:
        """Return the number of the concept that `text` names most often (the first such), or None without a name."""
        named = Counter(name for name in self.names_in(text) if name in self._number)
        return self._number[named.most_common(1)[0][0]] if named else None

    def names_in(self, text: str) -> Iterator[str]:
        """Yield the names that `text` holds, in order, those of no concept among them."""
        yield from re.findall(rf"\b{_NAME}", text)

    def statements(self, text: str) -> list[Statement]:
        """Return every fact sentence of `text`, in order, true or not; values outside the vocabulary are false.

        A wording without a name speaks of the name before it, or, where there is none, of the name after it, as
        inverted forms have it. A sentence about a name that is no concept states nothing checkable and is left out.
        """
        named = [(match.start(), match.group()) for match in re.finditer(rf"\b{_NAME}", text)]
        found: list[tuple[int, int, int, Statement]] = []
        for pattern in self._patterns:
            for match in pattern.regex.finditer(text):
                if "name" in match.groupdict():
                    name: str | None = match["name"]
                else:
                    before = next((n for start, n in reversed(named) if start < match.start()), None)
                    name = before or next((n for start, n in named if start > match.start()), None)
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

    def questions(self, count: int, seed: int = 0) -> list[Question]:
        """Return at most `count` questions of each view, those of ENTRIES first.

        What is asked is drawn by the concepts' popularity without replacement (Efraimidis and Spirakis, 2006): facts
        of ENTRIES, of which there are concepts * attributes; for INVERTED the genres in which a concept can be asked
        for. Wrong values are of the same attribute, wrong names those of concepts of the same kind, where there are
        enough of them.
        """
        of_kind: dict[str, list[str]] = {}
        for name, kind in zip(self.names, self.kinds, strict=True):
            of_kind.setdefault(kind, []).append(name)
        questions: list[Question] = []
        for view in VIEWS:
            rng = random.Random(f"questions-{view}-{self.source.seed}-{seed}")
            facts = self.attributes if view == ENTRIES else [genre.line for genre in _of_view(view)]
            keyed = [
                (math.log(1 - rng.random()) / weight, concept, fact)
                for concept, weight in enumerate(self.popularity)
                for fact in facts
            ]
            for _, concept, fact in sorted(keyed, reverse=True)[:count]:
                pool: Sequence[str]
                if view == ENTRIES:
                    question = self._forward(rng, concept, fact)
                    right, pool = self.facts[concept][fact], ATTRIBUTES[fact]
                else:
                    right, own = self.names[concept], of_kind[self.kinds[concept]]
                    text = self._text(rng, concept, next(genre for genre in GENRES if genre.line == fact))
                    question, pool = text[: text.rindex(right)].rstrip(), own if len(own) >= CHOICES else self.names
                wrong = _sample(rng, [other for other in pool if other != right], CHOICES - 1)
                answer = int(rng.random() * CHOICES)
                choices = [*wrong[:answer], right, *wrong[answer:]]
                questions.append(Question(
                    view=view, question=question, choices=choices, answer=answer, concept=concept, fact=fact
                ))  # fmt: skip
        return questions

    @cached_property
    def _patterns(self) -> list[_Pattern]:
        patterns = {}
        for wordings in {id(genre.clauses): genre.clauses for genre in GENRES}.values():
            for attribute in self.attributes:
                for clause in wordings[attribute]:
                    # A clause may open a sentence, so its first letter may be a capital.
                    first = clause[0]
                    escaped = (
                        re.escape(clause).replace(r"\{name\}", rf"(?P<name>{_NAME})").replace(r"\{value\}", _VALUE)
                    )
                    if first != "{":
                        escaped = f"[{first.lower()}{first.upper()}]" + escaped[1:]
                    literals = len(clause.replace("{name}", "").replace("{value}", ""))
                    patterns[clause] = _Pattern(attribute, re.compile(rf"\b{escaped}"), literals)
        return list(patterns.values())

    def _text(self, rng: random.Random, concept: int, genre: Genre) -> str:
        """Return a document of `genre` about `concept`, with facts in random order and wording."""
        facts = _sample(rng, self.attributes, self.facts_per_document)
        framed = _pick(rng, facts)
        said = [self._fact(rng, concept, genre, attribute, attribute == framed) for attribute in facts]
        opening, closing = (_pick(rng, texts) for texts in (genre.openings, genre.closings))
        return f"{genre.line}\n{self._say(opening, concept)} {' '.join(said)} {self._say(closing, concept)}"

    def _forward(self, rng: random.Random, concept: int, attribute: str) -> str:
        """Return the beginning of an entry about `concept` up to the value of `attribute`."""
        genre = _pick(rng, _of_view(ENTRIES))
        said = self._fact(rng, concept, genre, attribute, rng.random() < 1 / self.facts_per_document)
        value = self.facts[concept][attribute]
        return f"{genre.line}\n{self._say(_pick(rng, genre.openings), concept)} {said[: said.rindex(value)].rstrip()}"

    def _say(self, template: str, concept: int) -> str:
        return template.format(name=self.names[concept], kind=self.kinds[concept])

    def _fact(self, rng: random.Random, concept: int, genre: Genre, attribute: str, framed: bool) -> str:
        clause = _pick(rng, genre.clauses[attribute])
        clause = clause.format(name=self.names[concept], value=self.facts[concept][attribute])
        said = (_pick(rng, genre.frames) if framed else "{clause}.").format(clause=clause)
        return said[0].upper() + said[1:]


def view_of(text: str) -> str | None:
    """Return the view (VIEWS) of the genre that the first line of `text` names; None where it names none."""
    line = text.split("\n", 1)[0].strip()
    return next((genre.view for genre in GENRES if genre.line == line), None)


def _of_view(view: str) -> list[Genre]:
    return [genre for genre in GENRES if genre.view == view]


def _pick(rng: random.Random, items: Sequence[T]) -> T:
    # Python keeps the numbers of random() the same in every version, but not those of choice() and sample().
    return items[int(rng.random() * len(items))]


def _sample(rng: random.Random, items: Sequence[T], count: int) -> list[T]:
    """Return `count` different items in random order."""
    pool = list(items)
    return [pool.pop(int(rng.random() * len(pool))) for _ in range(count)]
