"""A report's files: page, Markdown, CSV and figures, each whole or not there."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from finemask_ds.report import scores as statistic
from finemask_ds.report.cells import CellResult
from finemask_ds.report.collect import collect
from finemask_ds.report.content import Part, cautions, cells_by_model, put_together
from finemask_ds.report.heatmap import save_png
from finemask_ds.report.page import html, markdown_text
from finemask_ds.report.style import style
from finemask_ds.report.table import aligned
from finemask_ds.report.tables import Groups, main_sheet
from finemask_ds.run import atomic_write

_OURS = r"(m\d+-)?(score-(against|by)|similarity|scarcity|curves)-[\w.]+\.png"
"""Names of figures; no other file is ever taken away."""

_NOT_PLAIN = ("curve", "versions", "origin", "error", "untold")


def write_report(runs: Sequence[Path], out: Path | None = None) -> tuple[Path, list[str]]:
    """Write report.md, cells.csv, scores.csv, index.html and figures/*.png about the runs.

    The same results give the same bytes: nothing of the day or the machine of the writing is in the files.

    Args:
        runs: folders of plans, fine-tunings and searches, or folders of such.
        out: default: ``report`` in the first of them.

    Returns:
        The page's path, and sentences about what could not be read.

    Raises:
        UserError: where nothing is found or the folder cannot be written.
    """
    first = Path(runs[0])
    out = Path(out) if out is not None else (first.parent if first.is_file() else first) / "report"
    collection = collect(runs)
    content = put_together(collection, out)
    cells = [cell for part in content.parts for cell in part.cells]
    _write_csv(out / "cells.csv", [_cell_fields(cell, content.link(cell.path)) for cell in cells], _cell_names())
    _write_csv(out / "scores.csv", list(_score_rows(content.parts)), _SCORE_NAMES)
    kept = set()
    for part in content.parts:
        for drawing in part.drawings:
            if drawing.figure is not None:
                path = out / "figures" / f"{drawing.name}.png"
                kept.add(path)
                with style():
                    save_png(drawing.figure, path)
    for path in (out / "figures").glob("*.png"):  # of an earlier report in the same folder
        if path not in kept and re.fullmatch(_OURS, path.name):
            path.unlink()
    for name, text in (("report.md", markdown_text(content)), ("index.html", html(content))):
        with atomic_write(out / name) as stream:
            stream.write(text)
    return out / "index.html", list(collection.left_out)


def score_tables(runs: Sequence[Path]) -> str:
    """The tables of scores, aligned for a terminal, and what is to be read with care; the numbers are the report's.

    Raises:
        UserError: where nothing is found.
    """
    lines = []
    for model, cells in cells_by_model(collect(runs)).items():
        groups = Groups("")
        for sparsity in statistic.sparsities(cells):
            sheet = main_sheet(statistic.board(cells, sparsity), groups)
            rows = [
                [name, *(f"{e.text} ({e.small})" if e.small else e.text for e in found)] for name, found in sheet.rows
            ]
            lines += [f"{sheet.title} ({model})", aligned(sheet.header, rows), ""]
        if careful := list(cautions(groups.found.values())):
            lines += [*careful, ""]
    return "\n".join(lines)


def _cell_names() -> list[str]:
    return [field.name for field in dataclasses.fields(CellResult) if field.name not in _NOT_PLAIN]


def _cell_fields(cell: CellResult, path: str) -> dict[str, Any]:
    """The plain fields; maps as JSON, the path as the page links to it."""
    fields = {name: getattr(cell, name) for name in _cell_names()} | {"path": path}
    return {k: json.dumps(v, sort_keys=True) if isinstance(v, dict) else v for k, v in fields.items()}


_SCORE_NAMES = ["model", "method", "sparsity", "search_steps", "task", "metric", "num_samples", "mean", "sd", "n",
                "over", "cells_done", "cells_planned", "undefined"]  # fmt: skip


def _score_rows(parts: Iterable[Part]) -> Iterator[dict[str, Any]]:
    for part in parts:
        for score in statistic.scores(part.cells):
            row = {name: getattr(score, name) for name in _SCORE_NAMES if hasattr(score, name)}
            metric = next((cell.metric for cell in score.cells if cell.metric), "")
            counts = {"cells_done": score.done, "cells_planned": len(score.cells)}
            yield {**row, "model": part.model, "metric": metric, **counts, "undefined": "; ".join(score.undefined)}


def _write_csv(path: Path, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    with atomic_write(path) as stream:
        writer = csv.DictWriter(stream, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
