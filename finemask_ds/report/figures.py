"""The papers' figures drawn from cells: what there are no data for is a sentence that says which runs would give it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy

from finemask_ds.data.tasks import TASKS
from finemask_ds.report import scores as statistic
from finemask_ds.report.cells import CellResult
from finemask_ds.report.scores import Board, Score, method_key
from finemask_ds.report.style import INK, Look, blank, legend, looks, panels, style, whole_ticks, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """One figure, or why it is left out."""

    name: str
    """Of its file."""
    title: str
    caption: str
    """What is drawn; or, without a figure, which runs would give it."""
    figure: Figure | None = None


def title_of(task: str, num_samples: int = 0) -> str:
    """A task as the papers print it, with its number of training rows unless it is all of them."""
    name = TASKS[task].title if task in TASKS else task
    return f"{name} ({num_samples:,} rows)" if num_samples else name


def unit_of(metric: str) -> str:
    """A metric as an axis names it."""
    names = {"matthews": "Matthews correlation", "f1": "F1", "exact_match": "exact match",
             "pearson": "Pearson correlation", "spearman": "Spearman correlation"}  # fmt: skip
    known = names.get(metric, metric.replace("_", " "))
    return f"{known} x 100" if metric in ("matthews", "pearson", "spearman") else f"{known} (%)"


def percent(sparsity: float | None) -> str:
    """0.7 -> ``70 %``."""
    return "unknown" if sparsity is None else f"{100 * sparsity:.4g} %"


def metric_of(cells: Sequence[CellResult], task: str) -> str:
    """The metric of a task's scores."""
    return next((unit_of(cell.metric) for cell in cells if cell.task == task and cell.metric), "score x 100")


def against_sparsity(cells: Sequence[CellResult]) -> Drawing:
    """Downstream score against sparsity per method, a panel per task and one for the average (TAMT Figure 3)."""
    boards = [statistic.board(cells, sparsity) for sparsity in statistic.sparsities(cells)]
    if len(boards) == 1:
        return _at_one_sparsity(cells, boards[0])
    columns = sorted({c for board in boards for c in board.columns}, key=lambda c: (statistic.task_key(c[0]), c[1]))
    common = [column for column in columns if all(column in board.common for board in boards)]
    count = len(columns) + (len(common) > 1)
    methods, chosen = sorted({m for board in boards for m in board.methods}, key=method_key), looks(cells)
    with style():
        figure, grid = panels(*wrap(count))
        axes = blank(grid, count)
        for panel, column in zip(axes, columns, strict=False):
            _over_sparsities(panel, boards, methods, chosen, lambda b, m, c=column: b.scores.get((m, c)))  # type: ignore[misc]
            panel.set(title=title_of(*column), ylabel=metric_of(cells, column[0]))
        if len(common) > 1:
            _over_sparsities(axes[-1], boards, methods, chosen, lambda b, m: statistic.average_over(b, m, common))
            axes[-1].set(title="average", ylabel="average score x 100")
        legend(figure, methods, chosen)
    names = ", ".join(title_of(*column) for column in common)
    words = f" The average is over {names}, which all methods have at all sparsities." if len(common) > 1 else ""
    return Drawing("score-against-sparsity", "Downstream score against sparsity", _CAPTION_3 + words, figure)


_CAPTION_3 = (
    "Mean over masks of the mean over fine-tuning seeds; bands, and bars at points that stand alone, are one standard "
    "deviation (over masks, or over seeds where a method has a single mask); a line is broken where cells are missing. "
    "As Figure 3 of TAMT."
)


def _over_sparsities(
    panel: Axes, boards: Sequence[Board], methods: Sequence[str], chosen: Mapping[str, Look],
    found: Callable[[Board, str], statistic.Spread | None],
) -> None:  # fmt: skip
    for method in methods:
        points = [(100 * board.sparsity, found(board, method)) for board in boards]
        means = [(x, one.mean if one else None, one.sd if one else None) for x, one in points]
        if method == "full":
            # The same at every sparsity, but there only where masks were fine-tuned on the task.
            _level(panel, next((mean for _, mean, _ in means if mean is not None), None))
        elif any(mean is not None for _, mean, _ in means):
            _line(panel, means, chosen[method])
    panel.set_xlabel("sparsity (%)")
    panel.set_xticks([100 * board.sparsity for board in boards])


