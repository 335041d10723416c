"""The clauses of the built-in language that documents and tasks share: agreement, opinion, inference and questions."""

from collections.abc import Sequence

from finemask_ds.data import lexicon
from finemask_ds.data.grammar import Draw, Event, Person, cast, event, synonym, world
from finemask_ds.data.lexicon import TOPICS, Topic, gerund, participle, past, plural, third


def number_agreement(draw: Draw, topic: Topic, broken: bool = False) -> str:
    """Return a present-tense clause whose verb agrees with a subject across what stands between them.

    A broken one has the other number either in the verb or, after this, these, every or many, in the noun.
    """
    many, others = draw.chance(0.5), draw.chance(0.5)
    determiner = draw.pick(("the", "these", "many") if many else ("the", "this", "every"))
    bend_noun = broken and determiner != "the" and draw.chance(0.5)
    job, kind = draw.pick(topic.jobs), draw.pick(topic.kinds)
    noun = plural(job) if many != bend_noun else job
    place, thing = draw.pick(topic.places), draw.pick(kind.members)
    between = draw.pick(
        (
            f" near the {plural(place) if others else place}",
            f" with the {plural(thing) if others else thing}",
            f" of {draw.pick(world().countries).name}",
            "",
        )
    )
    verb = draw.pick(kind.verbs + lexicon.INTRANSITIVE[:3])
    verb_many = many != (broken and not bend_noun)
    predicate = verb if verb_many else third(verb)
    if verb in kind.verbs:
        predicate += f" the {draw.pick((thing, plural(thing)))}"
    return f"{determiner} {noun}{between} {predicate}"


def gender_agreement(draw: Draw, topic: Topic, broken: bool = False) -> str:
    """Return a clause whose possessive or pronoun agrees with a named person; a broken one has the other gender."""
    person = draw.pick(world().people)
    female = person.female != broken
    possessive, pronoun = ("her", "she") if female else ("his", "he")
    kind = draw.pick(topic.kinds)
    thing, verb = draw.pick(kind.members), draw.pick(kind.verbs)
    if draw.chance(0.5):
        return f"{person.name} {past(verb)} {possessive} {thing} in the {draw.pick(topic.places)}"
    return f"{person.name} {past(draw.pick(lexicon.INTRANSITIVE))} while {pronoun} {past(verb)} the {thing}"


def verb_form(draw: Draw, topic: Topic, broken: bool = False) -> str:
    """Return a clause with an auxiliary and the verb form it asks for; a broken one has a form it does not take."""
    kind = draw.pick(topic.kinds)
    verb = draw.pick(kind.verbs)
    forms = {"did not": verb, "is": gerund(verb), "has": participle(verb)}
    auxiliary = draw.pick(tuple(forms))
    form = forms[auxiliary]
    if broken:
        form = draw.pick([other for other in forms.values() if other != form])
    subject = draw.pick((draw.pick(world().people).name, f"the {draw.pick(topic.jobs)}"))
    return f"{subject} {auxiliary} {form} the {draw.pick(kind.members)}"


def acceptability(draw: Draw, topic: Topic, broken: bool = False) -> str:
    """Return a clause of the grammar or, broken, one of the same make with one error in it."""
    return draw.pick((number_agreement, number_agreement, gender_agreement, verb_form))(draw, topic, broken)


def opinion(
    draw: Draw,
    topic: Topic,
    good: bool,
    words: tuple[Sequence[str], Sequence[str]] = (lexicon.BAD, lexicon.GOOD),
) -> str:
    """Return a clause that praises or blames something, half of the time by denying the opposite.

    `words` are the (bad, good) evaluative adjectives to draw from.
    """
    denied = draw.chance(0.5)
    adjective = draw.pick(words[good != denied])
    kind = draw.pick(topic.kinds)
    many = draw.chance(0.3)
    subject = draw.pick((draw.pick(kind.members), draw.pick(topic.jobs), draw.pick(topic.places)))
    verb = draw.pick(("were",) if many else ("was", "seemed", "looked")) if not denied else "were" if many else "was"
    return f"the {plural(subject) if many else subject} {verb} {'not ' if denied else ''}{adjective}"


def judgement(
    draw: Draw,
    topic: Topic,
    good: bool,
    words: tuple[Sequence[str], Sequence[str]] = (lexicon.BAD, lexicon.GOOD),
) -> str:
    """Return one or two opinions whose balance is good or bad; a conceded one counts for nothing."""
    form = draw.below(4)
    opinions = [
        opinion(draw, topic, good, words),
        opinion(draw, topic, good if form < 2 else not good, words),
    ]
    if form == 0:
        return opinions[0]
    if form == 1:
        return f"{opinions[0]} and {opinions[1]}"
    if form == 2:
        return f"although {opinions[1]} , {opinions[0]}"
    return f"{opinions[1]} but {opinions[0]}"


