"""SQuAD v1.1 (Rajpurkar et al. 2016): the reader of its JSON, and the form of its submissions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finemask_ds.data.tasks import Answer, Examples
from finemask_ds.errors import UserError

_LAYOUT = (
    'SQuAD v1.1 is {"data": [{"paragraphs": [{"context": "...", "qas": [{"id": "...", "question": "...", '
    '"answers": [{"text": "...", "answer_start": 0}]}]}]}]}'
)
_KINDS = {list: "a list", str: "a string", int: "a whole number", dict: "an object"}


def read_squad(path: Path) -> Examples:
    """Read all questions of a file in the order in which they stand there.

    Returns:
        The questions' ids, the questions as `first`, their contexts as `second`, and one or more `Answer` each.

    Raises:
        UserError: the file is missing, not JSON, of another layout (which key, where) or of SQuAD v2.0; it has no
            question or one id twice; a question has no answer; or answers do not stand in the context where they
            should.
    """
    ids: list[str] = []
    questions: list[str] = []
    contexts: list[str] = []
    targets: list[tuple[Answer, ...]] = []
    for where, context, entry in _entries(_load(path), str(path)):
        if "is_impossible" in entry:
            raise UserError(f"{where} has is_impossible, as in SQuAD v2.0; give a file of SQuAD v1.1, where every "
                            "question has an answer")  # fmt: skip
        ids.append(_value(entry, "id", str, where))
        questions.append(_value(entry, "question", str, where))
        contexts.append(context)
        answers = _value(entry, "answers", list, where) if "answers" in entry else []
        targets.append(tuple(_answer(answer, f"{where}.answers[{i}]") for i, answer in enumerate(answers)))
    if not ids:
        raise UserError(f"{path} has no questions; {_LAYOUT}")
    _check(path, ids, contexts, targets)
    return Examples.of(ids, questions, contexts, targets)


def squad_predictions(examples: Examples, texts: Sequence[str]) -> dict[str, str]:
    """The contents of a submission: question's id -> answer."""
    return dict(zip(examples.ids, texts, strict=True))


def _load(path: Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a file of SQuAD v1.1 by --data") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{path} is not valid JSON ({error}); give a file of SQuAD v1.1 by --data") from error


def _entries(data: Any, path: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Where each question stands, its context and its entry."""
    for a, article in enumerate(_value(data, "data", list, path)):
        paragraphs = _value(article, "paragraphs", list, f"{path}: data[{a}]")
        for p, paragraph in enumerate(paragraphs):
            where = f"{path}: data[{a}].paragraphs[{p}]"
            context = _value(paragraph, "context", str, where)
            for q, entry in enumerate(_value(paragraph, "qas", list, where)):
                yield f"{where}.qas[{q}]", context, _of_kind(entry, dict, f"{where}.qas[{q}]")


def _answer(entry: Any, where: str) -> Answer:
    return Answer(_value(entry, "text", str, where), _value(entry, "answer_start", int, where))


def _value(holder: Any, key: str, kind: type, where: str) -> Any:
    """The value of a key that must be there and of a kind."""
    holder = _of_kind(holder, dict, where)
    if key not in holder:
        raise UserError(f'{where} has no "{key}"; {_LAYOUT}')
    return _of_kind(holder[key], kind, f'{where}: "{key}"')


def _of_kind(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where} is not {_KINDS[kind]}; {_LAYOUT}")
    return value


def _check(path: Path, ids: Sequence[str], contexts: Sequence[str], targets: Sequence[tuple[Answer, ...]]) -> None:
    """Refuse ids that are not unique, no answer, and answers that are elsewhere or nothing but white space."""
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(one for one in ids if one in seen or seen.add(one))  # type: ignore[func-returns-value]
        raise UserError(f"{path} has {len(ids) - len(set(ids))} ids that are not unique, the first {twice!r}; "
                        "give each question an id of its own")  # fmt: skip
    without = [one for one, answers in zip(ids, targets, strict=True) if not answers]
    if without:
        raise UserError(f"{path}: {len(without)} questions have no answer, the first {without[0]!r}; give each one or "
                        "leave it out (to train and to score, every question needs one)")  # fmt: skip
    wrong = [
        (one, context[max(answer.start, 0) :][: len(answer.text)], answer)
        for one, context, answers in zip(ids, contexts, targets, strict=True)
        for answer in answers
        if answer.start < 0 or not answer.text.strip() or not context.startswith(answer.text, answer.start)
    ]
    if wrong:
        one, found, answer = wrong[0]
        raise UserError(f"{path}: {len(wrong)} answers do not stand at their answer_start, the first that of question "
                        f"{one!r}: {answer.text!r} should be at character {answer.start}, where {found!r} is; "
                        "restore the file (offsets count characters, not bytes)")  # fmt: skip
