"""Means and standard deviations as the papers state them: over seeds of fine-tuning first, then over masks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from finemask_ds.data.tasks import PAPER_TASKS, TASKS
from finemask_ds.report.cells import CellResult

METHODS = ("full", "tamt-mlm+kd", "tamt-mlm", "tamt-kd", "imp", "reconstruction", "omp", "random")
"""The order of the rows; others follow by name."""

_TASK_ORDER = (*PAPER_TASKS, *(name for name in TASKS if name not in PAPER_TASKS))


@dataclass(frozen=True)
class Spread:
    """A mean and a sample standard deviation with what they are over."""

    mean: float | None
    sd: float | None
    """None where n < 2."""
    n: int
    over: str
    """``masks``, or ``seeds`` of fine-tuning where there is a single mask (TAMT 4.1.3: OMP and the full model)."""


@dataclass(frozen=True)
class Score(Spread):
    """The score of a method on a task: a number of a table and the cells it is made of."""

    method: str
    sparsity: float | None
    search_steps: int | None
    task: str
    num_samples: int
    cells: tuple[CellResult, ...]
    """Missing and failed ones too."""

    @property
    def done(self) -> int:
        """Cells with a result."""
        return sum(cell.done for cell in self.cells)

    @property
    def undefined(self) -> tuple[str, ...]:
        """Why some of the scores are undefined; these count 0."""
        reasons = (cell.undefined or "no reason given" for cell in self.cells if cell.done and cell.score is None)
        return tuple(dict.fromkeys(reasons))


@dataclass(frozen=True)
class Average(Spread):
    """The mean over tasks of a method's scores; ``sd`` and ``n`` are of the masks (or seeds) that have every task."""

    scores: tuple[Score, ...]
    units: int
    """Masks (or seeds) that have some of the tasks."""


Column = tuple[str, int]
"""A task and the number of training rows asked for, 0: all."""


@dataclass(frozen=True)
class Board:
    """Method x task at one sparsity, each task with as many training rows as the sparse methods have."""

    sparsity: float
    methods: tuple[str, ...]
    columns: tuple[Column, ...]
    scores: Mapping[tuple[str, Column], Score]
    averages: Mapping[str, Average]
    common: tuple[Column, ...]
    """Tasks that every method with a result has: the average is over these."""

    @property
    def has_masks(self) -> bool:
        """Whether there is more than the full model."""
        return any(method != "full" for method in self.methods)


@dataclass(frozen=True)
class MaskPoint:
    """One mask and its average over ``tasks``, each the mean over seeds of fine-tuning."""

    cell: CellResult
    """Any cell of the mask, for method, seed, steps and origin."""
    mean: float
    tasks: tuple[Column, ...]


def spread(cells: Iterable[CellResult], value: Callable[[CellResult], float | None]) -> Spread:
    """Mean over fine-tuning seeds of each mask, then mean and sample standard deviation over masks.

    With a single mask the deviation is over its seeds. Cells without a result or a value do not count.
    """
    by_mask: dict[str, dict[int, list[float]]] = {}
    for cell in cells:
        number = value(cell) if cell.done else None
        if number is not None:
            by_mask.setdefault(cell.mask_key, {}).setdefault(cell.seed, []).append(number)
    units = [statistics.fmean(x for values in seeds.values() for x in values) for seeds in by_mask.values()]
    over = "masks"
    if len(by_mask) == 1:
        over, (seeds,) = "seeds", by_mask.values()
        units = [statistics.fmean(values) for values in seeds.values()]
    return Spread(*_moments(units), len(units), over)


def _moments(units: Sequence[float]) -> tuple[float | None, float | None]:
    mean = statistics.fmean(units) if units else None
    return mean, statistics.stdev(units) if len(units) > 1 else None


def scores(cells: Iterable[CellResult], *, by_steps: bool = True) -> list[Score]:
    """One score for each method, sparsity, number of search steps, task and number of samples, in a fixed order.

    Without ``by_steps`` a cell whose search is not known yet stands beside those that are done.
    """
    groups: dict[tuple[str, float | None, int | None, str, int], list[CellResult]] = {}
    for cell in cells:
        steps = cell.search_steps if by_steps else None
        key = (cell.method, cell.sparsity, steps, cell.task, cell.num_samples)
        groups.setdefault(key, []).append(cell)
    answer = [_score(group) for group in groups.values()]
    return sorted(answer, key=lambda s: (s.sparsity or 0, method_key(s.method), s.search_steps or 0, task_key(s.task),
                                         s.num_samples))  # fmt: skip


def _score(cells: Sequence[CellResult]) -> Score:
    found, one = spread(cells, lambda cell: cell.value), cells[0]
    steps = next((cell.search_steps for cell in cells if cell.search_steps is not None), None)
    return Score(found.mean, found.sd, found.n, found.over, one.method, one.sparsity, steps, one.task,
                 one.num_samples, tuple(sorted(cells, key=_cell_key)))  # fmt: skip


def _cell_key(cell: CellResult) -> tuple[int, str, int, str]:
    return cell.mask_seed or 0, cell.mask_key, cell.seed, cell.id


def method_key(method: str) -> tuple[int, str]:
    """What methods are sorted by: the order of ``METHODS``, variants behind their method, others last."""
    base = base_method(method)
    return METHODS.index(base) if base in METHODS else len(METHODS), method


