"""The words of the built-in language: topics, people, countries, evaluative words, and how words inflect.

All of it was written for this project. Stems and endings are kept apart wherever English allows it, because each
ending (``##s``, ``##ed``, ``##ing``, ``##ly``, ...) is a WordPiece of its own.
"""

from typing import NamedTuple


class Kind(NamedTuple):
    """A hypernym, its members, the verbs that take them as objects and the adjectives that go with them."""

    name: str
    members: tuple[str, ...]
    verbs: tuple[str, ...]
    adjectives: tuple[str, ...]


class Topic(NamedTuple):
    """What a document can be about: two kinds of things, the jobs that handle them, the places they are in."""

    kinds: tuple[Kind, Kind]
    jobs: tuple[str, ...]
    places: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _kind(name: str, members: str, verbs: str, adjectives: str) -> Kind:
    return Kind(name, _words(members), _words(verbs), _words(adjectives))


def _topic(jobs: str, places: str, first: Kind, second: Kind) -> Topic:
    return Topic((first, second), _words(jobs), _words(places))


TOPICS = (
    _topic(
        "farmer shepherd rancher",
        "barn meadow stable",
        _kind("animal", "cow goat hen lamb donkey", "brush herd groom", "hungry tame spotted"),
        _kind("crop", "carrot turnip pumpkin bean onion", "plant harvest water", "ripe muddy leafy"),
    ),
    _topic(
        "chef baker waiter",
        "kitchen tavern cellar",
        _kind("dish", "soup stew pudding salad pie", "taste season sweeten", "hot salty creamy"),
        _kind("container", "kettle pot jug bowl pan", "fill drain heat", "copper steaming dented"),
    ),
    _topic(
        "sailor captain diver",
        "harbor lagoon dock",
        _kind("vessel", "canoe raft barge kayak trawler", "sail anchor launch", "wooden leaky swift"),
        _kind("fish", "eel cod herring salmon pike", "hook salt grill", "slippery silver fat"),
    ),
    _topic(
        "singer drummer conductor",
        "hall theater studio",
        _kind("instrument", "violin flute drum harp trumpet", "tune polish pluck", "loud golden delicate"),
        _kind("song", "ballad hymn anthem waltz march", "perform learn record", "solemn merry famous"),
    ),
    _topic(
        "carpenter smith plumber",
        "workshop forge shed",
        _kind("tool", "hammer spade chisel drill wrench", "sharpen oil borrow", "rusty blunt heavy"),
        _kind("furnishing", "stool bench cabinet table ladder", "sand varnish stain", "oaken solid square"),
    ),
    _topic(
        "teacher pupil librarian",
        "school library classroom",
        _kind("book", "novel atlas journal manual textbook", "print edit collect", "thick dusty printed"),
        _kind("picture", "map chart poster portrait mural", "paint sketch color", "faded framed detailed"),
    ),
    _topic(
        "gardener florist forester",
        "garden park orchard",
        _kind("flower", "rose tulip violet orchid daffodil", "pick smell gather", "fragrant pale wild"),
        _kind("tree", "oak elm maple willow cedar", "climb fell inspect", "tall bare shady"),
    ),
    _topic(
        "merchant tailor grocer",
        "market shop bazaar",
        _kind("garment", "coat shirt hat jacket glove", "fold mend iron", "woolen striped warm"),
        _kind("fruit", "apple pear plum lemon melon", "peel weigh crush", "sweet sour juicy"),
    ),
)

WOMEN = _words("anna clara edith fiona greta hilda irene julia laura maria nora olga")
MEN = _words("adam bruno conrad david emil felix gustav henry ivan jonas karl leon")
COUNTRIES = _words("valdoria norwick kartha meruvia osterra pellandor sudrava talmira")
RIVERS = _words("tarn olva drun hesk maru brenn kalda yorrin")
TOWNS = _words(
    "arvik belmora corvane dunmere eskavar fenholt garrow hollin ivendal jorund kestrin lumara morvale nadrin ostrel"
    " quillon"
)
COLORS = _words("red blue green white black yellow")