ENTAILMENT, NEUTRAL, CONTRADICTION = range(3)


CONNECTIVES = ("yes", "perhaps", "no")


def _other(draw: Draw, options: Sequence[str], taken: str) -> str:
    return draw.pick([option for option in options if option != taken])


def _relax(draw: Draw, claim: Event) -> Event:
    """Return a more general event: each slot is kept or says less."""
    agent = "" if draw.chance(0.3) else claim.agent
    thing = "" if draw.chance(0.4) else claim.thing
    place = "" if draw.chance(0.5) else claim.place
    return claim._replace(agent=agent, thing=thing, place=place)


def _tighten(draw: Draw, claim: Event, topic: Topic, people: Sequence[Person]) -> Event:
    """Return a more special event: each empty slot may be filled."""
    agent = claim.agent or ("" if draw.chance(0.2) else draw.pick(people).name)
    thing = claim.thing or ("" if draw.chance(0.3) else draw.pick(claim.kind.members))
    place = claim.place or ("" if draw.chance(0.7) else draw.pick(topic.places))
    return claim._replace(agent=agent, thing=thing, place=place)


def _stray(draw: Draw, claim: Event, premise: Event, topic: Topic, people: Sequence[Person]) -> Event:
    """Return the claim with another content in a slot that it and the premise fill: neither follows."""
    slots = ["verb"] + [slot for slot in ("agent", "thing", "place") if getattr(claim, slot) and getattr(premise, slot)]
    slot = draw.pick(slots)
    if slot == "agent":
        return claim._replace(agent=_other(draw, [person.name for person in people], claim.agent))
    if slot == "thing":
        return claim._replace(thing=_other(draw, claim.kind.members, claim.thing))
    if slot == "place":
        return claim._replace(place=_other(draw, topic.places, claim.place))
    verbs = [verb for verb in claim.kind.verbs if verb not in (claim.verb, synonym(claim.verb))]
    return claim._replace(verb=draw.pick(verbs))


def inference(draw: Draw, topic: Topic, people: Sequence[Person], label: int) -> tuple[str, str]:
    """Return a premise and a hypothesis that follows (0), may or may not hold (1) or cannot hold (2).

    Half of the premises and, for each label, half of the hypotheses are denials, so neither gives the label away.
    What happened also happened in more general terms; what never happened also never happened in special terms.
    """
    claim = event(draw, topic, people)
    positive = draw.chance(0.5)
    if positive:
        premise, hypothesis = claim, _relax(draw, claim)
    else:
        premise = _relax(draw, claim._replace(place="", agent="" if draw.chance(0.5) else claim.agent))
        hypothesis = _tighten(draw, premise, topic, people)
        premise = premise._replace(positive=False)
    if label == NEUTRAL:
        hypothesis = _stray(draw, hypothesis, premise, topic, people)
        hypothesis = hypothesis._replace(positive=draw.chance(0.5))
    else:
        hypothesis = hypothesis._replace(positive=positive == (label == ENTAILMENT))
    if draw.chance(0.3):
        hypothesis = hypothesis._replace(verb=synonym(hypothesis.verb))
    return premise.text(draw.chance(0.4)), hypothesis.text(draw.chance(0.4))


def question(draw: Draw, claim: Event) -> tuple[str, str]:
    """Return a question about one slot of an event, and its answer, a word of the event's text."""
    which = draw.below(3 if claim.place else 2)
    if which == 0:
        return f"who {past(claim.verb)} the {claim.thing} ?", claim.agent
    if which == 1:
        return f"what did {claim.agent} {claim.verb} ?", claim.thing
    return f"where did {claim.agent} {claim.verb} the {claim.thing} ?", claim.place


def scene(draw: Draw, count: int) -> list[Event]:
    """Return events on one topic in which no person, thing or place comes twice."""
    topic = draw.pick(TOPICS)
    people = draw.shuffled(cast(draw, topic, 4))
    things = draw.shuffled([(kind, member) for kind in topic.kinds for member in kind.members])
    places = draw.shuffled(topic.places) + [""] * count
    return [
        Event(people[index].name, draw.pick(kind.verbs), kind, member, places[index])
        for index, (kind, member) in enumerate(things[:count])
    ]
