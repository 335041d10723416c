"""Figures with a point per mask: against pre-training loss, cost of the search, distance from OMP; similarity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy

from finemask_ds.errors import UserError
from finemask_ds.report import scores as statistic
from finemask_ds.report.cells import CellResult
from finemask_ds.report.figures import Drawing, percent, title_of
from finemask_ds.report.heatmap import heatmap
from finemask_ds.report.origins import find_mask
from finemask_ds.report.scores import Column, MaskPoint, base_method, method_key
from finemask_ds.report.style import Look, blank, legend, looks, panels, spearman, style, whole_ticks, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from finemask_ds.masks.mask import Mask

MOST_MASKS = 24
"""Of a similarity matrix that can still be read."""

_THERE = ", where the average is over CoLA, SST-2, MNLI, STS-B and SQuAD."
_NO_SEARCH = ("omp", "random")

_Number = Callable[[CellResult], float | None]


def _origin(name: str) -> _Number:
    return lambda cell: getattr(cell.origin, name) if cell.origin else None


def _points(cells: Sequence[CellResult], sparsity: float) -> tuple[list[Column], list[MaskPoint], str]:
    """The masks of one sparsity, and the words of a caption about their average."""
    here = [cell for cell in cells if cell.sparsity == sparsity]
    tasks, points, left_out = statistic.mask_points(here, statistic.main_columns(cells, sparsity))
    names = ", ".join(title_of(*task) for task in tasks)
    words = f"at {percent(sparsity)} the average is over {names or 'no task'}"
    masks = "1 mask" if left_out == 1 else f"{left_out} masks"
    return tasks, points, words + (f" (left out: {masks} without all of these)" if left_out else "")


def _grid(
    cells: Sequence[CellResult], axes: Mapping[str, _Number], drawn: Callable[[Axes, list[MaskPoint], _Number], None],
    enough: Callable[[list[MaskPoint], _Number], bool], flat: Sequence[str] | None = None,
) -> tuple[Figure | None, str]:  # fmt: skip
    """A row of panels per sparsity that has data, a panel per quantity of the horizontal axis."""
    found = {}
    for sparsity in statistic.sparsities(cells):
        tasks, points, words = _points(cells, sparsity)
        if tasks and any(enough(points, number) for number in axes.values()):
            found[sparsity] = (points, words)
    if not found:
        return None, ""
    shape = (len(found), len(axes)) if len(axes) > 1 else wrap(len(found))
    figure, grid = panels(*shape, 2.7)
    flat_grid = iter(blank(grid, len(found) * len(axes)))
    methods = sorted({p.cell.method for points, _ in found.values() for p in points}, key=method_key)
    for sparsity, (points, _) in found.items():
        for (label, number), panel in zip(axes.items(), flat_grid, strict=False):  # takes no panel too many
            panel.set(xlabel=label, ylabel="average score x 100", title=f"{percent(sparsity)} sparsity")
            drawn(panel, points, number)
    legend(figure, methods, looks(cells), lines=flat is not None, flat=flat or ())
    sentence = "; ".join(words for _, words in found.values())
    return figure, f"{sentence[0].upper()}{sentence[1:]}."


def _scatter(panel: Axes, points: Sequence[tuple[float, MaskPoint]], chosen: Mapping[str, Look]) -> None:
    for method in dict.fromkeys(point.cell.method for _, point in points):
        x, y = numpy.array([(x, 100 * p.mean) for x, p in points if p.cell.method == method]).T
        look = chosen[method]
        panel.plot(x, y, color=look.colour, marker=look.marker, linestyle="", alpha=0.85)


def _known(points: Sequence[MaskPoint], number: _Number) -> list[tuple[float, MaskPoint]]:
    return [(x, point) for point in points if (x := number(point.cell)) is not None]


def against_loss(cells: Sequence[CellResult]) -> Drawing:
    """Pre-training dev loss against the downstream average, a point per mask, also on the way (TAMT Figure 5)."""
    chosen = looks(cells)

    def draw(panel: Axes, points: list[MaskPoint], number: _Number) -> None:
        known = _known(points, number)
        if not known:
            panel.text(0.5, 0.5, "no mask with this loss", transform=panel.transAxes, ha="center")
            return
        _scatter(panel, known, chosen)
        rank = spearman([x for x, _ in known], [point.mean for _, point in known])
        words = "Spearman's rho undefined" if rank is None else f"Spearman's rho = {rank:.2f}"
        panel.set_title(f"{panel.get_title()}: {words}, n = {len(known)}")

    axes = {"MLM dev loss (nats per masked token)": _origin("mlm_loss"), "KD dev loss": _origin("kd_loss")}
    name, title = "score-against-loss", "Pre-training loss against downstream score"
    with style():
        figure, words = _grid(cells, axes, draw, lambda points, number: len(_known(points, number)) > 1)
    if figure is None:
        return Drawing(name, title, "Needs two or more masks with finished searches (result.json beside the mask), "
                       "each fine-tuned on the same tasks.")  # fmt: skip
    return Drawing(name, title, f"A point per mask, those on the way of a search too. {words} As Figure 5 of "
                   f"TAMT{_THERE}", figure)  # fmt: skip


def _steps(cell: CellResult) -> float | None:
    return cell.search_steps if cell.search_steps is not None else _origin("steps")(cell)


def _searched(points: Sequence[MaskPoint], number: _Number) -> dict[str, list[tuple[float, float, float]]]:
    """Mean x, mean score and its deviation over masks, by method and number of steps."""
    groups: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for x, point in _known(points, number):
        if base_method(point.cell.method) not in _NO_SEARCH:
            steps = _steps(point.cell) or 0
            groups.setdefault(point.cell.method, {}).setdefault(steps, []).append((x, 100 * point.mean))
    answer: dict[str, list[tuple[float, float, float]]] = {}
    for method, by_steps in groups.items():
        for _, pairs in sorted(by_steps.items()):
            x, y = numpy.array(pairs).T
            deviation = float(y.std(ddof=1)) if len(y) > 1 else 0.0
            answer.setdefault(method, []).append((float(x.mean()), float(y.mean()), deviation))
    return answer


def against_cost(cells: Sequence[CellResult]) -> Drawing:
    """Downstream average against steps and seconds of the search; OMP and random need none (TAMT Figure 6)."""
    chosen = looks(cells)

    def draw(panel: Axes, points: list[MaskPoint], number: _Number) -> None:
        for method, found in _searched(points, number).items():
            x, y, sd = numpy.array(found).T
            look = chosen[method]
            if len(x) > 1:
                panel.fill_between(x, y - sd, y + sd, color=look.colour, alpha=0.15, linewidth=0)
                panel.plot(x, y, color=look.colour, marker=look.marker, linestyle=look.line)
            else:
                panel.errorbar(x, y, yerr=sd, color=look.colour, marker=look.marker, linestyle="", capsize=3)
        for method in _NO_SEARCH:
            level = [100 * point.mean for point in points if point.cell.method == method]
            if level:
                panel.axhline(float(numpy.mean(level)), color=chosen[method].colour, linestyle=chosen[method].line)
        panel.set_xlim(left=0)
        if number is _steps:
            whole_ticks(panel)

    axes = {"steps of the search": _steps, "seconds of the search": _origin("seconds")}
    name, title = "score-against-cost", "Downstream score against the cost of the search"
    with style():
        figure, words = _grid(cells, axes, draw, lambda points, number: bool(_searched(points, number)),
                              _NO_SEARCH)  # fmt: skip
    if figure is None:
        return Drawing(name, title, "Needs fine-tuned masks of a search (TAMT or IMP), best also masks kept on its "
                       "way (--keep_every) or searches of several lengths.")  # fmt: skip
    return Drawing(name, title, f"Lines join masks taken on the way or after searches of several lengths; bands and "
                   f"bars are one standard deviation over masks; OMP and random, which cost no step, are horizontal. "
                   f"{words} As Figure 6 of TAMT{_THERE}", figure)  # fmt: skip


def against_distance(cells: Sequence[CellResult]) -> Drawing:
    """Downstream average against the distance from the OMP mask (TAMT Figure 8, left)."""
    chosen = looks(cells)

    def draw(panel: Axes, points: list[MaskPoint], number: _Number) -> None:
        known = _known(points, number)
        by_search: dict[tuple[str, int | None], list[tuple[float, float, float]]] = {}
        for x, point in known:
            key = (point.cell.method, point.cell.mask_seed)
            by_search.setdefault(key, []).append((_steps(point.cell) or 0, x, 100 * point.mean))
        for (method, _), along in by_search.items():
            _, xs, ys = numpy.array(sorted(along)).T
            panel.plot(xs, ys, color=chosen[method].colour, linewidth=0.8, alpha=0.5)
        _scatter(panel, known, chosen)
        panel.set_xlim(-0.02, 0.02 + 1.06 * max((x for x, _ in known), default=1.0))

    axes = {"distance from OMP (1 - Jaccard)": _origin("distance_from_omp")}
    name, title = "score-against-distance", "Distance from the OMP mask against downstream score"
    with style():
        figure, words = _grid(cells, axes, draw, lambda points, number: bool(_known(points, number)))
    if figure is None:
        return Drawing(name, title, "Needs fine-tuned masks whose searches left their result.json.")
    return Drawing(name, title, f"A point per mask; thin lines join one method and seed from step to step. {words} As "
                   f"the left of Figure 8 of TAMT.", figure)  # fmt: skip


def similarity(cells: Sequence[CellResult], sparsity: float) -> Drawing:
    """How alike the masks of one sparsity are: mean over matrices of the Jaccard similarity (TAMT Figure 8, right)."""
    from finemask_ds.masks.files import load_mask
    from finemask_ds.masks.mask import in_common

    name, title = f"similarity-{100 * sparsity:g}", f"Similarity of the masks, {percent(sparsity)}"
    used: dict[str, CellResult] = {}
    for cell in sorted(statistic.final(cells), key=lambda c: (method_key(c.method), c.mask_seed or 0)):
        if cell.done and cell.mask and cell.sparsity == sparsity:
            used.setdefault(cell.mask_key, cell)
    masks: list[Mask] = []
    labels: list[str] = []
    for cell in list(used.values())[:MOST_MASKS]:
        path = find_mask(cell.mask or "", cell.path.parent) or (cell.origin.path if cell.origin else None)
        try:
            if path is None:
                continue
            mask = load_mask(path)
            in_common([*masks, mask])
        except UserError:
            continue
        masks.append(mask)
        alone = sum(other.method == cell.method for other in used.values()) == 1
        labels.append(cell.method if alone or cell.mask_seed is None else f"{cell.method} {cell.mask_seed}")
    if len(masks) < 2:
        return Drawing(name, title, "Needs the files of two or more masks that cells were fine-tuned with.")
    masks, others = in_common(masks)
    grid = numpy.array([[one.mean_jaccard(two) for two in masks] for one in masks])
    with style():
        figure = heatmap(grid, labels, labels, "", "Jaccard similarity", xlabel="mask", ylabel="mask", top=1.0,
                         decimals=2)  # fmt: skip
    unread = len(used) - len(masks)
    words = f" Of the {len(masks[0])} matrices that all of them have." if others else ""
    if unread:
        words += f" {unread} of {len(used)} masks are not shown (file not found or of other matrices, or too many)."
    return Drawing(name, title, "Mean over the matrices of |A and B| / |A or B|; the number behind a method is the "
                   f"seed of its search.{words} As the right of Figure 8 of TAMT.", figure)  # fmt: skip
