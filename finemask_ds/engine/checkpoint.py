"""Checkpoints: fp32 values and moments by full parameter name, and where the run stood; safetensors and JSON.

A checkpoint is a folder ``step-N`` that appears by one rename when all its files are on the disk, so a kill at any
moment leaves the one before. Each rank writes the pieces that it updates, nothing is gathered:

    shard-R.safetensors  ``values/NAME``, ``exp_avg/NAME``, ``exp_avg_sq/NAME``: fp32, flat; the header says at which
                         flat index of the parameter they start, of what shape it is, and its AdamW step count
    state.json           step, loss scale, what else the run needs to go on, and hashes of the shards and of itself

On loading every rank reads the ranges that it updates now, so another number of ranks, another ZeRO stage and another
micro-batch go on with the same numbers. On the same ranks and stage a resumed run is bit for bit the one that was
never stopped, in fp32 on a CPU. On a GPU the state is restored bit for bit too, but kernels that add in no fixed order
(the embedding's gradient, NCCL across another topology) may differ in the last bits from run to run, stopped or not.

Nothing of a random generator is kept: every draw is a function of (seed, position in the data, rank), and the position
is the step plus the steps skipped so far.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finemask_ds.engine.base import Engine
from finemask_ds.engine.damage import complete_steps, drop_damaged, sealed, shard_name
from finemask_ds.errors import UserError
from finemask_ds.run import content_hash, disk_full_is_user_error, read_json, write_json

FORMAT_VERSION = 2
KEPT = 2
"""Checkpoints that stay on the disk."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(folder: Path, engine: Engine, step: int, state: Mapping[str, Any]) -> None:
    """Write ``folder/step-N`` on all ranks together and drop older ones.

    Args:
        folder: the run's checkpoint folder, shared by the ranks.
        engine: whose trained values and moments are written.
        step: optimizer steps taken.
        state: what else the run needs to go on, as JSON values.

    Raises:
        UserError: on all ranks where a disk is full; earlier checkpoints stay as they are.
    """
    world, final, temporary = engine.world, folder / f"step-{step}", folder / f".step-{step}.part"
    if world.on_first(lambda: _prepare(final, temporary)):
        return
    num_shards = world.size if engine.is_sharded else 1
    told = {
        **state, "format_version": FORMAT_VERSION, "step": step, "shards": num_shards, "engine": engine.describe(),
        "data_position": step + engine.loss_scale.skipped, "loss_scale": engine.loss_scale.state(),
    }  # fmt: skip
    try:
        written = world.together(
            lambda: _write_shard(temporary / shard_name(world.rank), engine) if world.rank < num_shards else ""
        )
        told["shard_hashes"] = world.gather(written)[:num_shards]
        world.on_first(lambda: _finish(temporary, final, told))
    except UserError:
        world.on_first(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise


def load_checkpoint(folder: Path, engine: Engine) -> dict[str, Any] | None:
    """Put the newest whole checkpoint's values and moments into ``engine``; its state, None where there is none.

    Raises:
        UserError: where it is of another model or another version of finemask, or none is whole.
    """
    newest = drop_damaged(folder, engine.world)
    if newest is None:
        return None
    state = read_json(newest / "state.json")
    with Shards(newest, state) as shards:
        shards.check(engine.shapes)
        engine.edit((name, shards.whole("values", name)) for name in engine.parameters)
        _load_moments(engine, shards)
    engine.loss_scale.load(state["loss_scale"])
    engine.check_precision()
    return state


class Shards:
    """A checkpoint's tensors by full parameter name, whichever ranks wrote them; ranges are read as they are asked for.

    Raises:
        UserError: where a shard is missing or damaged, or of another version.
    """

    def __init__(self, folder: Path, state: Mapping[str, Any]):
        self.folder = folder
        if state.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{folder} is a checkpoint of another version of finemask; delete {folder.parent} to start over"
            )
        self._files = []
        self._at: dict[str, list[tuple[int, int, Any]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.adam_steps: dict[str, int] = {}
        """AdamW's step count of each parameter that has moments."""
        for rank in range(state["shards"]):
            path = folder / shard_name(rank)
            try:
                file = safe_open(path, "pt")
                about = json.loads(file.metadata()["pieces"])
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{path} is missing or damaged ({error}); delete {folder} to go on from the one before"
                ) from error
            self._files.append(file)
            for name, piece in about.items():
                self._at.setdefault(name, []).append((piece["start"], piece["stop"], file))
                self.shapes[name] = tuple(piece["shape"])
                self.adam_steps |= {name: piece["adam_step"]} if piece["adam_step"] else {}

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.clear()
        self._at.clear()

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a checkpoint of other parameters.

        Raises:
            UserError: naming the first parameter that differs.
        """
        for name in [*shapes, *self.shapes]:
            if shapes.get(name) != self.shapes.get(name):
                raise UserError(
                    f"{self.folder} has {name} as {self.shapes.get(name)} where this run has {shapes.get(name)}; "
                    "start the command as before, or type another --run"
                )

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """The flat elements [start, stop) of a parameter's ``values``, ``exp_avg`` or ``exp_avg_sq``; fp32."""
        parts, reached = [], start
        for first, last, file in sorted(self._at[name], key=lambda piece: piece[:2]):
            low, high = max(reached, first), min(stop, last)
            if low < high and low == reached:
                parts.append(file.get_slice(f"{kind}/{name}")[low - first : high - first])
                reached = high
        if reached < stop:
            raise UserError(
                f"{self.folder} lacks {name} from element {reached}; delete it to go on from the one before"
            )
        return torch.cat(parts) if parts else torch.empty(0)

    def whole(self, kind: str, name: str) -> Tensor:
        """All of a parameter, in its shape."""
        shape = self.shapes[name]
        return self.read(kind, name, 0, math.prod(shape)).view(shape)


def _write_shard(path: Path, engine: Engine) -> str:
    """Write what this rank updates; the file's hash."""
    state, tensors, about = engine.optimizer_state(), {}, {}
    for piece in engine.pieces:
        if piece.start == piece.stop:
            continue
        kept = state.get(piece.leaf, {})
        parts = {"values": piece.leaf, **{kind: kept[kind] for kind in MOMENTS if kind in kept}}
        for kind, tensor in parts.items():
            # A copy, as safetensors refuses tensors that share memory.
            tensors[f"{kind}/{piece.name}"] = piece.of(tensor).cpu().clone()
        about[piece.name] = {
            "start": piece.start, "stop": piece.stop, "shape": engine.shapes[piece.name],
            "adam_step": int(kept["step"]) if "step" in kept else 0,
        }  # fmt: skip
    with disk_full_is_user_error(path):
        save_file(tensors, path, metadata={"pieces": json.dumps(about)})
        with open(path, "rb+") as stream:
            os.fsync(stream.fileno())
    return content_hash(path)


def _load_moments(engine: Engine, shards: Shards) -> None:
    """Put back the moments of what this rank updates; a parameter that had none gets zeros."""
    state = engine.optimizer_state()
    with torch.no_grad():
        for piece in engine.pieces:
            adam_step = shards.adam_steps.get(piece.name)
            if adam_step is None:
                continue
            kept = state.setdefault(piece.leaf, {})
            for kind in MOMENTS:
                moment = kept.setdefault(kind, torch.zeros_like(piece.leaf))
                piece.of(moment).copy_(shards.read(kind, piece.name, piece.start, piece.stop))
            kept.setdefault("step", engine.new_adam_step(piece.leaf)).fill_(adam_step)


def _prepare(final: Path, temporary: Path) -> bool:
    """True where the checkpoint is already there; otherwise make an empty folder for it."""
    shutil.rmtree(temporary, ignore_errors=True)
    if (final / "state.json").exists():
        return True
    shutil.rmtree(final, ignore_errors=True)  # What somebody has left of a damaged one.
    with disk_full_is_user_error(temporary):
        temporary.mkdir(parents=True)
    return False


def _finish(temporary: Path, final: Path, told: Mapping[str, Any]) -> None:
    """Make the checkpoint appear, then drop the oldest."""
    write_json(temporary / "state.json", sealed(told))
    os.replace(temporary, final)
    for old in complete_steps(final.parent)[:-KEPT]:
        shutil.rmtree(final.parent / f"step-{old}", ignore_errors=True)  # A file that is open on NFS stays a while.
