"""The five fine-tuning tasks of the built-in language, drawn from the same grammar as its corpus."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

from finemask_ds.data import clauses, genres
from finemask_ds.data.grammar import Draw, cast, event
from finemask_ds.data.lexicon import TOPICS

Example = dict[str, Any]
SPLITS = ("train", "valid")


class Task(NamedTuple):
    """What a task asks and how an example of it is drawn.

    `kind` is "classification", "regression" or "span", `labels` the class names in the order of their numbers (empty
    unless a classification), `metric` the usual score: "accuracy", "matthews", "spearman" or "exact_match".
    `num_train` is the size of the training set that tells a pre-trained model from a random one: with many more
    examples a task of so small a language is learnt from scratch. `draw` takes random choices, a split and a position,
    which sets the label so that labels are balanced.
    """

    kind: str
    labels: tuple[str, ...]
    metric: str
    num_train: int
    draw: Callable[[Draw, str, int], Example]


def _acceptability(draw: Draw, split: str, position: int) -> Example:
    """Draw a clause; one in two has one error (number, gender or verb form) and is as long as it would be without."""
    label = position % 2
    return {"text": clauses.acceptability(draw, draw.pick(TOPICS), broken=not label) + " .", "label": label}


def _sentiment(draw: Draw, split: str, position: int) -> Example:
    """Draw a review without its stars; denials and concessions are frequent, so no word gives the label away."""
    label = position % 2
    return {"text": " ".join(genres.opinions(draw, bool(label))), "label": label}


def _entailment(draw: Draw, split: str, position: int) -> Example:
    """Draw a premise and a hypothesis; denials are as frequent under every label."""
    label = position % 3
    topic = draw.pick(TOPICS)
    premise, hypothesis = clauses.inference(draw, topic, cast(draw, topic, 4), label)
    return {"premise": f"{premise} .", "hypothesis": f"{hypothesis} .", "label": label}


def _similarity(draw: Draw, split: str, position: int) -> Example:
    """Draw two statements; the score tells how far they agree.

    5 where the second says of the same event what the first says, or less; 3 where it may hold beside the first;
    0 where it cannot. The pairs are made as those of entailment, and scored on a line.
    """
    score, relation = ((5.0, clauses.ENTAILMENT), (3.0, clauses.NEUTRAL), (0.0, clauses.CONTRADICTION))[position % 3]
    topic = draw.pick(TOPICS)
    first, second = clauses.inference(draw, topic, cast(draw, topic, 4), relation)
    return {"first": f"{first} .", "second": f"{second} .", "score": score}


def _questions(draw: Draw, split: str, position: int) -> Example:
    """Draw an event, active or passive, beside two people, and ask who, what or where; one word answers it."""
    topic = draw.pick(TOPICS)
    people = draw.shuffled(cast(draw, topic, 4))
    claim = event(draw, topic, people[:1], place=1.0)
    told = claim.text(draw.chance(0.5), determiner="the")
    context = f"{people[1].name} worked near {people[2].name} while {told} ."
    asked, answer = clauses.question(draw, claim)
    return {"context": context, "question": asked, "answer": answer, "start": f" {context} ".index(f" {answer} ")}


TASKS: dict[str, Task] = {
    "acceptability": Task("classification", ("unacceptable", "acceptable"), "matthews", 1000, _acceptability),
    "sentiment": Task("classification", ("negative", "positive"), "accuracy", 1000, _sentiment),
    "entailment": Task("classification", ("entailment", "neutral", "contradiction"), "accuracy", 1000, _entailment),
    "similarity": Task("regression", (), "spearman", 1000, _similarity),
    "questions": Task("span", (), "exact_match", 300, _questions),
}


def task_examples(task: str, split: str, *, num: int, seed: int = 0) -> list[Example]:
    """Return `num` different examples of a task, labels in turn; no example is in both splits, whatever the seeds.

    Classifications have "label" (an integer) beside "text" or "premise" and "hypothesis"; similarity has "first",
    "second" and "score" (0 to 5); questions have "context", "question", "answer" and "start", the character at which
    the answer stands in the context. Raises ValueError for an unknown task or split.
    """
    if task not in TASKS or split not in SPLITS:
        raise ValueError(
            f"no task {task!r} or split {split!r}: the tasks are {', '.join(TASKS)}, the splits train and valid"
        )
    draw = Draw("task", task, split, seed)
    examples: dict[str, Example] = {}
    while len(examples) < num:
        example = TASKS[task].draw(draw, split, len(examples))
        text = "\n".join(value for value in example.values() if isinstance(value, str))
        if in_split(text, split):
            examples.setdefault(text, example)
    return list(examples.values())


def in_split(text: str, split: str) -> bool:
    """Return whether a text may stand in a split: its checksum sends one text in eight to valid, the rest to train."""
    return (zlib.crc32(text.encode()) % 8 == 0) == (split == "valid")
