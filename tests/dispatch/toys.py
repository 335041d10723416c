"""Masks, cells and processes for the tests of dispatch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finemask_ds.dispatch.plan import Cell, Plan
from finemask_ds.masks.files import save_mask
from finemask_ds.masks.mask import Mask
from tests.conftest import REPOSITORY

HERE = Path(__file__).parent
WAIT_SEC = 60.0


def write_mask(path: Path, method: str | None = "tamt-kd", seed: int = 1, **provenance: Any) -> Path:
    """A mask file whose bits follow from the seed alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told = provenance if method is None else {"method": method, **provenance}
    save_mask(path, Mask.random({"m": (8, 8)}, 0.5, seed).with_provenance(told))
    return path


def cell(name: str, **options: Any) -> Cell:
    """A cell that does as `fake_worker` understands."""
    return Cell(name, {"task": "mrpc", "seed": 1, **options})


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of a script beside this file."""
    return subprocess.Popen(
        [sys.executable, str(HERE / script), *map(str, arguments)], cwd=REPOSITORY, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip


def dispatch(plan: Plan, slots: int = 2) -> str:
    """Dispatch in a process of its own until it ends well; its output."""
    process = python("fake_dispatch.py", plan.root, slots)
    output, errors = process.communicate(timeout=WAIT_SEC)
    assert process.returncode == 0, errors
    assert errors == ""
    return output


def until(condition: Callable[[], Any]) -> Any:
    """Wait for something, not for ever."""
    deadline = time.monotonic() + WAIT_SEC
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


def diary(plan: Plan, name: str) -> list[list[str]]:
    """What the fake cell noted: ["start" or "end", attempt's number, nanoseconds], in order."""
    path = plan.root / "cells" / name / "diary"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def starts(plan: Plan, name: str) -> list[str]:
    """Numbers of the attempts that have started."""
    return [number for word, number, _ in diary(plan, name) if word == "start"]


def result(plan: Plan, name: str) -> Mapping[str, Any]:
    """The cell's result."""
    return json.loads((plan.root / "cells" / name / "result.json").read_text())


def failure(plan: Plan, name: str, attempt: int) -> Mapping[str, Any]:
    """Why an attempt failed."""
    return json.loads((plan.root / "cells" / name / f"attempt-{attempt}" / "failed.json").read_text())


def workers_of(plan: Plan) -> list[int]:
    """Processes of this machine that have the plan's folder on their command line, fake dispatchers left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(plan.root).encode() in words and not any(word.endswith(b"fake_dispatch.py") for word in words):
            found.append(int(path.parent.name))
    return found
