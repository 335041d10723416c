"""Everything that a report says, put together once for Markdown and HTML."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from finemask_ds.errors import abbreviated
from finemask_ds.report import scores as statistic
from finemask_ds.report.cells import CellResult, differing
from finemask_ds.report.collect import Collection
from finemask_ds.report.figures import Drawing, draw_all, title_of
from finemask_ds.report.tables import (
    Group,
    Groups,
    Sheet,
    fewer_samples,
    main_sheet,
    mask_sheet,
    name_of,
    other_metrics,
)
from finemask_ds.report.variants import with_variants
from finemask_ds.units import duration


@dataclass(frozen=True)
class Part:
    """What there is of one backbone."""

    model: str
    """As it is called; in brackets which, where that is not its name alone."""
    cells: tuple[CellResult, ...]
    sheets: tuple[Sheet, ...]
    """The scores, sparsity by sparsity."""
    details: tuple[Sheet, ...]
    drawings: tuple[Drawing, ...]
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Content:
    """A report, before it is written as text of any kind."""

    facts: tuple[tuple[str, tuple[str, ...]], ...]
    """What was run, when, by which code, on what."""
    cautions: tuple[str, ...]
    left_out: tuple[str, ...]
    parts: tuple[Part, ...]
    unfinished: tuple[CellResult, ...]
    out: Path

    def link(self, path: Path) -> str:
        """A file as the report links to it: relative, so that the folder may move with its results."""
        return quote(os.path.relpath(path.resolve(), self.out.resolve()))


def put_together(collection: Collection, out: Path) -> Content:
    """Tables, figures and facts of what was collected, for a report in the folder ``out``."""
    by_model = cells_by_model(collection)
    parts = tuple(
        _part(model, cells, f"m{index}-" if index else "") for index, (model, cells) in enumerate(by_model.items())
    )
    unfinished = tuple(cell for part in parts for cell in part.cells if not cell.done)
    careful = tuple(sentence for part in parts for sentence in cautions(part.groups))
    careful = (*_names_of_many(collection.cells), *careful)
    return Content(tuple(facts(collection)), careful, collection.left_out, parts, unfinished, out)


def cells_by_model(collection: Collection) -> dict[str, list[CellResult]]:
    """The cells of each backbone, which are never averaged with those of another; models by name.

    One of several names has them all; of several under one name the first figures of their hashes are told.
    """
    by_backbone: dict[str, list[CellResult]] = {}
    for cell in with_variants(collection.cells):
        by_backbone.setdefault(cell.backbone, []).append(cell)
    names = {backbone: abbreviated(sorted({cell.model for cell in cells})) for backbone, cells in by_backbone.items()}
    by_model = {}
    for backbone, cells in by_backbone.items():
        name, alone = names[backbone], list(names.values()).count(names[backbone]) == 1
        by_model[name if alone else f"{name} ({_weights(cells[0].model_sha256)})"] = cells
    return dict(sorted(by_model.items()))


def _names_of_many(cells: Iterable[CellResult]) -> Iterator[str]:
    """A sentence for each name that stands for several backbones."""
    found: dict[str, set[str | None]] = {}
    for cell in cells:
        found.setdefault(cell.model, set()).add(cell.model_sha256)
    for name, hashes in sorted(found.items()):
        if len(hashes) > 1:
            listed = ", ".join(sorted(map(_weights, hashes)))
            yield f"{name} is not one model in all cells: {listed}. Each is reported by itself."


def _weights(sha256: str | None) -> str:
    return f"weights {sha256[:12]}" if sha256 else "weights not recorded"


def _part(model: str, cells: Sequence[CellResult], prefix: str) -> Part:
    groups = Groups(prefix)
    sheets, details = [], []
    for sparsity in statistic.sparsities(cells):
        board = statistic.board(cells, sparsity)
        fewer = fewer_samples(cells, board, groups)
        sheets += [main_sheet(board, groups), *([fewer] if fewer else [])]
        details += list(other_metrics(board, groups))
    rest = [score for score in statistic.scores(cells) if score.sparsity is not None]
    listed = {cell.path for group in groups.found.values() for cell in group.cells}
    for score in rest:  # cells of no table above, such as masks on the way of a search
        if not any(cell.path in listed for cell in score.cells):
            groups.of(score, score.sparsity)
    masks = mask_sheet(cells, groups)
    details += [masks] if masks else []
    drawings = tuple(replace(drawing, name=prefix + drawing.name) for drawing in draw_all(cells))
    return Part(model, tuple(cells), tuple(sheets), tuple(details), drawings, tuple(groups.found.values()))


def cautions(groups: Iterable[Group]) -> Iterator[str]:
    """Sentences about numbers that average over cells that are not alike, and about undefined scores."""
    unlike: dict[tuple[str, ...], list[str]] = {}
    for group in groups:
        if found := differing(group.cells):
            unlike.setdefault(found, []).append(group.title)
        undefined = [cell for cell in group.cells if cell.done and cell.score is None]
        if reasons := dict.fromkeys(cell.undefined or "no reason given" for cell in undefined):
            yield f"{group.title}: a score is undefined ({'; '.join(reasons)}) and counts 0."
    for found, titles in unlike.items():
        more = f" and {len(titles) - 3} more" if len(titles) > 3 else ""
        yield f"Cells that differ in {', '.join(found)} are averaged in: {'; '.join(titles[:3])}{more}."


def facts(collection: Collection) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What was run, when, by which code and on what, a line for each different answer."""
    cells, sources = collection.cells, collection.provenances
    states = [sum(cell.state == state for cell in cells) for state in ("done", "missing", "failed")]
    yield "cells", ("{} done, {} missing, {} failed".format(*states),)
    if collection.duplicates:
        yield "found twice", (f"{collection.duplicates} cells, counted once",)
    tasks = sorted({cell.task for cell in cells}, key=statistic.task_key)
    yield "tasks", (", ".join(title_of(task) for task in tasks),)
    methods = sorted({cell.method for cell in cells}, key=statistic.method_key)
    yield "methods", (", ".join(name_of(method) for method in methods),)
    yield "models", _distinct(cell.model for cell in cells)
    tuning = sum(cell.seconds or 0 for cell in cells)
    searching = sum(origin.seconds or 0 for origin in collection.searches)
    count = len(collection.searches)
    yield "time", (f"fine-tuning {duration(tuning)}, {count} searches {duration(searching)}",)
    started = sorted(str(source["started"]) for source in sources if source.get("started"))
    if started:
        yield "started", (started[0] if started[0] == started[-1] else f"{started[0]} to {started[-1]}",)
    yield "commit", _distinct(_commit(source.get("code")) for source in sources)
    yield "hardware", _distinct(_hardware(source.get("hardware")) for source in sources)
    versions = [source["versions"] for source in sources if source.get("versions")]
    versions = versions or [cell.versions for cell in cells]
    yield "versions", _distinct(_versions(one) for one in versions)


def _distinct(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({value for value in values if value})) or ("not recorded",)


def _commit(code: Any) -> str:
    if not isinstance(code, Mapping) or not code.get("commit"):
        return ""
    return f"{code['commit']}" + (" with changes that are not committed" if code.get("dirty") else "")


def _hardware(found: Any) -> str:
    if not isinstance(found, Mapping):
        return ""
    gpus = found.get("gpus") or []
    cores = found.get("cores")
    counted = f"{cores} core{'s' * (cores != 1)}"
    words = [found.get("cpu"), counted, f"{found.get('memory_gib')} GiB", *map(str, gpus)]
    return ", ".join(str(word) for word in words if word)


def _versions(found: Any) -> str:
    if not isinstance(found, Mapping):
        return ""
    return ", ".join(f"{k} {v if isinstance(v, str) else json.dumps(v)}" for k, v in sorted(found.items()) if v)
