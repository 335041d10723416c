"""The figure of benchmarks/quality.py: dev losses against steps and against seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from finemask_ds.report.heatmap import save_png
from finemask_ds.report.style import panels, style

if TYPE_CHECKING:
    from matplotlib.axis import Axis


class Curve(NamedTuple):
    """One search."""

    setting: str
    """Start and rate; those of one setting look alike."""
    is_papers: bool
    """Drawn black."""
    is_long: bool
    """A line without dots."""
    steps: Sequence[int]
    seconds: Sequence[float]
    """Since the beginning, at these steps."""
    losses: Sequence[float]


def draw(groups: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """A row of panels for each objective and sparsity (``kd-70``) in which settings can be compared."""
    from matplotlib import colormaps

    compared = {group: curves for group, curves in groups.items() if len({curve.setting for curve in curves}) > 1}
    settings = sorted({curve.setting for curves in groups.values() for curve in curves})
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    with style():
        figure, axes = panels(len(compared), 2, 2.6)
        for row, (group, curves) in zip(axes, compared.items(), strict=True):
            for curve in curves:
                line = {
                    "color": "black" if curve.is_papers else colours[settings.index(curve.setting) % len(colours)],
                    "linestyle": "--" if curve.setting.startswith("binary") else "-",
                    "marker": None if curve.is_long else "o", "linewidth": 1, "markersize": 3,
                }  # fmt: skip
                for axes_of, x in zip(row, (curve.steps, curve.seconds), strict=True):
                    axes_of.plot(x, curve.losses, label=curve.setting, **line)
            objective, percent = group.split("-")
            loss = "KD loss" if objective == "kd" else "MLM loss, own head"
            for axes_of, against in zip(row, ("steps", "seconds on one core"), strict=True):
                axes_of.set(xscale="log", yscale="log", xlabel=against, ylabel=f"dev {loss}",
                            title=f"{objective.upper()}, {percent} % sparsity")  # fmt: skip
                _label(axes_of.xaxis, (50, 100, 200, 500, 1000, 2000))
                _label(axes_of.yaxis, (0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 4, 5, 6))
            keys = dict(zip(*reversed(row[1].get_legend_handles_labels()), strict=True))
            told = "lines: 2,000 steps\ndots: fewer"
            row[1].legend(keys.values(), keys, fontsize=7, title_fontsize=7, loc="upper left", bbox_to_anchor=(1, 1),
                          title=told)  # fmt: skip
        save_png(figure, path)


def _label(axis: Axis, values: Sequence[float]) -> None:
    """Ticks at those of the values that are in view."""
    low, high = axis.get_view_interval()
    seen = [value for value in values if low <= value <= high]
    axis.set_ticks(seen, [f"{value:,g}" for value in seen])
    axis.set_minor_formatter("")
