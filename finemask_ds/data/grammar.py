"""Sentences and documents of the built-in language, drawn from the words of `lexicon`.

The grammar knows a fixed world (who has which job, what is the capital of what): these facts hold in every document,
whatever the seed. All else is drawn.
"""

import functools
import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from finemask_ds.data import lexicon
from finemask_ds.data.lexicon import TOPICS, Kind, Topic, article, past

T = TypeVar("T")


class Draw:
    """A stream of random choices that is the same on every machine and Python: only `random.Random.random` is used.

    The key is any sequence of strings and integers; equal keys give equal streams.
    """

    def __init__(self, *key: str | int) -> None:
        self._uniform = random.Random("/".join(map(str, key))).random

    def below(self, count: int) -> int:
        """Return an integer in [0, count)."""
        return int(self._uniform() * count)

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return self._uniform() < probability

    def pick(self, options: Sequence[T]) -> T:
        """Return one of the options."""
        return options[int(self._uniform() * len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """Return the options in random order (Fisher-Yates)."""
        items = list(options)
        for last in range(len(items) - 1, 0, -1):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]
        return items


class Person(NamedTuple):
    """A named person and the facts about them."""

    name: str
    female: bool
    topic: Topic
    job: str
    town: str
    color: str
    thing: str

    @property
    def subject(self) -> str:
        """The pronoun that stands for the person as a subject."""
        return "she" if self.female else "he"

    @property
    def possessive(self) -> str:
        """The pronoun that stands before what the person owns."""
        return "her" if self.female else "his"


class Country(NamedTuple):
    """A country and the facts about it; towns[0] is the capital."""

    name: str
    towns: tuple[str, str]
    river: str
    product: str


class World(NamedTuple):
    """The people and countries of the language."""

    people: tuple[Person, ...]
    countries: tuple[Country, ...]


@functools.cache
def world() -> World:
    """Return the one fixed world in which every document is set."""
    draw = Draw("world")
    women, men = draw.shuffled(lexicon.WOMEN), draw.shuffled(lexicon.MEN)
    names = [
        (name, female)
        for pair in zip(women, men, strict=True)
        for name, female in zip(pair, (True, False), strict=True)
    ]
    jobs = [(topic, topic.jobs[index]) for index in range(3) for topic in draw.shuffled(TOPICS)]
    things = draw.shuffled([member for topic in TOPICS for kind in topic.kinds for member in kind.members])
    towns = draw.shuffled(lexicon.TOWNS)
    people = tuple(
        Person(name, female, topic, job, draw.pick(towns), draw.pick(lexicon.COLORS), thing)
        for (name, female), (topic, job), thing in zip(names, jobs, things[:24], strict=True)
    )
    countries = tuple(
        Country(name, (towns[2 * index], towns[2 * index + 1]), river, draw.pick(topic.kinds[index % 2].members))
        for index, (name, river, topic) in enumerate(
            zip(draw.shuffled(lexicon.COUNTRIES), draw.shuffled(lexicon.RIVERS), draw.shuffled(TOPICS), strict=True)
        )
    )
    return World(people, countries)


def cast(draw: Draw, topic: Topic, count: int) -> list[Person]:
    """Return different people, those whose job belongs to the topic first."""
    people = draw.shuffled(world().people)
    return sorted(people, key=lambda person: person.topic is not topic)[:count]


class Event(NamedTuple):
    """Someone did something to a thing somewhere, in the past; a slot that says less is more general.

    `agent` is a name or "" (someone, anyone), `thing` a member of `kind` or "" (any of the kind), `place` may be ""
    (somewhere). `positive` False says that no such event took place.
    """

    agent: str
    verb: str
    kind: Kind
    thing: str
    place: str
    positive: bool = True

    def text(self, passive: bool = False, adjective: str = "", determiner: str = "") -> str:
        """Return the event as a clause without a full stop.

        The thing comes with its adjective and the determiner ("the"; by default "a" or "an", "no" in a passive
        denial).
        """
        noun = " ".join(filter(None, (adjective, self.thing or self.kind.name)))
        place = f" in the {self.place}" if self.place else ""
        a_noun = f"{determiner or article(noun)} {noun}"
        if passive:
            by = f" by {self.agent}" if self.agent else ""
            if self.positive or determiner:
                return f"{a_noun} was {'' if self.positive else 'not '}{lexicon.participle(self.verb)}{by}{place}"
            return f"no {noun} was {lexicon.participle(self.verb)}{by}{place}"
        if self.positive:
            return f"{self.agent or 'someone'} {past(self.verb)} {a_noun}{place}"
        if not self.agent:
            return f"nobody {past(self.verb)} {a_noun}{place}"
        return f"{self.agent} did not {self.verb} {a_noun}{place}"


def event(draw: Draw, topic: Topic, people: Sequence[Person], place: float = 0.5) -> Event:
    """Return a positive event of a topic in which every slot is filled; a place with the given probability."""
    kind = draw.pick(topic.kinds)
    verb = draw.pick(draw.pick(lexicon.VERB_SYNONYMS)) if draw.chance(0.3) else draw.pick(kind.verbs)
    where = draw.pick(topic.places) if draw.chance(place) else ""
    return Event(draw.pick(people).name, verb, kind, draw.pick(kind.members), where)


def synonym(verb: str) -> str:
    """Return the other verb of the same meaning, or the verb itself where there is none."""
    for first, second in lexicon.VERB_SYNONYMS:
        if verb in (first, second):
            return second if verb == first else first
    return verb
