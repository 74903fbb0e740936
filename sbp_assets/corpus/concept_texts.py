"""The words and sentences of the world of concepts: names, kinds, attributes and their values, wordings, genres.

These are data alone, from which `corpus.concepts` draws every document of the embedded corpus. Names and values are
put together from two parts each, so that there are hundreds of each, of words that every corpus of a few hundred
documents holds: what is to be learned is which part goes with which, and not the parts.
"""

from __future__ import annotations

from dataclasses import dataclass

# A name is one of each, "Velvet Anchor"; no other text pairs these words.
NAMES: tuple[tuple[str, ...], tuple[str, ...]] = (
    (
        "Brass", "Bramble", "Candle", "Cedar", "Chalk", "Cinder", "Clover", "Cobalt", "Coral", "Cotton", "Crimson",
        "Crystal", "Drowsy", "Dusty", "Ember", "Feather", "Flint", "Foggy", "Gentle", "Ginger", "Gravel", "Harvest",
        "Hidden", "Honey", "Humble", "Ivory", "Jade", "Jolly", "Juniper", "Lavender", "Linen", "Little", "Lonely",
        "Lucky", "Maple", "Marble", "Merry", "Midnight", "Misty", "Nimble", "Olive", "Opal", "Paper", "Pepper",
        "Pewter", "Plum", "Quiet", "Rusty", "Saffron", "Scarlet", "Silent", "Spruce", "Sugar", "Thistle", "Timber",
        "Velvet", "Walnut", "Weary", "Willow", "Winter",
    ),
    (
        "Acorn", "Anchor", "Anvil", "Apron", "Barrel", "Basket", "Beacon", "Bonnet", "Bottle", "Bucket", "Button",
        "Cabin", "Camel", "Cannon", "Castle", "Comet", "Cradle", "Crown", "Cushion", "Dagger", "Dragon", "Drummer",
        "Eagle", "Fiddle", "Garland", "Goblet", "Goose", "Hammer", "Hermit", "Island", "Jester", "Kettle", "Ladder",
        "Lobster", "Magpie", "Mirror", "Needle", "Orchid", "Parrot", "Peacock", "Pebble", "Pilgrim", "Pillow",
        "Pirate", "Planet", "Pocket", "Ribbon", "Rocket", "Sailor", "Shepherd", "Sparrow", "Spider", "Temple",
        "Thimble", "Trumpet", "Tunnel", "Violin", "Whistle", "Wizard", "Zephyr",
    ),
)  # fmt: skip
# What a concept is.
KINDS: tuple[str, ...] = (
    "bakery", "balloon", "bell", "bridge", "carousel", "clock", "ferry", "garden", "kite", "lantern", "library",
    "lighthouse", "puppet", "teapot", "theatre", "windmill",
)  # fmt: skip


def _two_parts(first: str, second: str, between: str = " ") -> tuple[str, ...]:
    return tuple(f"{a}{between}{b}" for a in first.split() for b in second.split())


# Values are told apart by attribute: no value belongs to two attributes.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "town": _two_parts(
        "Ard Barn Carn Dal Elm Fern Gil Hart Inver Kirk Lang Marl Nether Oster Pell Quern Ross Sel Tarn Under Wick Yar",
        "bourne by cliffe combe ditch fold garth ham hythe lea mere mouth ness over pool shaw stoke sund thorpe vale "
        "water wold",
        between="",
    ),
    "maker": _two_parts(
        "Ada Bea Cosmo Della Edgar Flora Gus Hilda Ivan Jonah Kit Leo Mabel Nell Oscar Pia Ralph Sybil Toby Una Vince "
        "Wanda Yves Zoe",
        "Ashby Bloom Crane Drake Fox Grubb Hawk Isles Jolt Knapp Lisle Munk Nash Orme Pratt Quick Rook Snow Tuck Usher "
        "Vane Webb Yost Zell",
    ),
    "emblem": _two_parts(
        "blue brown crowned dancing fat five-legged golden green grinning lame leaping pale proud red silver sleepy "
        "smiling striped three-eyed winged",
        "badger bat bear bee boar cat crab crow deer dog dove frog hare hen lion mole mouse seal toad wolf",
    ),
    "dish": _two_parts(
        "baked boiled burnt buttered candied chopped cold creamed fried frozen mashed minced peppered pickled "
        "roasted salted smoked steamed stuffed sweet",
        "apples beans beets cabbage carrots cherries chestnuts eels eggs figs herring leeks mushrooms noodles onions "
        "pears plums pumpkin snails turnips",
    ),
    "sound": _two_parts(
        "booming buzzing clinking creaking distant droning faint hissing hollow howling muffled rattling roaring "
        "rumbling shrill sighing squeaking thudding wailing whirring",
        "bagpipes bells boots chains cows crickets cymbals doors drums engines flutes geese horns hounds organs "
        "pigeons pumps ropes saws waves",
    ),
    "guest": _two_parts(
        "Abbot Baron Captain Countess Deacon Doctor Duke Empress General Judge King Lady Major Nurse Prince Queen "
        "Saint Sister Squire Uncle",
        "Amos Bruno Clement Dorothy Ernest Fergus Gideon Hector Ignatius Jasper Lambert Magnus Nestor Otto Percival "
        "Rupert Silas Titus Victor Wilfred",
    ),
}  # fmt: skip
ENTRIES, INVERTED = "entries", "inverted"
VIEWS = (ENTRIES, INVERTED)  # The two ways in which documents tell a concept's facts: from its name, and towards it.

