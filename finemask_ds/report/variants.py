"""Which masks of one name are not of one method: they are named apart before anything is averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from finemask_ds.report.cells import CellResult
from finemask_ds.run import ON_THE_WAY, Run

_Place = tuple[str, str, float | None]
"""Model, method and sparsity: among the masks of one, seeds are all that differs, but for masks on the way."""


def with_variants(cells: Sequence[CellResult]) -> list[CellResult]:
    """Cells whose method is named with those settings in which its searches differ, as ``tamt-kd (init random)``.

    Masks found with other rates or another initialisation are not seeds of one method and are never averaged. Where
    settings are not known, as of imported masks, two masks of one seed tell that they are not: then each of the
    method's masks is named by its file, as ``imported (wanda)``.
    """
    named = _by_settings(cells)
    files = _by_file(named)
    return [_called(cell, files.get((*_place(cell), cell.mask_key))) for cell in named]


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
    """A name for each mask of those methods that have two masks of one seed and number of steps at one sparsity."""
    seeds: dict[_Place, dict[tuple[int | None, int | None], set[str]]] = {}
    files: dict[_Place, dict[tuple[str, int | None], Path]] = {}
    for cell in cells:
        if cell.done and cell.mask:
            files.setdefault(_place(cell), {}).setdefault((cell.mask_key, cell.search_steps), Path(cell.mask))
            if not _is_on_the_way(cell):
                found = seeds.setdefault(_place(cell), {})
                found.setdefault((cell.search_steps, cell.mask_seed), set()).add(cell.mask_key)
    return {
        (*place, key): name
        for place, found in seeds.items()
        if any(len(keys) > 1 for keys in found.values())
        for (key, _), name in _names(files[place]).items()
    }


def _is_on_the_way(cell: CellResult) -> bool:
    """Whether a mask is known to be none that a search has ended with: a longer one of the same seed passes others."""
    return cell.origin is not None and cell.origin.path != Run(cell.origin.folder).mask


def _names(files: Mapping[tuple[str, int | None], Path]) -> dict[tuple[str, int | None], str]:
    """Masks by key and steps -> as much of the end of their search's folder, or file, as tells those of a step apart.

    Masks on the way of a search share its name; where files do not tell them apart, their bits do.
    """
    homes = {mask: _home(path) for mask, path in files.items()}
    for depth in range(1, max(len(home.parts) for home in homes.values()) + 1):
        names = {mask: "/".join(home.parts[-depth:]) for mask, home in homes.items()}
        if len({(steps, names[key, steps]) for key, steps in names}) == len(names):
            return names
    return {(key, steps): f"{home.name} {key[:8]}" for (key, steps), home in homes.items()}


def _home(mask: Path) -> Path:
    """The run directory of the search that writes a mask under such a name, else the file without its ending."""
    run = Run(mask.parent.parent)
    along = mask == run.start_mask or (mask.parent == run.start_mask.parent and ON_THE_WAY.fullmatch(mask.name))
    home = run.folder if along else mask.parent
    return home if home.parts and (along or mask == Run(home).mask) else mask.with_suffix("")


def _place(cell: CellResult) -> _Place:
    return cell.backbone, cell.method, cell.sparsity


def _called(cell: CellResult, words: str | None) -> CellResult:
    """The cell with these words in the brackets behind its method."""
    if not words:
        return cell
    method = f"{cell.method[:-1]}, {words})" if cell.method.endswith(")") else f"{cell.method} ({words})"
    return replace(cell, method=method)
