"""Rows of a task's file or table, gathered into `Examples`: targets read and checked, unusable rows counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finemask_ds.data.tasks import Examples, Targets, Task
from finemask_ds.errors import UserError

MAX_DROPPED_SHARE = 0.01
"""A file of which more rows are unusable is another kind of file, or a broken one."""

_SHOWN_CHARACTERS = 40


class Rows:
    """The rows of one file; every error names the file and the row."""

    def __init__(
        self,
        task: Task,
        path: str,
        unit: str,
        column: str,
        read_target: Callable[[Any], Any] | None = None,
        valid: str = "",
    ) -> None:
        """Begin without rows.

        Args:
            task: whose rows they are.
            path: of the file, for error messages.
            unit: what error messages count, lines or rows.
            column: of the targets.
            read_target: turns a field into a target; it returns None where the row has none and raises KeyError,
                TypeError or ValueError for a wrong one. Without it the rows are those of a test split.
            valid: the valid fields in words.
        """
        self.task, self.path, self.unit, self.column = task, path, unit, column
        self.read_target, self.valid = read_target, valid
        self.ids: list[str] = []
        self.texts: list[Sequence[str]] = []
        self.targets: list[Any] = []
        self.dropped: list[str] = []

    def __len__(self) -> int:
        return len(self.ids) + len(self.dropped)

    def add(self, number: int, row_id: str, texts: Sequence[str], field: Any) -> None:
        """Add a row, or drop it where it has no target; raises UserError for a wrong target."""
        target = self._target(number, field) if self.read_target else 0
        if target is None:
            self.drop(number, f"has no {self.column}")
            return
        self.ids.append(row_id)
        self.texts.append(texts)
        self.targets.append(target)

    def _target(self, number: int, field: Any) -> Any:
        assert self.read_target is not None
        try:
            return self.read_target(field)
        except (KeyError, TypeError, ValueError) as error:
            shown = str(field)
            shown = shown if len(shown) <= _SHOWN_CHARACTERS else shown[:_SHOWN_CHARACTERS] + "..."
            raise UserError(
                f"{self.path}, {self.unit} {number}: {shown!r} is no {self.column} of {self.task.title}; "
                f"valid are {self.valid}"
            ) from error

    def drop(self, number: int, why: str) -> None:
        """Leave a row out."""
        self.dropped.append(f"{self.unit} {number} {why}")

    def examples(self) -> Examples:
        """All rows; raises UserError where there are none or too many are unusable."""
        if not self:
            raise UserError(f"{self.path} has no rows; restore the file of {self.task.title}")
        if len(self.dropped) > MAX_DROPPED_SHARE * len(self):
            raise UserError(
                f"{self.path}: {len(self.dropped)} of {len(self)} rows are unusable, more than "
                f"{MAX_DROPPED_SHARE:.0%}: {self.dropped[0]}; restore the file of {self.task.title}"
            )
        first, *second = map(list, zip(*self.texts, strict=True))
        targets: Targets | None = self.targets if self.read_target else None
        return Examples.of(self.ids, first, second[0] if second else None, targets, len(self.dropped))


def class_reader(numbers: Mapping[Any, int], missing: Sequence[Any]) -> Callable[[Any], int | None]:
    """Class number of a field; None for one of `missing`."""
    table: dict[Any, int | None] = {**dict.fromkeys(missing), **numbers}
    return table.__getitem__


def score_reader(task: Task) -> Callable[[Any], float | None]:
    """A finite number within the task's range."""
    low, high = task.score_range

    def read(field: Any) -> float | None:
        if field in ("", "-"):
            return None
        score = float(field)
        if not low <= score <= high:
            raise ValueError(field)
        return score

    return read


def score_words(task: Task) -> str:
    """The range of a regression's targets in words."""
    low, high = task.score_range
    return f"numbers from {low:g} to {high:g}"