def _line(panel: Axes, points: Sequence[tuple[float, float | None, float | None]], look: Look) -> None:
    """A line with markers and a band of one standard deviation, broken where there is no mean; drawn x 100.

    A point without neighbours, which a band cannot show, has an error bar.
    """
    if not points:
        return
    drawn = [(x, math.nan if mean is None else 100 * mean, 100 * (sd or 0.0)) for x, mean, sd in points]
    x, y, sd = numpy.array(sorted(drawn)).T
    panel.plot(x, y, color=look.colour, marker=look.marker, linestyle=look.line)
    panel.fill_between(x, y - sd, y + sd, color=look.colour, alpha=0.15, linewidth=0)
    there = numpy.pad(~numpy.isnan(y), 1)
    alone = there[1:-1] & ~there[:-2] & ~there[2:] & (sd > 0)
    if alone.any():
        panel.errorbar(x[alone], y[alone], yerr=sd[alone], fmt="none", ecolor=look.colour, elinewidth=1.2, capsize=3)


def _level(panel: Axes, mean: float | None) -> None:
    """The full model as a dashed line across the panel."""
    if mean is not None:
        panel.axhline(100 * mean, color=INK, linestyle="--", linewidth=1.2)


def _at_one_sparsity(cells: Sequence[CellResult], board: Board) -> Drawing:
    """With one sparsity there is no line to draw: points with error bars, method beside method."""
    methods, columns = board.methods, board.columns
    names = [title_of(*column).replace(" (", "\n(") for column in columns]
    with style():
        figure, grid = panels(1, 1, 3.4)
        panel, chosen = grid[0][0], looks(cells)
        names += ["average"] if board.averages else []
        for index, method in enumerate(methods):
            found: list[statistic.Spread | None] = [board.scores.get((method, column)) for column in columns]
            found += [board.averages.get(method)] if board.averages else []
            shift = 0.7 * ((index + 0.5) / len(methods) - 0.5)
            drawn = [(x + shift, 100 * s.mean, math.nan if s.sd is None else 100 * s.sd)
                     for x, s in enumerate(found) if s and s.mean is not None]  # fmt: skip
            if drawn:
                x, y, sd = numpy.array(drawn).T
                look = chosen[method]
                panel.errorbar(x, y, yerr=sd, color=look.colour, marker=look.marker, linestyle="", capsize=3,
                               linewidth=1.2)  # fmt: skip
        panel.set_xticks(range(len(names)), names)
        panel.set_xlim(-0.5, len(names) - 0.5)
        panel.grid(axis="x", visible=False)
        for edge in range(len(names) - 1):
            panel.axvline(edge + 0.5, color="#80808040", linewidth=0.6)
        panel.set(ylabel="score x 100", xlabel="task" if len(names) > 1 else "")
        legend(figure, methods, chosen, lines=False)
    caption = f"At {percent(board.sparsity)} sparsity, the only one here. " if board.has_masks else ""
    return Drawing("score-by-task", "Downstream score by task", caption +
                   "Mean over masks of the mean over fine-tuning seeds; bars are one standard deviation (over masks, "
                   "or over seeds where a method has a single mask).", figure)  # fmt: skip