# Verbs that take any object: each with a synonym.
VERB_SYNONYMS = (
    ("see", "notice"),
    ("find", "discover"),
    ("keep", "retain"),
    ("bring", "deliver"),
    ("fix", "repair"),
    ("want", "desire"),
    ("watch", "observe"),
    ("hide", "conceal"),
)
ADJECTIVE_SYNONYMS = (
    ("big", "large"),
    ("small", "little"),
    ("old", "ancient"),
    ("new", "modern"),
    ("costly", "expensive"),
    ("cheap", "inexpensive"),
    ("odd", "strange"),
    ("plain", "ordinary"),
)
# What subjects do on their own.
INTRANSITIVE = _words("rest laugh wait work listen stumble return smile")

GOOD = _words(
    "superb lovely splendid charming delightful excellent wonderful brilliant pleasant graceful admirable fabulous"
    " magnificent exquisite gorgeous perfect impressive remarkable glorious elegant"
)
BAD = _words(
    "awful dreadful terrible horrid dull ugly boring clumsy tedious shabby dismal nasty lousy bland grim miserable"
    " hideous tiresome dreary mediocre"
)
WELL = _words("superbly splendidly brilliantly pleasantly perfectly elegantly")
BADLY = _words("badly dreadfully blandly grimly dismally tediously")
WELCOME = _words("praise admire enjoy recommend applaud")
SHUN = _words("criticize avoid regret reject mock")

FUNCTION_WORDS = _words(
    "a an the this these every some no many two is are was were did does has not she it he her his its their who"
    " what where someone nobody one in of by from with near and but yes perhaps although while then often capital"
    " river town live own belong as home run through to longest famous for other words four five star visitor guest"
    " overall seemed looked gave we"
)
PUNCTUATION = (".", ",", "?")
ENDINGS = _words("##s ##es ##ed ##ing ##e ##ly")

# Base -> (past, participle).
IRREGULAR = {
    "see": ("saw", "seen"),
    "find": ("found", "found"),
    "keep": ("kept", "kept"),
    "bring": ("brought", "brought"),
    "hide": ("hid", "hidden"),
}


def stem(verb: str) -> str:
    """Return the WordPiece a regular verb starts with: the verb without a final mute e."""
    return verb[:-1] if verb.endswith("e") and verb not in IRREGULAR else verb


def plural(noun: str) -> str:
    """Return the plural of a noun."""
    return noun + ("es" if noun.endswith(("s", "x", "z", "ch", "sh")) else "s")


def third(verb: str) -> str:
    """Return the third person singular present of a verb."""
    return plural(verb)


def past(verb: str) -> str:
    """Return the past tense of a verb."""
    return IRREGULAR[verb][0] if verb in IRREGULAR else stem(verb) + "ed"


def participle(verb: str) -> str:
    """Return the past participle of a verb."""
    return IRREGULAR[verb][1] if verb in IRREGULAR else stem(verb) + "ed"


def gerund(verb: str) -> str:
    """Return the -ing form of a verb."""
    return (verb[:-1] if verb.endswith("e") and verb != "see" else verb) + "ing"


def article(word: str) -> str:
    """Return the indefinite article that goes before a word."""
    return "an" if word[0] in "aeiou" else "a"


def pieces() -> list[str]:
    """Return every WordPiece of the language but the special tokens, endings first, in a fixed order."""
    words: dict[str, None] = dict.fromkeys((*PUNCTUATION, *ENDINGS, *FUNCTION_WORDS))
    for topic in TOPICS:
        words.update(dict.fromkeys((*topic.jobs, *topic.places)))
        for kind in topic.kinds:
            words.update(dict.fromkeys((kind.name, *kind.members, *kind.adjectives)))
            words.update(dict.fromkeys(map(stem, kind.verbs)))
    for names in (WOMEN, MEN, COUNTRIES, RIVERS, TOWNS, COLORS, GOOD, BAD, ("bad",)):
        words.update(dict.fromkeys(names))
    for pair in VERB_SYNONYMS:
        words.update(dict.fromkeys(map(stem, pair)))
    words.update(dict.fromkeys(word for pair in ADJECTIVE_SYNONYMS for word in pair))
    words.update(dict.fromkeys(map(stem, (*INTRANSITIVE, *WELCOME, *SHUN))))
    words.update(dict.fromkeys(form for forms in IRREGULAR.values() for form in forms))
    words["hid"] = None
    return list(words)
