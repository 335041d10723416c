"""What benchmark files share: cells that tell what they were measured with, medians with their spread, timed calls."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from finemask_ds.models.load import quiet_transformers
from finemask_ds.provenance import collect
from finemask_ds.recipes.stages import REPOSITORY
from finemask_ds.run import content_hash, read_json, write_json
from finemask_ds.units import duration

sys.path.insert(0, str(REPOSITORY))
from tests.toys import write_bert_base, write_text


class Cells:
    """The cells of a JSON file, written after each; one that the same code and machine measured is not measured again.

    The file is {"made": provenance of the last command, "cells": {name: figures}}; each cell has its own "commit" (the
    last before it), "code" (a hash of what was measured, committed or not) and "machine".
    """

    def __init__(self, path: Path):
        self.path, self.made = path, collect()
        self.cells: dict[str, dict[str, Any]] = read_json(path)["cells"] if path.exists() else {}
        self.origin = {"commit": self.made["code"]["commit"], "code": code_hash(), "machine": machine(self.made)}

    def are_kept(self, names: Iterable[str], **wanted: Any) -> bool:
        """Whether all of these were measured by this code on this machine, with these figures among theirs."""
        asked = {"code": self.origin["code"], "machine": self.origin["machine"], **wanted}
        found = [self.cells.get(name, {}) for name in names]
        return all({key: cell.get(key) for key in asked} == asked for cell in found)

    def keep(self, cells: Mapping[str, Mapping[str, Any]]) -> None:
        """Write these cells into the file, in place of older ones."""
        self.cells |= {name: {**figures, **self.origin} for name, figures in cells.items()}
        write_json(self.path, {"made": self.made, "cells": self.cells})


def code_hash() -> str:
    """Of the package, the DeepSpeed files, and those benchmarks and tests that this process has imported."""
    files = {*(REPOSITORY / "finemask_ds").rglob("*.py"), *(REPOSITORY / "configs/ds").glob("*.json")}
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or "/")
        if {REPOSITORY / "benchmarks", REPOSITORY / "tests"} & set(path.resolve().parents):
            files.add(path.resolve())
    return content_hash(*(part for path in sorted(files) for part in (str(path.relative_to(REPOSITORY)), path)))


def machine(made: Mapping[str, Any]) -> str:
    """The hardware of a provenance in a line."""
    found = made["hardware"]
    return ", ".join([f"{found['cores']} cores of {found['cpu']}", f"{found['memory_gib']} GiB", *found["gpus"]])


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles: NAME, NAME_q1, NAME_q3."""
    first, median, third = (float(value) for value in numpy.quantile(values, (0.25, 0.5, 0.75)))
    return {name: median, f"{name}_q1": first, f"{name}_q3": third}


def seconds_of(action: Callable[[], object], device: torch.device | None = None) -> float:
    """Wall time of one call; on an accelerator until it is done there."""
    synchronize(device)
    started = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device | None) -> None:
    """Wait for an accelerator."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def bert_base_shapes() -> dict[str, tuple[int, int]]:
    """The 73 matrices that are pruned in BERT-base, by short names: 108 million weights."""
    shapes = {"embedding": (30_522, 768)}
    for layer in range(12):
        shapes |= {f"{layer}.{role}": (768, 768) for role in ("q", "k", "v", "ao")}
        shapes |= {f"{layer}.fi": (3072, 768), f"{layer}.fo": (768, 3072)}
    return shapes


def bert_base_files(folder: Path) -> tuple[str, str]:
    """A model of BERT-base's shapes with random weights, and text in its few words; their folders."""
    model, text = folder / "bert-base", folder / "text"
    if not model.exists():
        quiet_transformers()
        write_bert_base(model)
        write_text(text, lines=20_000)
    return str(model), str(text)


class Eta:
    """How long the rest of a number of equal parts will take."""

    def __init__(self, parts: int):
        self.parts, self.started = parts, time.monotonic()

    def after(self, done: int) -> str:
        """``3/20, 1 min 10 s left``."""
        left = (time.monotonic() - self.started) / done * (self.parts - done)
        return f"{done}/{self.parts}, {duration(left)} left"


def figure(cell: Mapping[str, Any], name: str, form: str = ".3f", unit: float = 1.0) -> str:
    """A figure as text in another unit, with its quartiles where it has them; "-" where there is none."""
    if cell.get(name) is None:
        return "-"
    text = f"{cell[name] / unit:{form}}"
    if f"{name}_q1" not in cell:
        return text
    return f"{text} ({cell[f'{name}_q1'] / unit:{form}}-{cell[f'{name}_q3'] / unit:{form}})"
