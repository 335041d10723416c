"""The tab-separated files of the original GLUE download."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from finemask_ds.data.rows import Rows, class_reader, score_reader, score_words
from finemask_ds.data.tasks import Examples, Task
from finemask_ds.errors import UserError, abbreviated

_ID_COLUMNS = ("index", "id")
_NO_GOLD_LABEL = ("", "-")  # as MNLI and SNLI write that the annotators did not agree


def read_tsv(task: Task, path: Path, split: str) -> Examples:
    r"""Read one split of a GLUE task.

    Fields are split at tabs and nothing else: quotation marks are text. Lines end at \n or \r\n only, so that a text
    may hold any other character that Unicode takes for a line break. Columns are found by name, but in CoLA's train
    and dev files, which have no header. Blank lines are left out, and so are, counted, rows with more or fewer fields
    than columns and rows without a target.

    Returns:
        The rows with GLUE's index (QQP's id), or the row's number from 0 where the file has none; targets are class
        numbers (int) or scores (float), None for the test splits.

    Raises:
        UserError: the file is unreadable, not UTF-8, empty or lacks a column; a target is invalid; or more than one
            row in a hundred is unusable.
    """
    with_targets = not split.startswith("test")
    lines = _lines(path)
    header: Sequence[str] = task.headerless
    if not (header and with_targets):
        header = _stripped(next(lines, (1, [""]))[1], 0)
        if not header:
            raise UserError(f"{path} is empty; restore the file of the GLUE download")
    places = [_place(path, header, column) for column in task.columns]
    target = _place(path, header, task.target) if with_targets else None
    number = next((header.index(name) for name in _ID_COLUMNS if name in header), None)
    rows = _rows(task, path) if with_targets else Rows(task, str(path), "line", task.target)
    for line, fields in lines:
        fields = _stripped(fields, len(header))
        if len(fields) != len(header):
            rows.drop(line, f"has {len(fields)} fields where there are {len(header)} columns")
            continue
        row_id = str(len(rows)) if number is None else fields[number]
        rows.add(line, row_id, [fields[place] for place in places], None if target is None else fields[target])
    return rows.examples()


def _rows(task: Task, path: Path) -> Rows:
    if task.kind == "regression":
        return Rows(task, str(path), "line", task.target, score_reader(task), score_words(task))
    written = task.written or task.labels
    spellings = {label: number for labels in (task.labels, written) for number, label in enumerate(labels)}
    return Rows(task, str(path), "line", task.target, class_reader(spellings, _NO_GOLD_LABEL), ", ".join(written))


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number (from 1) and the fields of each line that is not blank."""
    try:
        with open(path, "rb") as stream:  # bytes, because text would be decoded, and refused, far ahead of its line
            for number, line in enumerate(stream, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}, line {number} is not UTF-8 ({error.reason}); convert the file") from error
                if text:
                    yield number, text.split("\t")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a file that you may read") from error


def _stripped(fields: list[str], width: int) -> list[str]:
    """The fields without empty ones behind the first `width`."""
    while len(fields) > width and not fields[-1]:
        fields = fields[:-1]
    return fields


def _place(path: Path, header: Sequence[str], column: str) -> int:
    if column not in header:
        raise UserError(
            f"{path} has no column {column!r}; its first line has {abbreviated(header, 20)}: give the file of the GLUE "
            "download, with its header"
        )
    return header.index(column)
