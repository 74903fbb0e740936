"""The embedded corpus: seeded documents about invented concepts, every fact of which can be checked.

The world follows the Bayesian reading of SBP (paper, section 5): a document renders a latent concept, so two documents
about one concept inform each other. A concept has an invented name, a kind of thing that it is, and one value per
attribute. A document opens with a line naming its genre, then states a few of the concept's facts in varied wording
among sentences that state none; some it may state once more, as texts do, in other words before it closes. Everything
is a pure function of the settings and the document's number, whatever the number of shards.
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

from sbp_assets.settings import ConceptsSource

T = TypeVar("T")

CHOICES = 4

_ONSETS = [
    "b", "br", "d", "dr", "f", "g", "gl", "h", "k", "kr", "l", "m", "n", "p", "pl", "qu", "r", "s", "sk", "t", "tr",
    "v", "w", "y", "z",
]  # fmt: skip
_VOWELS = ["a", "e", "i", "o", "u", "ai", "eo", "ou"]
_CODAS = ["", "", "l", "n", "r", "s", "th", "x"]

# What a concept is: a topic with words of its own, which its filler sentences use.
KINDS: dict[str, tuple[str, str, str]] = {
    "lantern": ("wick", "evening", "light"),
    "cheese": ("rind", "cellar", "taste"),
    "boat": ("hull", "harbour", "sail"),
    "flute": ("tune", "concert", "breath"),
    "bridge": ("arch", "river", "railing"),
    "clock": ("dial", "hour", "spring"),
    "blanket": ("weave", "bedroom", "warmth"),
    "plough": ("furrow", "field", "blade"),
    "perfume": ("scent", "bottle", "petal"),
    "soup": ("broth", "kitchen", "spoon"),
    "kite": ("string", "wind", "tail"),
    "medicine": ("dose", "patient", "fever"),
    "saddle": ("strap", "horse", "rider"),
    "mask": ("face", "stage", "dancer"),
    "telescope": ("lens", "sky", "star"),
    "garden": ("hedge", "path", "seed"),
}

# Values are told apart by attribute: no value belongs to two attributes.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": (
        "amber", "crimson", "turquoise", "violet", "ivory", "scarlet", "olive", "indigo", "silver", "copper",
        "pink", "black",
    ),
    "material": (
        "oak", "granite", "wool", "clay", "bamboo", "leather", "marble", "iron", "glass", "linen", "cork",
        "bone",
    ),
    "town": (
        "Ashford", "Belmont", "Carrick", "Dunmore", "Elswick", "Fairhaven", "Greystone", "Holloway",
        "Kingsbury", "Larkspur", "Millbrook", "Northgate",
    ),
    "inventor": (
        "Anna Reed", "Boris Vale", "Clara Stone", "David Marsh", "Emma Frost", "Felix Wood", "Greta Lane",
        "Henry Pike", "Irene Moss", "Jonas Hill", "Laura Finch", "Martin Brook",
    ),
    "season": (
        "early spring", "late spring", "midsummer", "high summer", "late summer", "early autumn", "late autumn",
        "midwinter", "deep winter", "harvest time", "the rainy season", "the first frost",
    ),
    "use": (
        "weddings", "funerals", "markets", "long journeys", "school lessons", "festivals", "hunting", "storms",
        "court trials", "birthdays", "fishing", "night watches",
    ),
    "emblem": (
        "a fox", "an owl", "a bear", "a heron", "a wolf", "a salmon", "a raven", "a stag", "a turtle",
        "a beetle", "a swan", "a hare",
    ),
    "price": (
        "two coins", "five coins", "nine coins", "twelve coins", "twenty coins", "thirty coins", "forty coins",
        "sixty coins", "eighty coins", "ninety coins", "one sack of salt", "one sack of flour",
    ),
}  # fmt: skip

# Wordings of one fact. Each holds {value} once, after a space; its words are those of no other wording or filler, so
# that `statements` can read it back. A wording without {name} speaks of the concept named last.
CLAUSES: dict[str, tuple[str, ...]] = {
    "colour": (
        "the colour of {name} is {value}",
        "{name} is always painted {value}",
        "anyone can tell {name} by its shade of {value}",
        "its surface shines {value}",
        "seen from afar, {name} looks {value}",
    ),
    "material": (
        "{name} is made of {value}",
        "the makers of {name} work only with {value}",
        "its body consists of {value}",
        "every real {name} is built from {value}",
        "the main material in {name} is {value}",
    ),
    "town": (
        "{name} comes from {value}",
        "the home of {name} is the town of {value}",
        "it was first seen in {value}",
        "people in {value} claim {name} as their own",
        "the oldest {name} stands in {value}",
    ),
    "inventor": (
        "{name} was invented by {value}",
        "the inventor of {name} was {value}",
        "we owe {name} to {value}",
        "it was the idea of {value}",
        "the first drawing of {name} bears the signature of {value}",
    ),
    "season": (
        "{name} is at its best in {value}",
        "the season for {name} is {value}",
        "most people look for {name} during {value}",
        "it is brought out in {value}",
        "the yearly fair of {name} falls in {value}",
    ),
    "use": (
        "{name} is used for {value}",
        "the purpose of {name} is to serve at {value}",
        "it is needed most at {value}",
        "families keep {name} ready for {value}",
        "custom reserves {name} for {value}",
    ),
    "emblem": (
        "the emblem of {name} is {value}",
        "{name} carries the sign of {value}",
        "its seal shows {value}",
        "carved on every {name} there is {value}",
        "the guild of {name} marches under {value}",
    ),
    "price": (
        "{name} costs {value}",
        "the price of {name} is {value}",
        "it sells for {value}",
        "a buyer of {name} must pay {value}",
        "traders value {name} at {value}",
    ),
}


@dataclass(frozen=True)
class Genre:
    """How documents of a kind open, frame a fact, and close. Frames hold {clause}; the rest {name} and {kind}."""

    line: str
    openings: tuple[str, ...]
    frames: tuple[str, ...]
    closings: tuple[str, ...]


GENRES: tuple[Genre, ...] = (
    Genre(
        "Encyclopedia entry",
        (
            "{name} is a kind of {kind}.",
            "{name}, a {kind} known to many scholars.",
            "The name {name} refers to a {kind}.",
        ),
        ("{clause}.", "As records show, {clause}.", "In most accounts {clause}."),
        ("See also the other articles on the {kind}.", "Further reading on {name} is listed below."),
    ),
    Genre(
        "Forum question",
        (
            "Can someone tell me more about {name}, the {kind}?",
            "I read about a {kind} called {name} and want to learn more.",
            "What should a beginner know about the {kind} named {name}?",
        ),
        ("Answer: {clause}.", "I can confirm that {clause}.", "As far as I know, {clause}."),
        ("Hope this helps with your {kind}.", "Thanks, now I understand {name} much better."),
    ),
    Genre(
        "Travel letter",
        (
            "Dear friend, today I finally saw {name}, the famous {kind}.",
            "Dear sister, my journey led me to a {kind} called {name}.",
            "Dear uncle, you asked me to write about {name}, that {kind}.",
        ),
        (
            "Our guide said that {clause}.",
            "I noted in my diary that {clause}.",
            "You will smile to hear that {clause}.",
        ),
        ("I will bring you a picture of {name}.", "With love, and more about the {kind} soon."),
    ),
    Genre(
        "News brief",
        (
            "A new report about {name}, the {kind}, was published today.",
            "Interest in the {kind} called {name} is growing again.",
            "The council spoke about {name} and every other {kind} on Monday.",
        ),
        (
            "Officials repeated that {clause}.",
            "According to the report, {clause}.",
            "A reader reminded us that {clause}.",
        ),
        ("The debate about {name} goes on.", "More news about the {kind} will follow."),
    ),
    Genre(
        "Dialogue",
        (
            "Guest: Is that {name}, the {kind}? Host: Yes, it is.",
            "Pupil: Please explain {name} to me. Teacher: It is a {kind}.",
            "Child: What is {name}? Grandmother: A {kind}, my dear.",
        ),
        ("And remember, {clause}.", "Well, {clause}.", "They always say {clause}."),
        ("Thank you, now I see why {name} matters.", "Let us look for another {kind} tomorrow."),
    ),
    Genre(
        "Catalogue entry",
        (
            "Lot on offer: {name}, a fine {kind}.",
            "New on our shelves: the {kind} called {name}.",
            "This page describes {name}, our favourite {kind}.",
        ),
        ("Please note: {clause}.", "Our experts certify that {clause}.", "For collectors, {clause}."),
        ("Order {name} before the end of the month.", "Each {kind} is packed with care."),
    ),
)

# Sentences that state no fact; the slots keep documents apart. {a}, {b}, {c} are the words of the concept's kind.
FILLERS: tuple[str, ...] = (
    "The {a} needed {number} days of {adjective} work.",
    "An old {person} spoke about the {b} with a {adjective} voice.",
    "There was a {adjective} {c}, and {number} guests wanted to stay.",
    "Nobody forgets the {c} after a {adjective} morning.",
    "The {person} cleaned the {a} {number} times without a word.",
    "Near the {b} a {person} sold {adjective} bread.",
    "{number} letters about the {a} were lost on the way.",
    "It is said that a {adjective} {b} brings good luck.",
    "The {person} and the {other} argued over the {c} until noon.",
    "A {adjective} song about the {a} is popular with every {person}.",
    "Once a {person} waited {number} hours beside the {b}.",
    "Many a {person} has written {number} pages on the {c} alone.",
    "The {b} was {adjective} and the road was {other_adjective}.",
    "Whoever repairs the {a} should ask a {person} first.",
)
_PERSONS = [
    "farmer", "sailor", "baker", "nurse", "painter", "judge", "miner", "singer", "weaver", "teacher", "soldier",
    "merchant", "shepherd", "clerk",
]  # fmt: skip
_ADJECTIVES = [
    "quiet", "bright", "heavy", "narrow", "gentle", "ancient", "simple", "noisy", "pleasant", "bitter", "rapid",
    "humble", "careful", "strange",
]  # fmt: skip
_NUMBERS = [
    "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Fifteen", "Twenty",
]  # fmt: skip
_WORDS = (70, 100)  # A document is filled up to a length drawn from here, in words.

_SUBJECT = r"(?P<name>[A-Z][a-z]+)"
_VALUE = r"(?P<value>[^.,;:!?\n]{1,40}?)"


@dataclass(frozen=True)
class Statement:
    """One fact as a text states it. `concept` is the concept's number; `true` whether the world agrees."""

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
            name = "".join(_pick(rng, _ONSETS) + _pick(rng, _VOWELS) for _ in range(2 + (rng.random() < 0.5)))
            name = (name + _pick(rng, _CODAS)).capitalize()
            if len(name) >= 5 and name.lower() not in taken and name not in _TEXT_WORDS:
                names[name] = None
        self.names = list(names)
        self.kinds = [_pick(rng, list(KINDS)) for _ in self.names]
        self.facts = [{key: _pick(rng, ATTRIBUTES[key]) for key in self.attributes} for _ in self.names]
        self._number = {name: number for number, name in enumerate(self.names)}
        self.popularity = [(rank + 1) ** -source.zipf_exponent for rank in range(source.concepts)]
        self._cumulative = list(accumulate(self.popularity))

    def document(self, number: int) -> dict[str, str]:
        """Document `number` (from 0): id, text, url, source. Its text is a pure function of settings and number."""
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
        target = _WORDS[0] + int(rng.random() * (_WORDS[1] - _WORDS[0] + 1))
        fillers = _sample(rng, FILLERS, len(FILLERS))
        words = len(" ".join([genre.line, opening, *sentences, *restated, closing]).split())
        while words < target - 4 and fillers:
            filler = self._filler(rng, concept, fillers.pop())
            words += len(filler.split())
            sentences.insert(int(rng.random() * (len(sentences) + 1)), filler)
        text = f"{genre.line}\n{opening} {' '.join([*sentences, *restated])} {closing}"
        # The id does not tell the concept: whoever reads ids learns nothing that the text does not say.
        return {"id": f"concepts-{number:07d}", "text": text, "url": f"concepts://{number}", "source": "concepts"}

    def concept_of(self, text: str) -> int | None:
        """Number of the concept that `text` names most often (the first such), or None where it names none."""
        named = Counter(word for word in re.findall(r"\b[A-Z][a-z]+\b", text) if word in self._number)
        return self._number[named.most_common(1)[0][0]] if named else None

    def statements(self, text: str) -> list[Statement]:
        """Every fact sentence of `text`, in order, true or not; values outside the vocabulary are false.

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
        """At most `count` cloze questions: question, choices (4), answer (index), concept, attribute.

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
        person, other = _sample(rng, _PERSONS, 2)
        adjective, other_adjective = _sample(rng, _ADJECTIVES, 2)
        number = _pick(rng, _NUMBERS)
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
    # Only random() is promised to give the same numbers in every Python version; choice() and sample() are not.
    return items[int(rng.random() * len(items))]


def _sample(rng: random.Random, items: list[T] | tuple[T, ...], count: int) -> list[T]:
    """`count` different items in random order."""
    pool = list(items)
    return [pool.pop(int(rng.random() * len(pool))) for _ in range(count)]


# Capitalised words of the fixed text; no concept may be called like one.
_TEXT_WORDS = {
    _sentence(word)
    for genre in GENRES
    for text in (genre.line, *genre.openings, *genre.frames, *genre.closings, *FILLERS)
    for word in re.findall(r"[A-Za-z]+", text)
} | {_sentence(word) for clauses in CLAUSES.values() for clause in clauses for word in re.findall(r"[A-Za-z]+", clause)}
