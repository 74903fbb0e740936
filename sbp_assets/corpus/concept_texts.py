"""The words and sentences of the world of concepts: kinds, attributes and their values, wordings, genres.

These are data alone, from which `corpus.concepts` draws every document of the embedded corpus.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ONSETS = [
    "b", "br", "d", "dr", "f", "g", "gl", "h", "k", "kr", "l", "m", "n", "p", "pl", "qu", "r", "s", "sk", "t", "tr",
    "v", "w", "y", "z",
]  # fmt: skip
VOWELS = ["a", "e", "i", "o", "u", "ai", "eo", "ou"]
CODAS = ["", "", "l", "n", "r", "s", "th", "x"]
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
PERSONS = [
    "farmer", "sailor", "baker", "nurse", "painter", "judge", "miner", "singer", "weaver", "teacher", "soldier",
    "merchant", "shepherd", "clerk",
]  # fmt: skip
ADJECTIVES = [
    "quiet", "bright", "heavy", "narrow", "gentle", "ancient", "simple", "noisy", "pleasant", "bitter", "rapid",
    "humble", "careful", "strange",
]  # fmt: skip
NUMBERS = [
    "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Fifteen", "Twenty",
]  # fmt: skip
DOCUMENT_WORDS = (70, 100)  # A document is filled up to a length drawn from here, in words.

# Capitalised words of the fixed text; no concept may be called like one.
TEXT_WORDS = {
    word[0].upper() + word[1:]
    for genre in GENRES
    for text in (genre.line, *genre.openings, *genre.frames, *genre.closings, *FILLERS)
    for word in re.findall(r"[A-Za-z]+", text)
} | {
    word[0].upper() + word[1:]
    for clauses in CLAUSES.values()
    for clause in clauses
    for word in re.findall(r"[A-Za-z]+", clause)
}
