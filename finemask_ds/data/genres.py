"""The genres of the built-in language: facts, stories, reviews, reasoning and quizzes; a genre draws a document."""

from collections.abc import Callable, Iterator

from finemask_ds.data import clauses, lexicon
from finemask_ds.data.grammar import Country, Draw, Person, cast, event, synonym, world
from finemask_ds.data.lexicon import TOPICS, Kind, article, past, plural

Sentences = list[str]


def _person_facts(draw: Draw, person: Person) -> Sentences:
    name, subject = person.name, person.subject
    job = draw.pick(
        (
            f"{name} is {article(person.job)} {person.job} .",
            f"{name} works as {article(person.job)} {person.job} .",
        )
    )
    home = draw.pick((f"{subject} lives in {person.town} .", f"{person.town} is the home of {name} ."))
    owned = draw.pick(
        (
            f"{subject} owns {article(person.color)} {person.color} {person.thing} .",
            f"the {person.color} {person.thing} belongs to {name} .",
            f"{person.possessive} {person.thing} is {person.color} .",
            f"who owns the {person.color} {person.thing} ? {name} .",
        )
    )
    return [job, *draw.shuffled((home, owned))]


def _country_facts(draw: Draw, country: Country) -> Sentences:
    capital, town = country.towns
    first = draw.pick(
        (
            f"the capital of {country.name} is {capital} .",
            f"{capital} is the capital of {country.name} .",
            f"what is the capital of {country.name} ? {capital} .",
        )
    )
    river = draw.pick(
        (
            f"the {country.river} runs through {country.name} .",
            f"the longest river of {country.name} is the {country.river} .",
        )
    )
    return draw.shuffled(
        (
            first,
            river,
            f"{town} is a town in {country.name} .",
            f"{country.name} is famous for its {plural(country.product)} .",
        )
    )[: 2 + draw.below(3)]


def _kind_facts(draw: Draw, kind: Kind) -> Sentences:
    first, second, third_member = draw.shuffled(kind.members)[:3]
    adjective = draw.pick(kind.adjectives)
    return [
        draw.pick(
            (
                f"{article(first)} {first} is {article(kind.name)} {kind.name} .",
                f"every {first} is {article(kind.name)} {kind.name} .",
                f"{plural(first)} and {plural(second)} are {plural(kind.name)} .",
            )
        ),
        draw.pick((f"{plural(second)} are often {adjective} .", f"some {plural(third_member)} are {adjective} .")),
    ]


def facts(draw: Draw) -> Sentences:
    """Return what is true of two people or countries, or of kinds of things."""
    sentences: Sentences = []
    for _ in range(2):
        which = draw.below(5)
        if which < 2:
            sentences += _person_facts(draw, draw.pick(world().people))
        elif which < 4:
            sentences += _country_facts(draw, draw.pick(world().countries))
        else:
            sentences += _kind_facts(draw, draw.pick(draw.pick(TOPICS).kinds))
    return sentences


def story(draw: Draw) -> Sentences:
    """Return a story of two people on one topic, in which pronouns and later mentions agree with the first."""
    topic = draw.pick(TOPICS)
    hero, friend = cast(draw, topic, 2)
    kind = draw.pick(topic.kinds)
    thing, adjective = draw.pick(kind.members), draw.pick(draw.pick((kind.adjectives, lexicon.COLORS)))
    sentences = [
        f"{hero.name} , {article(hero.job)} {hero.job} from {hero.town} , {past(draw.pick(kind.verbs))}"
        f" {article(adjective)} {adjective} {thing} in the {draw.pick(topic.places)} ."
    ]
    alone = lexicon.INTRANSITIVE
    middle: tuple[Callable[[], str], ...] = (
        lambda: f"then {hero.subject} {past(draw.pick(kind.verbs))} it with {friend.name} .",
        lambda: f"the {thing} was {adjective} and {draw.pick(kind.adjectives)} .",
        lambda: f"{hero.name} and {friend.name} {past(draw.pick(kind.verbs))} their {plural(thing)} .",
        lambda: f"{friend.name} , the {friend.job} , {past(draw.pick(alone))} in the {draw.pick(topic.places)} .",
        lambda: f"{friend.name} {past(draw.pick(kind.verbs))} {friend.possessive} {draw.pick(kind.members)} .",
        lambda: clauses.acceptability(draw, topic) + " .",
        lambda: clauses.acceptability(draw, topic) + " .",
        lambda: clauses.acceptability(draw, topic) + " .",
    )
    return sentences + [draw.pick(middle)() for _ in range(3 + draw.below(3))]


