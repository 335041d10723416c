#!/usr/bin/env python
"""What became slower, larger or faster between two files of the same benchmark; exit code 1 where something got worse
or is missing, 2 where a file is none.

    python benchmarks/compare.py OLD.json NEW.json --tolerance 0.1

Every figure of every cell whose name tells a direction is compared: of *_sec, *_gib and ratio* less is better, of
*_per_sec more is. A change counts where it is beyond the tolerance and, for a figure that has quartiles, where those of
the old and the new do not overlap. What others are measured by (dense and naive training, torch.kthvalue, the rate of
matrix products) is left out: it tells of the machine, and the ratios to it are compared. Works on speed.json,
selection.json and parts.json.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finemask_ds.errors import UserError
from finemask_ds.report.table import markdown
from finemask_ds.run import read_json
from finemask_ds.units import readable

Cells = Mapping[str, Mapping[str, Any]]

REFERENCES = {"dense", "dense-local", "naive"}
"""Methods, behind the slash of a cell's name, that others are measured by."""
REFERENCE_FIGURES = {"dense_step_sec", "kthvalue_sec", "matmul_flop_per_sec"}
"""The like in cells of ours."""


@dataclass(frozen=True)
class Change:
    """A figure that moved."""

    cell: str
    figure: str
    old: float
    new: float

    @property
    def share(self) -> float:
        """By how much of the old value; 0.1 is a tenth more."""
        if self.old == 0:
            return math.copysign(math.inf, self.new) if self.new else 0.0
        return (self.new - self.old) / abs(self.old)

    @property
    def is_worse(self) -> bool:
        """Whether it moved the wrong way."""
        return self.share * direction(self.figure) < 0


def direction(figure: str) -> int:
    """1 where more is better, -1 where less is, 0 for what is only told."""
    if figure.endswith(("_q1", "_q3")) or figure in REFERENCE_FIGURES:
        return 0
    if figure.endswith("_per_sec"):
        return 1
    return -1 if figure.endswith(("_sec", "_gib")) or figure.startswith("ratio") else 0


def compared(name: str, cell: Mapping[str, Any]) -> set[str]:
    """The figures of a cell that tell a direction."""
    if name.rpartition("/")[2] in REFERENCES:
        return set()
    return {figure for figure, value in cell.items() if direction(figure) and isinstance(value, int | float)}


def changes(old: Cells, new: Cells, tolerance: float) -> Iterator[Change]:
    """What moved beyond the tolerance and the spread, in the new file's order."""
    for name, cell in new.items():
        before = old.get(name, {})
        for figure in (key for key in cell if key in compared(name, cell) & compared(name, before)):
            change = Change(name, figure, before[figure], cell[figure])
            if abs(change.share) > tolerance and are_apart(before, cell, figure):
                yield change


def are_apart(old: Mapping[str, Any], new: Mapping[str, Any], figure: str) -> bool:
    """Whether the quartiles do not overlap; also where there are none."""
    first, third = f"{figure}_q1", f"{figure}_q3"
    if not all(key in cell for cell in (old, new) for key in (first, third)):
        return True
    return new[first] > old[third] or new[third] < old[first]


def missing(these: Cells, those: Cells) -> list[str]:
    """Cells, and figures of common cells, that these have and those have not."""
    found = []
    for name, cell in these.items():
        if name not in those:
            found.append(name)
        else:
            lacking = compared(name, cell) - compared(name, those[name])
            found += [f"{name}: {figure}" for figure in sorted(lacking)]
    return found


def machines(file: Mapping[str, Any]) -> dict[str, str]:
    """Cell's name -> the machine it was measured on, its own or the file's."""
    whole = str(file.get("made", {}).get("hardware"))
    return {name: str(cell.get("machine", whole)) for name, cell in file["cells"].items()}


def report(old: Mapping[str, Any], new: Mapping[str, Any], tolerance: float) -> tuple[str, int]:
    """The text to print, and how many figures got worse or are missing."""
    before, after = machines(old), machines(new)
    pairs = sorted({(before[name], after[name]) for name in before.keys() & after.keys()})
    lines = [f"machines differ: {one}; now {other}" for one, other in pairs if one != other]
    moved = list(changes(old["cells"], new["cells"], tolerance))
    rows = [
        [one.cell, one.figure, readable(one.old), readable(one.new), f"{100 * one.share:+.0f} %",
         "REGRESSION" if one.is_worse else "better"]
        for one in sorted(moved, key=lambda one: not one.is_worse)
    ]  # fmt: skip
    if rows:
        lines.append(markdown(["cell", "figure", "old", "new", "change", ""], rows))
    gone = missing(old["cells"], new["cells"])
    lines += [f"missing: {name}" for name in gone]
    lines += [f"new: {name}" for name in missing(new["cells"], old["cells"])]
    num_worse = sum(one.is_worse for one in moved)
    better = f"{len(moved) - num_worse} improvement(s) beyond {100 * tolerance:g} %"
    lines.append(f"{num_worse} regression(s), {better}, {len(gone)} missing")
    return "\n".join(lines), num_worse + len(gone)


def read(path: Path) -> Mapping[str, Any]:
    """A benchmark's file.

    Raises:
        UserError: where there is none, or it is something else.
    """
    try:
        value = read_json(path)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); type a file such as results/speed.json") from error
    cells = value.get("cells") if isinstance(value, dict) else None
    if not isinstance(cells, dict) or not all(isinstance(cell, dict) for cell in cells.values()):
        raise UserError(f"{path} has no cells of a benchmark; type a file such as results/speed.json")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1, help="share of the old value; default 0.1")
    arguments = parser.parse_args()
    try:
        text, num_bad = report(read(arguments.old), read(arguments.new), arguments.tolerance)
    except UserError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return error.exit_code
    print(text)
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
