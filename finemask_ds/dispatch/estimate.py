"""What a plan will cost: seconds of a cell from a measured step, later from the cells that are done."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from finemask_ds.config import FinetuneConfig
from finemask_ds.dispatch.plan import Plan
from finemask_ds.dispatch.survey import State, Survey, survey
from finemask_ds.errors import UserError
from finemask_ds.run import read_json, write_json

MeasureCell = Callable[[Mapping[str, Any]], float]
"""Options of a cell -> its estimated seconds, of one worker."""


def kind_of(options: Mapping[str, Any]) -> str:
    """What cells have in common that cost the same: all options but mask and seed."""
    left_out = FinetuneConfig.volatile | {"mask", "seed"}
    return json.dumps({key: value for key, value in options.items() if key not in left_out}, sort_keys=True)


def unmeasured(plan: Plan, seen: Survey) -> dict[str, Mapping[str, Any]]:
    """Kinds of cells that are left and whose cost nobody knows, with the options of one cell of each."""
    known = read_estimates(plan.root).keys() | _done_seconds(seen).keys()
    found: dict[str, Mapping[str, Any]] = {}
    for cell, _ in seen.cells(State.WAITING):
        mask = cell.options.get("mask")
        if kind_of(cell.options) not in known and (not mask or Path(mask).exists()):
            found.setdefault(kind_of(cell.options), cell.options)
    return found


def measure(root: Path, measure_cell: MeasureCell) -> None:
    """Measure a step of every kind of cell in `unmeasured` and keep the estimates in ROOT/estimate.json.

    Raises:
        UserError: where there is no plan, or a cell cannot even begin.
    """
    plan = Plan.read(root)
    for kind, options in unmeasured(plan, survey(plan, bury=False)).items():
        seconds = float(measure_cell(options))
        print(f"about {seconds:.0f} s: {kind}", flush=True)
        write_json(root / "estimate.json", {**read_estimates(root), kind: seconds})


def read_estimates(root: Path) -> dict[str, float]:
    """Kind of cell -> estimated seconds; empty where none is measured."""
    try:
        return {str(kind): float(seconds) for kind, seconds in read_json(root / "estimate.json").items()}
    except (OSError, UserError, AttributeError, TypeError, ValueError):  # an estimate is not worth an error
        return {}


def seconds_left(seen: Survey, workers: int = 1) -> float | None:
    """Seconds until so many workers have done all cells; None while nobody can know."""
    known = read_estimates(seen.plan.root) | _done_seconds(seen)
    left = []
    for cell, standing in seen.cells(State.WAITING, State.RUNNING):
        if not known:
            return None
        spent = 0.0
        if standing.state is State.RUNNING and standing.attempts:
            spent = max(0.0, time.time() - float(standing.attempts[-1].facts().get("start") or time.time()))
        left.append(max(0.0, known.get(kind_of(cell.options), fmean(known.values())) - spent))
    return max(sum(left) / workers, max(left, default=0.0))


def _done_seconds(seen: Survey) -> dict[str, float]:
    """Kind of cell -> mean seconds of those that are done."""
    measured: dict[str, list[float]] = defaultdict(list)
    for cell, standing in seen.cells(State.DONE):
        seconds = standing.result.get("seconds")
        if isinstance(seconds, int | float):
            measured[kind_of(cell.options)].append(float(seconds))
    return {kind: fmean(values) for kind, values in measured.items()}