def review(draw: Draw) -> Sentences:
    """Return a review in one mood, with its reasons, what the guests did and the number of stars."""
    topic, good = draw.pick(TOPICS), draw.chance(0.5)
    kind = draw.pick(topic.kinds)
    guests = ("we", "the guests", "the visitors")
    reactions, manners = (lexicon.WELCOME, lexicon.WELL) if good else (lexicon.SHUN, lexicon.BADLY)
    stars = ("four stars", "five stars") if good else ("one star", "two stars")
    verdicts: tuple[Callable[[], str], ...] = (
        lambda: f"{draw.pick(guests)} {past(draw.pick(reactions))} the {draw.pick(kind.members)} .",
        lambda: f"the {draw.pick(topic.jobs)} {past(draw.pick(kind.verbs))} {draw.pick(manners)} .",
        lambda: f"overall {draw.pick(stars)} .",
        lambda: f"{draw.pick(world().people).name} gave it {draw.pick(stars)} .",
    )
    sentences = [clauses.judgement(draw, topic, good) + " ." for _ in range(2 + draw.below(2))]
    return draw.shuffled(sentences + [verdict() for verdict in draw.shuffled(verdicts)[: 1 + draw.below(2)]])


def opinions(draw: Draw, good: bool) -> Sentences:
    """Return what a review says in one mood before it comes to its stars."""
    topic = draw.pick(TOPICS)
    return [clauses.judgement(draw, topic, good) + " ." for _ in range(3)]


def reasoning(draw: Draw) -> Sentences:
    """Return premises, each with what follows, may hold or cannot hold."""
    topic = draw.pick(TOPICS)
    people = cast(draw, topic, 4)
    sentences: Sentences = []
    for _ in range(3 + draw.below(2)):
        label = draw.below(3)
        premise, hypothesis = clauses.inference(draw, topic, people, label)
        sentences += [f"{premise} .", f"{clauses.CONNECTIVES[label]} , {hypothesis} ."]
    return sentences


def paraphrases(draw: Draw) -> Sentences:
    """Return events, each told twice: in the active and the passive, or with synonyms."""
    topic = draw.pick(TOPICS)
    people = cast(draw, topic, 4)
    sentences: Sentences = []
    for _ in range(3):
        claim = event(draw, topic, people)
        adjective, same = draw.pick(lexicon.ADJECTIVE_SYNONYMS)
        if draw.chance(0.5):
            adjective, same = same, adjective
        passive = draw.chance(0.5)
        again = claim._replace(verb=synonym(claim.verb))
        sentences += [
            f"{claim.text(passive, adjective)} .",
            f"in other words , {again.text(not passive, same)} .",
        ]
    return sentences


def quiz(draw: Draw) -> Sentences:
    """Return a scene and questions about it with their answers."""
    claims = clauses.scene(draw, 3 + draw.below(2))
    sentences = [f"{claim.text(draw.chance(0.3), determiner='the')} ." for claim in claims]
    for claim in draw.shuffled(claims)[:3]:
        asked, answer = clauses.question(draw, claim)
        sentences.append(f"{asked} {answer} .")
    return sentences


GENRES: tuple[tuple[Callable[[Draw], Sentences], float], ...] = (
    (facts, 0.2),
    (story, 0.25),
    (review, 0.2),
    (reasoning, 0.2),
    (paraphrases, 0.05),
    (quiz, 0.1),
)


def document(draw: Draw) -> str:
    """Return one document: its sentences on one line, every word and full stop set apart by a space."""
    rest = draw.below(1000) / 1000
    for genre, share in GENRES[:-1]:
        rest -= share
        if rest < 0:
            return " ".join(genre(draw))
    return " ".join(GENRES[-1][0](draw))


def stream(*key: str | int) -> Iterator[str]:
    """Yield documents without end."""
    draw = Draw(*key)
    while True:
        yield document(draw)
