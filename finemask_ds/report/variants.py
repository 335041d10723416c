"""Which masks of one name are not of one method: they are named apart before anything is averaged."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from finemask_ds.report.cells import CellResult
from finemask_ds.run import ON_THE_WAY, Run

_Mask = tuple[str, float | None, int | None]
"""Key, sparsity and number of steps: among a method's masks of one sparsity, seeds are all else that differs."""


def with_variants(cells: Sequence[CellResult]) -> list[CellResult]:
    """Cells whose method is named with those settings in which its searches differ, as ``tamt-kd (init random)``.

    Masks found with other rates or another initialisation are not seeds of one method and are never averaged. Where
    settings are not known, as of imported masks, two masks of one seed tell that they are not: then each of the
    method's masks, at every sparsity, is named by its file, as ``imported (wanda)``.
    """
    named = _by_settings(cells)
    files = _by_file(named)
    return [_called(cell, files.get((cell.backbone, cell.method, cell.sparsity, cell.mask_key))) for cell in named]


def _by_settings(cells: Sequence[CellResult]) -> list[CellResult]:
    values: dict[tuple[str, str], dict[str, set[str]]] = {}
    for cell in cells:
        for name, value in cell.origin.settings if cell.origin else ():
            values.setdefault((cell.backbone, cell.method), {}).setdefault(name, set()).add(value)
    answer = []
    for cell in cells:
        differing = {k for k, found in values.get((cell.backbone, cell.method), {}).items() if len(found) > 1}
        words = [f"{k} {v}" for k, v in (cell.origin.settings if cell.origin else ()) if k in differing]
        answer.append(_called(cell, ", ".join(words)))
    return answer


def _by_file(cells: Sequence[CellResult]) -> dict[tuple[str, str, float | None, str], str]:
    """A name for each mask of those methods that have two masks of one seed and number of steps at some sparsity."""
    seeds: dict[tuple[str, str], dict[tuple[float | None, int | None, int | None], set[str]]] = {}
    files: dict[tuple[str, str], dict[_Mask, Path]] = {}
    for cell in cells:
        if cell.done and cell.mask:
            method, mask = (cell.backbone, cell.method), (cell.mask_key, cell.sparsity, cell.search_steps)
            files.setdefault(method, {}).setdefault(mask, Path(cell.mask))
            if not _is_on_the_way(cell):
                found = seeds.setdefault(method, {})
                found.setdefault((cell.sparsity, cell.search_steps, cell.mask_seed), set()).add(cell.mask_key)
    return {
        (*method, sparsity, key): name
        for method, found in seeds.items()
        if any(len(keys) > 1 for keys in found.values())
        for (key, sparsity, _), name in _names(files[method]).items()
    }


def _is_on_the_way(cell: CellResult) -> bool:
    """Whether a mask is known to be none that a search has ended with: a longer one of the same seed passes others."""
    return cell.origin is not None and cell.origin.path != Run(cell.origin.folder).mask


def _names(files: Mapping[_Mask, Path]) -> dict[_Mask, str]:
    """A method's masks -> as much of the end of their search's folder, or file, as tells those of a step apart.

    Masks on the way of a search share its name, and so do masks of several sparsities whose paths differ in these
    alone: ``wanda-50`` and ``wanda-70`` are ``wanda-*``, one line of a figure. Where files do not tell masks apart,
    their bits do.
    """
    sparsities = {sparsity or 0.0 for _, sparsity, _ in files}
    homes = {mask: _home(path) for mask, path in files.items()}
    if len(sparsities) > 1:
        homes = {mask: _starred(home, sparsities) for mask, home in homes.items()}
    if len({(sparsity, steps, home) for (_, sparsity, steps), home in homes.items()}) == len(homes):
        different = {(steps, home) for (_, _, steps), home in homes.items()}
        for depth in range(1, max(len(home.parts) for home in homes.values()) + 1):
            names = {mask: "/".join(home.parts[-depth:]) for mask, home in homes.items()}
            if len({(steps, name) for (_, _, steps), name in names.items()}) == len(different):
                return names
    return {mask: f"{home.name} {mask[0][:8]}" for mask, home in homes.items()}


def _starred(home: Path, sparsities: Collection[float]) -> Path:
    """The path with a star for each number that is one of the sparsities, as a share or in percent."""
    known = {f"{scale * sparsity:g}" for sparsity in sparsities for scale in (1, 100)}
    return Path(re.sub(r"\d+(\.\d+)?", lambda one: "*" if f"{float(one[0]):g}" in known else one[0], str(home)))


def _home(mask: Path) -> Path:
    """The run directory of the search that writes a mask under such a name, else the file without its ending."""
    run = Run(mask.parent.parent)
    along = mask == run.start_mask or (mask.parent == run.start_mask.parent and ON_THE_WAY.fullmatch(mask.name))
    home = run.folder if along else mask.parent
    return home if home.parts and (along or mask == Run(home).mask) else mask.with_suffix("")


def _called(cell: CellResult, words: str | None) -> CellResult:
    """The cell with these words in the brackets behind its method."""
    if not words:
        return cell
    method = f"{cell.method[:-1]}, {words})" if cell.method.endswith(")") else f"{cell.method} ({words})"
    return replace(cell, method=method)
