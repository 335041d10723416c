"""Tasks as tables of the Hugging Face hub: GLUE and SQuAD, from the hub or from its caches."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finemask_ds.data.hub import HubFiles, Wanted, find_hub_files
from finemask_ds.data.rows import Rows, class_reader, score_reader, score_words
from finemask_ds.data.sources import read_tables
from finemask_ds.data.tasks import Answer, Examples, Task
from finemask_ds.errors import UserError, abbreviated

if TYPE_CHECKING:
    import pyarrow

_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_BATCH_ROWS = 10_000
_HIDDEN = -1  # the class number of rows whose label GLUE keeps to itself


def hub_split(task: Task, split: str) -> str:
    """Name of a split on the hub: validation, or of MNLI validation_matched and validation_mismatched."""
    base, _, mismatched = split.partition("_")
    two = "dev_mismatched" in (task.files or {}) and base != "train"
    return _SPLITS[base] + (f"_{mismatched or 'matched'}" if two else "")


def find_hub_table(task: Task, split: str) -> HubFiles:
    """Find the files of one split, downloading none of them.

    Raises:
        UserError: the split does not exist, or is out of reach and in no cache.
    """
    name, config = task.hub.split(":")
    folder = f"{task.folder}/{task.files['train']}" if task.folder and task.files else "train-v1.1.json"
    instead = f"type --data FOLDER of a folder that holds {folder}, or a --task of the built-in language"
    typed = f"--task {task.name} ({task.hub})"
    return find_hub_files(Wanted(typed, name, config, (hub_split(task, split),), _split_of, instead))


def read_hub_table(task: Task, split: str) -> Examples:
    """Read one split, downloading what is not in the hub's cache.

    Returns:
        The rows with the hub's idx or id; targets are class numbers (int), scores (float) or tuples of `Answer`, None
        for the test splits.

    Raises:
        UserError: the split is not to be found, unreadable, lacks a column, or has classes other than the task's.
    """
    found = find_hub_table(task, split)
    with_targets = not split.startswith("test")
    target = "answers" if task.kind == "span" else "label"
    where = f"{hub_split(task, split)} of {task.hub}"
    rows = _rows(task, where, target) if with_targets else Rows(task, where, "row", target)
    for path in map(found.fetch, found.splits[hub_split(task, split)]):
        for table in read_tables(path, batch_rows=_BATCH_ROWS):
            _add(rows, task, path, table, with_targets)
    return rows.examples()


def _split_of(name: str) -> str:
    """Split of a file such as mnli/validation_matched-00000-of-00001.parquet, or of the hub's name of a split."""
    return re.sub(r"(-\d{5}-of-\d{5})?(\.\w+)?$", "", name.split("/")[-1])


def _rows(task: Task, where: str, target: str) -> Rows:
    if task.kind == "classification":
        numbers = {number: number for number in range(len(task.labels))}
        return Rows(task, where, "row", target, class_reader(numbers, (None, _HIDDEN)), f"0 to {len(task.labels) - 1}")
    if task.kind == "span":
        return Rows(task, where, "row", target, _answers, "one or more answers, each with the place where it starts")
    return Rows(task, where, "row", target, score_reader(task), score_words(task))


def _answers(field: dict[str, list[Any]]) -> tuple[Answer, ...]:
    if not field["text"]:
        raise ValueError("a question without an answer")
    return tuple(Answer(text, start) for text, start in zip(field["text"], field["answer_start"], strict=True))


def _add(rows: Rows, task: Task, path: Path, table: pyarrow.Table, with_targets: bool) -> None:
    names = task.hub_columns or task.columns
    target = rows.column
    for name in (*names, *((target,) if with_targets else ())):
        if name not in table.column_names:
            raise UserError(f"{path} has no column {name!r}; its columns are {abbreviated(table.column_names, 20)}: "
                            f"give the data set {task.hub}")  # fmt: skip
    texts = zip(*(table.column(name).to_pylist() for name in names), strict=True)
    targets = _targets(task, path, table, target) if with_targets else [None] * len(table)
    number = next((name for name in ("idx", "id") if name in table.column_names), None)
    ids = table.column(number).to_pylist() if number else range(len(rows), len(rows) + len(table))
    for row_id, row, field in zip(ids, texts, targets, strict=True):
        if None in row:
            rows.drop(len(rows), "has no text")
        else:
            rows.add(len(rows), str(row_id), row, field)


def _targets(task: Task, path: Path, table: pyarrow.Table, column: str) -> list[Any]:
    """The column of targets; classes must be the task's, in its order, where the file tells their names."""
    import pyarrow
    from datasets import ClassLabel, Features

    feature = Features.from_arrow_schema(table.schema)[column]
    if isinstance(feature, ClassLabel) and tuple(feature.names) != task.labels:
        raise UserError(f"{path} has the classes {abbreviated(feature.names, 5)} where {task.title} has "
                        f"{', '.join(task.labels)}; give the data set {task.hub}")  # fmt: skip
    values = table.column(column)
    if values.type == pyarrow.float32():  # as decimals, in which they were written: 3.8, not 3.799999952316284
        return [str(value) for value in values.to_numpy()]
    return list(values.to_pylist())
