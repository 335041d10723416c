"""How the figures look: one colour, marker and line per method everywhere, sizes, and the way to PNG and SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from finemask_ds.report.cells import CellResult
from finemask_ds.report.scores import base_method, method_key

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1a1b1c"
"""Of text and axes; SVG files for a page say ``currentColor`` in its place, so that a dark page has light ink."""

WIDTH_INCHES = 9.6
"""Of every figure; at a page's width a point is then more than a CSS pixel."""

_PIXELS_PER_INCH = 106
"""Of a page, at most: text of 9 points is then as high as the page's small print."""

_SALT = "finemask"


class Look(NamedTuple):
    """How a method is drawn."""

    colour: str
    marker: str
    line: Any
    """A name or (offset, dashes in points) of matplotlib."""


_LOOKS = {
    "full": Look(INK, "p", "--"),
    "tamt-mlm+kd": Look("#CC79A7", "P", "-"),
    "tamt-mlm": Look("#009E73", "o", "-"),
    "tamt-kd": Look("#D55E00", "s", (0, (6, 2))),
    "imp": Look("#0072B2", "^", (0, (5, 2, 1, 2))),
    "omp": Look("#E69F00", "D", (0, (3, 2))),
    "random": Look("#7F7F7F", "X", (0, (1, 1.5))),
    "reconstruction": Look("#56B4E9", "v", (0, (8, 2, 1, 2))),
}

_OTHER_COLOURS = ("#1B6B6B", "#8C564B", "#B8A000", "#9467BD")
_OTHER_MARKERS = ("<", ">", "h", "d", "8", "H", "*")
"""For variants and methods of others, combined; the colours above but black are from Okabe and Ito's palette."""


def looks(cells: Iterable[CellResult]) -> dict[str, Look]:
    """A look for each method of all the cells: the known ones are the same in every report."""
    found: dict[str, Look] = {}
    taken: set[str] = set()
    others = 0
    for method in sorted({cell.method for cell in cells}, key=method_key):
        known = base_method(method)
        if known in _LOOKS and known not in taken:
            found[method] = _LOOKS[known]
        else:
            colour = _OTHER_COLOURS[others % len(_OTHER_COLOURS)]
            found[method] = Look(colour, _OTHER_MARKERS[others % len(_OTHER_MARKERS)], (0, (4, 1 + others % 3)))
            others += 1
        taken.add(known)
    return found


@contextmanager
def style() -> Iterator[None]:
    """Fonts, ink and file options of the figures, for the block only."""
    from matplotlib import rc_context

    coloured = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color",
                "legend.labelcolor")  # fmt: skip
    options = {
        **dict.fromkeys(coloured, INK), "font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False,
        "axes.spines.right": False, "lines.linewidth": 1.6, "lines.markersize": 5, "axes.grid": True,
        "grid.color": "#80808040", "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
        "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": _SALT, "font.family": "DejaVu Sans",
    }  # fmt: skip
    with rc_context(options):  # type: ignore[arg-type]
        yield


def panels(rows: int, columns: int, height_inches: float = 2.5) -> tuple[Figure, list[list[Axes]]]:
    """A figure of page width with a grid of axes, laid out so that nothing overlaps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, height_inches * rows + 0.5), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr,call-arg]
    grid = figure.subplots(rows, columns, squeeze=False)
    return figure, [list(row) for row in grid]


def wrap(count: int, widest: int = 3) -> tuple[int, int]:
    """Rows and columns for so many panels."""
    columns = min(count, 2 if count == 4 else widest)
    return -(-count // columns), columns


def legend(
    figure: Figure, methods: Sequence[str], chosen: Mapping[str, Look], *, lines: bool = True,
    flat: Sequence[str] = ("full",),
) -> None:  # fmt: skip
    """The key of the methods above all panels, outside of the data; ``flat`` ones are lines without markers."""
    from matplotlib.lines import Line2D

    keys = [
        Line2D([], [], color=chosen[method].colour, marker="" if lines and method in flat else chosen[method].marker,
               linestyle=chosen[method].line if lines else "", label="full model" if method == "full" else method)
        for method in methods
    ]  # fmt: skip
    if keys:
        widest = max(len(method) for method in methods)
        figure.legend(handles=keys, loc="outside upper center", ncols=7 if widest < 14 else 3 if widest < 40 else 1,
                      handlelength=3.2 if lines else 1.5, columnspacing=1.6)  # fmt: skip


def whole_ticks(panel: Axes) -> None:
    """Ticks of steps, which have no halves."""
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def blank(grid: Sequence[Sequence[Axes]], used: int) -> list[Axes]:
    """The first ``used`` axes of a grid; the others are taken away."""
    flat = [axes for row in grid for axes in row]
    for axes in flat[used:]:
        axes.remove()
    return flat[:used]


def to_svg(figure: Figure, name: str) -> str:
    """An ``<svg>`` element to stand in a page: text is text, ids are the page's own, ink is the page's."""
    stream = io.StringIO()
    with style():
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", text)
    pixels = round(_PIXELS_PER_INCH * figure.get_figwidth())
    shown = f"max-width:{pixels}px;min-width:min(46rem,{pixels}px)"
    text = re.sub(r"<svg [^>]*?viewBox", f'<svg style="{shown}" role="img" aria-labelledby="{name}-caption" '
                  f'xmlns:xlink="http://www.w3.org/1999/xlink" viewBox', text, count=1)  # fmt: skip
    text = text.replace("xlink:href=", "href=").replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    return text.replace(INK, "currentColor")


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None for fewer than three points or where one side is constant."""
    from scipy.stats import spearmanr

    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(numpy.asarray(spearmanr(x, y).statistic))