def scarcity(cells: Sequence[CellResult], sparsity: float) -> Drawing:
    """Score against the number of training samples, a panel per task (TAMT Figure 9)."""
    here = [c for c in statistic.final(cells) if c.sparsity == sparsity or not c.mask_key]
    sizes: dict[str, set[int]] = {}
    for cell in here:
        if cell.mask_key and cell.done:
            sizes.setdefault(cell.task, set()).add(cell.num_samples)
    tasks = sorted((task for task, found in sizes.items() if len(found) > 1), key=statistic.task_key)
    name, title = f"scarcity-{100 * sparsity:g}", f"Score against the number of training samples, {percent(sparsity)}"
    if not tasks:
        return Drawing(name, title, "Needs cells of one task with several --num_samples, such as 1000, 2000 and 0.")
    methods, chosen = sorted({c.method for c in here if c.task in tasks and c.done}, key=method_key), looks(cells)
    with style():
        figure, grid = panels(*wrap(len(tasks)))
        for panel, task in zip(blank(grid, len(tasks)), tasks, strict=True):
            found = [s for s in statistic.scores(here) if s.task == task and s.mean is not None]
            for method in methods:
                _line(panel, [(_rows(s), s.mean, s.sd) for s in found if s.method == method], chosen[method])
            _log_ticks(panel, sorted({_rows(s) for s in found}))
            panel.set(title=title_of(task), xlabel="training samples", ylabel=metric_of(cells, task))
        legend(figure, methods, chosen)
    return Drawing(name, title, "The axis of samples is logarithmic; bands, and bars at points that stand alone, are "
                   "one standard deviation. As Figure 9 of TAMT.", figure)  # fmt: skip


def _rows(score: Score) -> float:
    return float(next((c.train_rows for c in score.cells if c.done and c.train_rows), score.num_samples or 1))


def _log_ticks(panel: Axes, values: Sequence[float]) -> None:
    """Ticks at the sizes themselves, so long as they lie far enough apart to be read."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    kept: list[float] = []
    for value in reversed(values):
        if not kept or kept[-1] / value > 1.45:
            kept.append(value)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(FixedLocator(kept))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x >= 10_000 else f"{x:g}"))


def learning_curves(cells: Sequence[CellResult], sparsity: float) -> Drawing:
    """Dev score against step, the mean over the cells of a method, a panel per task."""
    columns = statistic.main_columns(cells, sparsity)
    here = [c for c in statistic.final(cells) if c.done and (c.sparsity == sparsity or not c.mask_key)]
    here = [c for c in here if (c.task, c.num_samples) in columns and len(c.curve) > 1]
    name, title = f"curves-{100 * sparsity:g}", f"Dev score while fine-tuning, {percent(sparsity)}"
    used = [column for column in columns if any((c.task, c.num_samples) == column for c in here)]
    if not used:
        return Drawing(name, title, "Needs cells that were evaluated more than once.")
    methods, chosen = sorted({c.method for c in here}, key=method_key), looks(cells)
    with style():
        figure, grid = panels(*wrap(len(used)))
        for panel, column in zip(blank(grid, len(used)), used, strict=True):
            for method in methods:
                group = [c for c in here if c.method == method and (c.task, c.num_samples) == column]
                x, y = _mean_curve(group)
                look = chosen[method]
                panel.plot(x, y, color=look.colour, linestyle=look.line, marker=look.marker,
                           markevery=max(1, len(x) // 6))  # fmt: skip
            whole_ticks(panel)
            panel.set(title=title_of(*column), xlabel="step", ylabel=metric_of(cells, column[0]))
        legend(figure, methods, chosen)
    return Drawing(name, title, "Mean over masks and seeds at the steps that all cells of a method have.", figure)


def _mean_curve(group: Sequence[CellResult]) -> tuple[list[int], list[float]]:
    curves = [{p["step"]: 100 * (p["metrics"].get(c.metric) or 0.0) for p in c.curve} for c in group]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return steps, [float(numpy.mean([curve[step] for curve in curves])) for step in steps]


def draw_all(cells: Sequence[CellResult]) -> Iterator[Drawing]:
    """Every figure of one model's cells, in the papers' order."""
    from finemask_ds.report.maskfigures import against_cost, against_distance, against_loss, similarity

    yield against_sparsity(cells)
    by_masks: tuple[Callable[[Sequence[CellResult]], Drawing], ...] = (against_loss, against_cost, against_distance)
    for draw in by_masks:
        yield draw(cells)
    at = statistic.sparsities(cells) if any(cell.mask_key for cell in cells) else []
    yield from (similarity(cells, sparsity) for sparsity in at)
    for one in (scarcity, learning_curves):
        drawn = [one(cells, sparsity) for sparsity in at or [0.0]]
        kept = [drawing for drawing in drawn if drawing.figure is not None]
        yield from kept or drawn[:1]
