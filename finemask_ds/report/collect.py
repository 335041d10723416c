"""What runs left on disk, read into plain values: cells of fine-tuning, masks of searches, who made them and when."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from finemask_ds.dispatch.plan import Plan
from finemask_ds.errors import UserError, abbreviated
from finemask_ds.report.cells import CellResult, differing, finished_cell, planned_cell
from finemask_ds.report.origins import MaskOrigin, Origins
from finemask_ds.run import Run, read_json

DEPTH = 4
"""Folders below a RUN that are looked into."""

_OWN = {"checkpoints", "masks", "tb", "done", "report", "figures", "cells"}
"""Folders of a run, a plan or a report that hold no runs; cells are read through their plan. Elsewhere they are names
like others."""
_SIGNS = ("config.json", "result.json", "plan.json", "cells", "report.md")
"""What such a folder is known by."""


@dataclass(frozen=True)
class Collection:
    """All that was found, cells in a fixed order."""

    cells: tuple[CellResult, ...]
    searches: tuple[MaskOrigin, ...]
    """Finished searches, a line each."""
    provenances: tuple[Mapping[str, Any], ...]
    left_out: tuple[str, ...]
    """Sentences about files that could not be used."""
    duplicates: int
    """Cells found a second time and counted once."""


def collect(runs: Sequence[Path]) -> Collection:
    """Read plans, cells and searches in and below the folders.

    Raises:
        UserError: where a folder is missing or none of them holds a cell or a search.
    """
    for run in runs:
        if not run.exists():
            raise UserError(f"there is no {run}: type the folder of a plan, of a fine-tuning or of a search")
    reading = _Reading()
    for run in runs:
        reading.folder(run if run.is_dir() else run.parent, DEPTH)
    cells, duplicates = _once(_with_models(reading.cells))
    if not cells and not reading.origins.searches:
        names = abbreviated([str(run) for run in runs])
        why = f" ({reading.left_out[0]})" if reading.left_out else ""
        raise UserError(
            f"{names} holds no plan, fine-tuning or search{why}: type the folder that launcher/finetune.py, "
            f"launcher/dispatch.py or a search wrote, such as runs/quickstart"
        )
    cells = _with_origins(cells, reading.origins)
    left_out = (*reading.left_out, *reading.origins.left_out)
    folders = {cell.path.parent for cell in cells} | {origin.folder for origin in reading.origins.searches}
    return Collection(
        tuple(sorted(cells, key=lambda cell: (cell.task, cell.method, cell.mask_key, cell.seed, cell.id))),
        tuple(reading.origins.searches),
        tuple(_provenances(sorted(folders), reading.origins)),
        tuple(dict.fromkeys(left_out)),
        duplicates,
    )


class _Reading:
    """The state of one walk."""

    def __init__(self) -> None:
        self.cells: list[CellResult] = []
        self.origins = Origins()
        self.left_out: list[str] = []
        self._seen: set[Path] = set()

    def folder(self, folder: Path, depth: int) -> None:
        """Read what the folder is, then look below."""
        if folder.resolve() in self._seen:
            return
        self._seen.add(folder.resolve())
        if (folder / "plan.json").is_file() or (folder / "cells").is_dir():
            self.plan(folder)
        elif (folder / "result.json").is_file():
            self.result(folder)
        if depth:
            for below in sorted(_folders(folder)):
                self.folder(below, depth - 1)

    def plan(self, root: Path) -> None:
        """The cells of a plan, in any state, and those that a lost plan left."""
        plan = self.tried(partial(Plan.read, root), root / "plan.json") if (root / "plan.json").exists() else None
        planned = {cell.id: cell for cell in plan.cells} if plan else {}
        found = {path.name for path in (root / "cells").iterdir()} if (root / "cells").is_dir() else set()
        for name in sorted(planned.keys() | found):
            folder = root / "cells" / name
            there, before = (folder / "result.json").is_file(), len(self.left_out)
            done = there and self.result(folder)
            if there and not done and len(self.left_out) == before:
                self.left_out.append(f"{folder / 'result.json'} is no result of a fine-tuning")
            if not done and name in planned:
                cell = self.tried(partial(planned_cell, root, planned[name]), folder)
                self.cells += [cell] if cell is not None else []

    def result(self, folder: Path) -> bool:
        """A folder with a result.json: a cell, a search or something foreign; False where it is broken."""
        path = folder / "result.json"
        value = self.tried(partial(read_json, path), path)
        if not isinstance(value, dict):
            return False
        if value.get("kind") == "finetune":
            cell = self.tried(partial(finished_cell, path, value), path)
            self.cells += [cell] if cell is not None else []
            return cell is not None
        if "target_sparsity" in value:
            self.origins.read(folder)
            return True
        return False

    def tried(self, read: Callable[[], Any], path: Path) -> Any:
        """What ``read`` gives, or None and a sentence in ``left_out``."""
        try:
            return read()
        except UserError as error:
            self.left_out.append(str(error))
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            self.left_out.append(f"{path} is not as finemask writes it ({type(error).__name__}: {error})")
        return None


def _folders(folder: Path) -> Iterator[Path]:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    own = _OWN if {entry.name for entry in entries}.intersection(_SIGNS) else set()
    for entry in entries:
        skipped = entry.name.startswith((".", "attempt-")) or entry.name in own
        if not skipped and entry.is_dir(follow_symlinks=False):
            yield Path(entry.path)


def _once(cells: Sequence[CellResult]) -> tuple[list[CellResult], int]:
    """Each cell once, a finished one before one that is not, whatever folder it was found in.

    Finished ones are the same where model, method, mask, rows, seed and settings are, as far as these are known; ids
    alone are names of folders. (Two methods may find one mask, as OMP and TAMT before a score has crossed.)
    """
    kept: dict[tuple[object, ...], list[CellResult]] = {}
    known = set()
    for cell in sorted(cells, key=lambda cell: (not cell.done, len(cell.untold))):
        planned = (cell.backbone, cell.id)
        asked = (cell.backbone, cell.task, cell.method, cell.mask_key, cell.seed, cell.num_samples)
        alike = kept.setdefault(asked if cell.done else planned, [])
        if all(differing((cell, other)) for other in alike) if cell.done else planned not in known:
            alike.append(cell)
        known.add(planned)
    found = [cell for alike in kept.values() for cell in alike]
    return found, len(cells) - len(found)


def _with_models(cells: Sequence[CellResult]) -> list[CellResult]:
    """Cells that know their theta_0: those without a result from others of the same plan, or all others, of its name.

    Where these are not all of one, it stays unknown.
    """
    found: dict[tuple[Path | None, str], set[str]] = {}
    for cell in cells:
        for where in (cell.path.parent.parent, None):
            if cell.model_sha256:
                found.setdefault((where, cell.model), set()).add(cell.model_sha256)
    answer = []
    for cell in cells:
        near = found.get((cell.path.parent.parent, cell.model)) or found.get((None, cell.model)) or set()
        known = cell.model_sha256 or (min(near) if len(near) == 1 else None)
        answer.append(replace(cell, model_sha256=known))
    return answer


def _with_origins(cells: Sequence[CellResult], origins: Origins) -> list[CellResult]:
    """Cells with the search behind their mask; those without a result learn from it, or from cells of the same mask."""
    alike = {cell.mask_sha256 or cell.mask: cell for cell in cells if cell.done and cell.mask}
    answer = []
    for cell in cells:
        origin = origins.of(cell.mask, cell.path.parent, cell.mask_sha256, cell.mask_key) if cell.mask else None
        cell = replace(cell, origin=origin)
        if not cell.done and cell.mask:
            source = alike.get(cell.mask_sha256 or cell.mask)
            if source is not None:
                cell = replace(cell, method=source.method, sparsity=source.sparsity, mask_key=source.mask_key,
                               mask_seed=source.mask_seed, search_steps=source.search_steps)  # fmt: skip
            elif origin is not None:
                cell = replace(cell, sparsity=origin.target_sparsity, mask_seed=origin.seed,
                               search_steps=origin.steps)  # fmt: skip
        answer.append(cell)
    return answer


def _provenances(folders: Sequence[Path], origins: Origins) -> Iterator[Mapping[str, Any]]:
    for folder in folders:
        for path in [Run(folder).provenance, *sorted(folder.glob("attempt-*/provenance.json"))]:
            value = origins.json(path)
            if value:
                yield value