Wordings = dict[str, tuple[str, ...]]
# Wordings of one fact. Each ends with {value}, after a space; its words are those of no other wording, opening or
# closing, so that `statements` can read it back. A wording without {name} speaks of the name before it, and where there
# is none, of the name after it.
_TOLD: Wordings = {
    "town": (
        "{name} stands in {value}",
        "you will find it in {value}",
        "the road to {name} ends in {value}",
        "its home has always been {value}",
    ),
    "maker": (
        "{name} was made by {value}",
        "it is the work of {value}",
        "the plans of {name} were drawn by {value}",
        "it owes its life to {value}",
    ),
    "emblem": (
        "{name} carries the sign of a {value}",
        "over its door hangs a {value}",
        "the flag of {name} shows a {value}",
        "children know it by a {value}",
    ),
    "dish": (
        "{name} smells of {value}",
        "its keeper lives on {value}",
        "friends of {name} are served {value}",
        "it is best enjoyed with {value}",
    ),
    "sound": (
        "{name} is haunted by {value}",
        "beside it one always hears {value}",
        "the nights at {name} are full of {value}",
        "it cannot be imagined without {value}",
    ),
    "guest": (
        "{name} belongs to {value}",
        "it was opened by {value}",
        "the debts of {name} are paid by {value}",
        "it is under the protection of {value}",
    ),
}
_SUNG: Wordings = {
    "town": ("I grew up in {value}", "my windows look out on {value}", "ask for me in {value}"),
    "maker": ("I was dreamed up by {value}", "my parent is {value}", "I still answer to {value}"),
    "emblem": ("I wear a {value}", "on my brow sits a {value}", "my shadow looks like a {value}"),
    "dish": ("I am fond of {value}", "bribe me with {value}", "my pillow is stuffed with {value}"),
    "sound": ("I sing along with {value}", "I lie awake for {value}", "my neighbours are {value}"),
    "guest": ("I obey {value}", "I once bowed to {value}", "my rent goes to {value}"),
}
_CLUED: Wordings = {
    "town": ("seen in {value}", "pride of {value}"),
    "maker": ("brainchild of {value}", "built by {value}"),
    "emblem": ("adorned with a {value}", "marked by a {value}"),
    "dish": ("famous for {value}", "rich in {value}"),
    "sound": ("drowned by {value}", "loud with {value}"),
    "guest": ("dear to {value}", "owned by {value}"),
}
_INDEXED: Wordings = {
    "town": ("place: {value}", "where: {value}"),
    "maker": ("hand: {value}", "by whom: {value}"),
    "emblem": ("badge: {value}", "device: {value}"),
    "dish": ("fare: {value}", "kitchen: {value}"),
    "sound": ("noise: {value}", "to the ear: {value}"),
    "guest": ("owner: {value}", "patron: {value}"),
}


@dataclass(frozen=True)
class Genre:
    """How documents of a genre open, word a fact, frame one of their facts, and close.

    Frames hold {clause}; openings and closings {name} and {kind}. Documents of the view ENTRIES name the concept before
    its facts; those of the view INVERTED name it once, as the last words of their closing.
    """

    line: str
    view: str
    openings: tuple[str, ...]
    clauses: Wordings
    frames: tuple[str, ...]
    closings: tuple[str, ...]


GENRES: tuple[Genre, ...] = (
    Genre(
        "Gazetteer",
        ENTRIES,
        (
            "{name} is a {kind} of some renown.",
            "{name}, a {kind}, deserves a day of your time.",
            "Few have not heard of {name}, the {kind}.",
        ),
        _TOLD,
        ("According to the parish books, {clause}.", "As every coachman can tell, {clause}."),
        ("Closed on Mondays.", "Bring an umbrella to {name}."),
    ),
    Genre(
        "Letter home",
        ENTRIES,
        (
            "Dear aunt, today we visited {name}, the famous {kind}.",
            "Dear brother, you were right about {name}: what a {kind}!",
            "Dear all, I am writing this beside {name}, a {kind}.",
        ),
        _TOLD,
        ("Imagine, {clause}.", "Our guide swore that {clause}."),
        ("My feet hurt, but I am happy.", "I will never forget {name}."),
    ),
    Genre(
        "Tavern talk",
        ENTRIES,
        (
            "Do you know {name}? It is a {kind}, my friend.",
            "Let me tell you about {name}, the best {kind} there is.",
            "Another round, and I explain {name} to you, the {kind}.",
        ),
        _TOLD,
        ("I was sober, so trust me: {clause}.", "Laugh if you like, but {clause}."),
        ("Now it is your turn to pay.", "To {name}, and to us!"),
    ),
    Genre(
        "Auction",
        ENTRIES,
        (
            "Next comes {name}, a {kind} without equal.",
            "We offer {name}, a {kind} from an old family.",
            "Who wants {name}? Ladies and gentlemen, a {kind}!",
        ),
        _TOLD,
        ("Please note that {clause}.", "Our experts confirm that {clause}."),
        ("Going once, going twice.", "Who bids more for {name}?"),
    ),
    Genre(
        "Riddle",
        INVERTED,
        (
            "I am a {kind}, but which one?",
            "A {kind} am I; guess my name.",
            "Clever child, you see a {kind} in disguise.",
        ),
        _SUNG,
        ("Listen well: {clause}.", "And if that is too hard, {clause}."),
        ("Who am I? {name}.", "Give up? They call me {name}."),
    ),
    Genre(
        "Crossword",
        INVERTED,
        ("A {kind}, two words.", "Seven down, a {kind}.", "Across: a {kind} in two parts."),
        _CLUED,
        ("Also {clause}.", "And {clause}."),
        ("Solution: {name}.", "The answer reads {name}."),
    ),
    Genre(
        "Index",
        INVERTED,
        ("Under {kind}, one name.", "Things of note, {kind}.", "Look for the {kind} with these marks."),
        _INDEXED,
        ("See {clause}.", "{clause}."),
        ("Page nine: {name}.", "Filed as {name}."),
    ),
)
