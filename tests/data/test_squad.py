"""The SQuAD reader: real files, and files that are broken in the ways files are."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finemask_ds.data.squad import read_squad, squad_predictions
from finemask_ds.data.tasks import Answer, contents_sha256
from finemask_ds.errors import UserError

QUESTIONS = [
    {"id": "q1", "question": "Where is Zoë?", "answers": [{"text": "in Köln", "answer_start": 7},
                                                          {"text": "Köln", "answer_start": 10}]},
    {"id": "q2", "question": "Who is in Köln?", "answers": [{"text": "Zoë", "answer_start": 0}]},
]  # fmt: skip
SQUAD: dict[str, Any] = {
    "version": "1.1",
    "data": [
        {"title": "A", "paragraphs": [{"context": "Zoë is in Köln.", "qas": QUESTIONS}, {"context": "", "qas": []}]},
        {"title": "B", "paragraphs": [{"context": "one\n\ttwo", "qas": [
            {"id": "q3", "question": "what?", "answers": [{"text": "two", "answer_start": 5}]}]}]},
    ],
}  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    def writer(contents: Any) -> Path:
        text = contents if isinstance(contents, str) else json.dumps(contents, ensure_ascii=False)
        (tmp_path / "squad.json").write_text(text, encoding="utf-8")
        return tmp_path / "squad.json"

    return writer


def changed(change: Callable[[Any], Any]) -> Any:
    squad = copy.deepcopy(SQUAD)
    change(squad)
    return squad


def first_question(squad: Any) -> Any:
    return squad["data"][0]["paragraphs"][0]["qas"][0]


def test_every_question_is_a_row_in_the_order_of_the_file(write):
    examples = read_squad(write(SQUAD))
    assert examples.ids == ["q1", "q2", "q3"]
    assert examples.first == ["Where is Zoë?", "Who is in Köln?", "what?"]
    assert examples.second == ["Zoë is in Köln."] * 2 + ["one\n\ttwo"]
    assert examples.targets == [
        (Answer("in Köln", 7), Answer("Köln", 10)),
        (Answer("Zoë", 0),),
        (Answer("two", 5),),
    ]
    assert examples.sha256 == contents_sha256(examples)


def test_the_hash_is_of_the_contents_and_not_of_the_file(write):
    plain = read_squad(write(SQUAD)).sha256
    assert read_squad(write("\ufeff" + json.dumps(SQUAD, indent=2))).sha256 == plain
    moved = changed(lambda squad: squad["data"][0]["paragraphs"][0]["qas"].reverse())
    assert read_squad(write(moved)).sha256 != plain


def set_in_first(**values: Any) -> Callable[[Any], None]:
    return lambda squad: first_question(squad).update(values)


def drop(*path: Any) -> Callable[[Any], None]:
    def change(squad: Any) -> None:
        for key in path[:-1]:
            squad = squad[key]
        del squad[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (drop("data"), r'squad.json has no "data"; SQuAD v1.1 is \{"data"'),
        (drop("data", 1, "paragraphs"), r'data\[1\] has no "paragraphs"'),
        (drop("data", 1, "paragraphs", 0, "context"), r'data\[1\].paragraphs\[0\] has no "context"'),
        (drop("data", 0, "paragraphs", 1, "qas"), r'data\[0\].paragraphs\[1\] has no "qas"'),
        (drop("data", 0, "paragraphs", 0, "qas", 1, "id"), r'data\[0\].paragraphs\[0\].qas\[1\] has no "id"'),
        (drop("data", 0, "paragraphs", 0, "qas", 0, "answers", 1, "text"), r'qas\[0\].answers\[1\] has no "text"'),
        (set_in_first(id=7), r'qas\[0\]: "id" is not a string'),
        (set_in_first(question=None), r'"question" is not a string'),
        (set_in_first(answers={"text": ["in Köln"], "answer_start": [7]}), r'"answers" is not a list'),
        (set_in_first(answers=["in Köln"]), r"answers\[0\] is not an object"),
        (set_in_first(answers=[{"text": "in Köln", "answer_start": "7"}]), r'"answer_start" is not a whole number'),
        (set_in_first(answers=[{"text": "Z", "answer_start": False}]), r'"answer_start" is not a whole number'),
        (set_in_first(is_impossible=False), r"qas\[0\] has is_impossible, as in SQuAD v2.0; give .* v1.1"),
        (set_in_first(answers=[]), r"squad.json: 1 questions have no answer, the first 'q1'; give each one or leave"),
        (drop("data", 1, "paragraphs", 0, "qas", 0, "answers"), r"1 questions have no answer, the first 'q3'"),
        (set_in_first(id="q3"), r"1 ids that are not unique, the first 'q3'"),
        (lambda squad: squad.update(data=[]), r"squad.json has no questions"),
    ],
)
def test_another_layout_is_a_sentence_that_says_where(write, change, sentence):
    with pytest.raises(UserError, match=sentence):
        read_squad(write(changed(change)))


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ({"text": "in Köln", "answer_start": 8}, r"'in Köln' should be at character 8, where 'n Köln\.' is"),
        ({"text": "in Köln", "answer_start": 99}, "where '' is"),
        ({"text": ".", "answer_start": -1}, "at character -1, where 'Z' is"),
        ({"text": " ", "answer_start": 3}, "' ' should be"),
        ({"text": "", "answer_start": 3}, "'' should be"),
    ],
)
def test_answers_that_stand_elsewhere_are_counted_and_the_first_is_shown(write, answer, found):
    def change(squad: Any) -> None:
        first_question(squad)["answers"][1] = answer
        squad["data"][1]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = 4

    with pytest.raises(UserError, match=f"2 answers do not stand at .* question 'q1': .*{found}"):
        read_squad(write(changed(change)))


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"data"', "index\tquestion\n"])
def test_another_file_is_a_sentence(write, text):
    with pytest.raises(UserError, match=r"squad.json (is not valid JSON|is not an object)"):
        read_squad(write(text))


def test_a_missing_file_and_a_binary_one_are_sentences(tmp_path):
    with pytest.raises(UserError, match=r"none.json cannot be read \(No such file"):
        read_squad(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(UserError, match=r"binary.json is not valid JSON"):
        read_squad(tmp_path / "binary.json")


def test_a_submission_has_the_answer_of_every_question(write):
    examples = read_squad(write(SQUAD))
    assert squad_predictions(examples, ["in Köln", "", "two"]) == {"q1": "in Köln", "q2": "", "q3": "two"}
    with pytest.raises(ValueError):
        squad_predictions(examples, ["in Köln"])


@pytest.mark.shared
def test_the_real_files(shared):
    dev = read_squad(shared / "data/squad/dev-v1.1.json")
    train = read_squad(shared / "data/squad/train-subset.json")
    assert (len(dev), len(train)) == (10_570, 3_838)
    assert dev.targets is not None
    assert sum(len(answers) for answers in dev.targets) == 34_726
    assert dev.ids[0] == "56be4db0acb8001400a502ec"
    assert not set(dev.second or ()) & set(train.second or ())
