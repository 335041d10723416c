"""Checkpoints: fp32 values by parameter name, each rank's moments, and where the run stood; safetensors and JSON.

A checkpoint is a folder ``step-N`` that appears by one rename when all its files are on the disk, so a kill at any
moment leaves the one before. It continues a run on the same ranks and in the same stage.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from finemask_ds.engine.base import Engine
from finemask_ds.errors import UserError
from finemask_ds.run import read_json, write_json

KEPT = 2
"""Checkpoints that stay on the disk."""


def save_checkpoint(folder: Path, engine: Engine, step: int, state: Mapping[str, Any]) -> None:
    """Write ``folder/step-N`` on all ranks together and drop older ones.

    Args:
        folder: the run's checkpoint folder, shared by the ranks.
        engine: whose trained values and moments are written.
        step: optimizer steps taken.
        state: what else the run needs to go on, as JSON values.
    """
    final, temporary = folder / f"step-{step}", folder / f".step-{step}.part"
    if engine.world.on_first(lambda: _prepare(final, temporary)):
        return
    # Each value is whole on every rank for a moment (ZeRO-3 gathers it); the first rank keeps a copy.
    values = {name: value.cpu().clone() for name, value in engine.read(engine.parameters) if engine.world.is_first}
    if engine.world.is_first:
        save_file(values, temporary / "values.safetensors")
    moments = {key: tensor.detach().cpu().contiguous() for key, tensor in engine.moments().items()}
    save_file(moments, temporary / f"moments-{engine.world.rank}.safetensors")
    engine.world.barrier()
    if engine.world.is_first:
        write_json(
            temporary / "state.json",
            {**state, "step": step, "ranks": engine.world.size, "engine": _kind(engine)},
        )
        os.replace(temporary, final)
        for old in _complete(folder)[:-KEPT]:
            shutil.rmtree(folder / f"step-{old}")
    engine.world.barrier()


def load_checkpoint(folder: Path, engine: Engine) -> dict[str, Any] | None:
    """Put the newest checkpoint's values and moments into ``engine`` and return its state, None where there is none.

    Raises:
        UserError: where it was written by another number of ranks or another engine.
    """
    steps = engine.world.on_first(lambda: _complete(folder))
    if not steps:
        return None
    newest = folder / f"step-{steps[-1]}"
    state = read_json(newest / "state.json")
    if (state["ranks"], state["engine"]) != (engine.world.size, _kind(engine)):
        raise UserError(
            f"{newest} was written by {state['ranks']} rank(s) in {state['engine']} and this is {engine.world.size} in "
            f"{_kind(engine)}; start the command as before, or type another --run"
        )
    engine.edit(load_file(newest / "values.safetensors"))
    engine.load_moments(load_file(newest / f"moments-{engine.world.rank}.safetensors"))
    return state


def newest_step(folder: Path) -> int:
    """Step of the newest whole checkpoint, 0 where there is none."""
    return max(_complete(folder), default=0)


def _prepare(final: Path, temporary: Path) -> bool:
    """True where the checkpoint is already there; otherwise make an empty folder for it."""
    shutil.rmtree(temporary, ignore_errors=True)
    if final.exists():
        return True
    temporary.mkdir(parents=True)
    return False


def _complete(folder: Path) -> list[int]:
    """Steps of the whole checkpoints, oldest first."""
    return sorted(int(path.parent.name.removeprefix("step-")) for path in folder.glob("step-*/state.json"))


def _kind(engine: Engine) -> str:
    stage = getattr(engine, "stage", None)
    return "one process" if stage is None else f"ZeRO-{stage}"