def base_method(method: str) -> str:
    """The method without what `variants.with_variants` adds."""
    return method.partition(" (")[0]


def task_key(task: str) -> tuple[int, str]:
    """What tasks are sorted by: the paper's order, then the table's, then by name."""
    return _TASK_ORDER.index(task) if task in _TASK_ORDER else len(_TASK_ORDER), task


def final(cells: Sequence[CellResult]) -> list[CellResult]:
    """The cells of each method's longest search at each sparsity; masks taken on the way are for the figures."""
    longest: dict[tuple[str, float | None], int] = {}
    for cell in cells:
        key = (cell.method, cell.sparsity)
        longest[key] = max(longest.get(key, 0), cell.search_steps or 0)
    return [c for c in cells if c.search_steps is None or c.search_steps == longest[c.method, c.sparsity]]


def sparsities(cells: Iterable[CellResult]) -> list[float]:
    """Sparsities of the masks; (0.0,) where there is only the full model."""
    found = sorted({cell.sparsity for cell in cells if cell.mask_key and cell.sparsity is not None})
    return found or [0.0]


def main_columns(cells: Sequence[CellResult], sparsity: float) -> list[Column]:
    """Each task with the largest number of training rows that masks of the sparsity were fine-tuned on."""
    here = [c for c in cells if c.mask_key and c.sparsity == sparsity] or [c for c in cells if not c.mask_key]
    sizes: dict[str, set[int]] = {}
    for cell in here:
        sizes.setdefault(cell.task, set()).add(cell.num_samples)
    return [(task, 0 if 0 in sizes[task] else max(sizes[task])) for task in sorted(sizes, key=task_key)]


def board(cells: Sequence[CellResult], sparsity: float) -> Board:
    """The table of one sparsity, of one model's cells, with the full model's row."""
    columns = main_columns(cells, sparsity)
    here = [cell for cell in final(cells) if cell.sparsity == sparsity or not cell.mask_key]
    found = {(s.method, (s.task, s.num_samples)): s for s in scores(here, by_steps=False)}
    found = {key: score for key, score in found.items() if key[1] in columns}
    methods = sorted({method for method, _ in found}, key=method_key)
    compared = [m for m in methods if any(found[m, c].done for c in columns if (m, c) in found)]
    common = [c for c in columns if all((m, c) in found and found[m, c].done for m in compared)] if compared else []
    averages = {m: _average([found[m, c] for c in common]) for m in compared} if len(common) > 1 else {}
    return Board(sparsity, tuple(methods), tuple(columns), found, averages, tuple(common))


def average_over(board: Board, method: str, columns: Sequence[Column]) -> Average | None:
    """A method's average over the columns; None where it lacks one of them."""
    found = [board.scores.get((method, column)) for column in columns]
    parts = [score for score in found if score is not None and score.done]
    return _average(parts) if len(parts) == len(columns) > 0 else None


def _average(parts: Sequence[Score]) -> Average:
    """Mean of the tasks' means; the deviation is over masks (or seeds) of their own averages over all the tasks."""
    means = [score.mean for score in parts if score.mean is not None]
    masks = {cell.mask_key for score in parts for cell in score.cells if cell.done}
    by_unit: dict[object, dict[str, list[float]]] = {}
    for score in parts:
        for cell in (cell for cell in score.cells if cell.done):
            unit = cell.mask_key if len(masks) > 1 else cell.seed
            by_unit.setdefault(unit, {}).setdefault(score.task, []).append(cell.value)
    whole = [unit for unit in by_unit.values() if len(unit) == len(parts)]
    units = [statistics.fmean(statistics.fmean(values) for values in unit.values()) for unit in whole]
    over = "masks" if len(masks) > 1 else "seeds"
    return Average(statistics.fmean(means), _moments(units)[1], len(units), over, tuple(parts), len(by_unit))


def mask_points(cells: Sequence[CellResult], columns: Sequence[Column]) -> tuple[list[Column], list[MaskPoint], int]:
    """Every mask's average over tasks: the tasks that at least half of the masks have, their points, masks left out.

    Masks that lack one of the tasks are left out: an average over fewer would look like a gain or a loss.
    """
    groups: dict[tuple[str, str], list[CellResult]] = {}
    for cell in cells:
        if cell.done and cell.mask_key and (cell.task, cell.num_samples) in columns:
            groups.setdefault((cell.method, cell.mask_key), []).append(cell)
    means: list[tuple[CellResult, dict[Column, float]]] = []
    for group in groups.values():
        by_task: dict[Column, list[float]] = {}
        for cell in group:
            by_task.setdefault((cell.task, cell.num_samples), []).append(cell.value)
        means.append((group[0], {column: statistics.fmean(values) for column, values in by_task.items()}))
    tasks = [column for column in columns if 2 * sum(column in found for _, found in means) >= len(means) > 0]
    points = [
        MaskPoint(cell, statistics.fmean(found[task] for task in tasks), tuple(tasks))
        for cell, found in means
        if tasks and all(task in found for task in tasks)
    ]
    points.sort(key=lambda point: (method_key(point.cell.method), point.cell.search_steps or 0, point.cell.mask_key))
    return tasks, points, len(means) - len(points)
