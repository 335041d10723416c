"""Heat maps: a small matrix of numbers, readable cell by cell, as pixels or as a PNG file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from finemask_ds.run import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = "viridis"  # safe for the colour-blind, and nowhere near the grey of a missing cell
MISSING = "0.85"
_CELL_INCHES = (0.62, 0.32)
_LETTER_INCHES = 0.085
_LONGEST_LEVEL = 6  # letters of a column's name that fit above its cells
_DOTS_PER_INCH = 110


def heatmap(
    grid: numpy.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, value: str = "", *,
    xlabel: str = "role", ylabel: str = "layer", top: float | None = None, decimals: int | None = None,
) -> Figure:  # fmt: skip
    """Draw a grid, float [rows, columns] of values >= 0, a labelled cell each; NaN is grey and empty.

    The colours span 0 to `top`, else to the next round number above the largest value, so that frames drawn at
    different steps can be compared; `value` names the quantity beside the colour bar. Numbers have so many
    `decimals`, or at most six characters. Long column names stand upright. Nothing global of matplotlib is touched.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    grid = numpy.asarray(grid, dtype=float)
    if grid.shape != (len(rows), len(columns)):
        raise ValueError(f"grid of shape {grid.shape} for {len(rows)} rows and {len(columns)} columns")
    upright = max(map(len, columns)) > _LONGEST_LEVEL
    letters = _LETTER_INCHES * max(map(len, rows))
    high = _LETTER_INCHES * max(map(len, columns)) if upright else 0.0
    size = (1.9 + letters + _CELL_INCHES[0] * len(columns), 1.3 + high + _CELL_INCHES[1] * len(rows))
    figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    if top is None:
        top = _round_up(numpy.nanmax(grid)) if numpy.isfinite(grid).any() else 1.0
    shades = axes.imshow(grid, cmap=colormaps[COLOURS].with_extremes(bad=MISSING), vmin=0, vmax=top, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=90 if upright else 0)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(numpy.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(numpy.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(False)
    axes.grid(which="minor", color="white", linewidth=1, linestyle="-")
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    for (row, column), cell in numpy.ndenumerate(grid):
        if math.isfinite(cell):
            ink = _ink(shades.to_rgba(cell))
            written = _short(cell) if decimals is None else f"{cell:.{decimals}f}"
            axes.text(column, row, written, ha="center", va="center", color=ink, fontsize=8)
    figure.colorbar(shades, ax=axes, label=value)
    return figure


def _round_up(largest: float) -> float:
    """Return the next one-digit multiple of a power of ten that is at least as large."""
    if largest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    return next(factor * power for factor in (1, 2, 3, 4, 5, 6, 8, 10) if factor * power >= largest * (1 - 1e-9))


def _ink(background: numpy.ndarray) -> str:
    """Return the colour, black or white, with more contrast to an RGB background (WCAG luminance)."""
    linear = [(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in background[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"


def _short(value: float) -> str:
    """Return at most six characters: 0, 4e-05, 0.0042, 0.137, 12.3."""
    if value == 0:
        return "0"
    if value < 1e-4:
        return f"{value:.0e}"
    return f"{value:.4f}" if value < 0.01 else f"{value:.3f}" if value < 10 else f"{value:.3g}"


def to_pixels(figure: Figure) -> numpy.ndarray:
    """Render a figure to uint8 [height, width, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return numpy.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def distance_map(grid: numpy.ndarray, rows: Sequence[str], columns: Sequence[str]) -> numpy.ndarray:
    """Render mask distances, float [layers, roles], to uint8 [height, width, 3]: a MaskWatch's `draw`."""
    return to_pixels(heatmap(grid, rows, columns, "mask distance from the start", "1 - Jaccard similarity"))


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    with atomic_write(path, "wb") as stream:
        figure.savefig(stream, format="png")
