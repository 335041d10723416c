"""What the ranks of a pool run in the engine's tests: a small two-layer regression under any engine."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finemask_ds.engine.base import Batching, Engine, Group
from finemask_ds.engine.checkpoint import load_checkpoint, save_checkpoint
from finemask_ds.engine.local import LocalEngine
from finemask_ds.engine.loop import Span, train
from finemask_ds.engine.metrics import Recorder
from finemask_ds.engine.world import World
from finemask_ds.engine.zero import ZeroEngine
from finemask_ds.run import atomic_write, content_hash

BATCH, FEATURES = 12, 6  # A batch that one, two and three ranks divide.
SEED = 5
METRICS = ("train/loss", "train/grad_norm", "grad_norm/first", "grad_norm/second", "lr/body", "lr/head")


class Regression(nn.Module):
    """Two parameter groups, odd sizes that two ranks do not divide, one frozen parameter."""

    losses = ("loss",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.first = nn.Linear(FEATURES, 5)
        self.second = nn.Linear(5, 3)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        guess = self.second(torch.tanh(self.first(batch["x"]))) * self.frozen
        return {"loss": ((guess.float() - batch["y"]) ** 2).sum() * batch["factor"].mean()}


class Batches:
    """Position -> this rank's micro-batches of a global batch drawn by position.

    ``bad``: positions whose loss is infinite on the last rank. ``left_out``: positions that are not there, so that
    what follows moves up.
    """

    def __init__(self, world: World, micro: int, bad: Sequence[int] = (), left_out: Sequence[int] = ()):
        self.world, self.micro, self.bad, self.left_out = world, micro, bad, left_out

    def __call__(self, position: int) -> list[dict[str, Tensor]]:
        for gap in sorted(self.left_out):
            position += position >= gap
        draw = torch.Generator().manual_seed(1000 + position)
        x, y = torch.randn(BATCH, FEATURES, generator=draw), torch.randn(BATCH, 3, generator=draw)
        mine = slice(self.world.rank * BATCH // self.world.size, (self.world.rank + 1) * BATCH // self.world.size)
        is_bad = position in self.bad and self.world.rank == self.world.size - 1
        factor = torch.full((len(x),), math.inf if is_bad else 1.0)
        whole = {"x": x[mine], "y": y[mine], "factor": factor[mine], "input_ids": torch.zeros(len(x[mine]), 1)}
        parts = {key: value.split(self.micro) for key, value in whole.items()}
        return [{key: parts[key][i] for key in parts} for i in range(len(parts["x"]))]


def counts(batch: dict[str, Tensor]) -> dict[str, int]:
    return {"loss": batch["y"].numel()}


def settings_file(folder: Path, stage: int, **more: Any) -> str:
    text = json.dumps({"zero_optimization": {"stage": stage, **more.pop("zero", {})}, **more})
    path = folder / f"zero{stage}-{content_hash(text)}.json"
    with atomic_write(path) as stream:
        stream.write(text)
    return str(path)


def make(
    world: World, stage: int | None, folder: Path, *, micro: int, max_grad_norm: float = 0.5, **settings: Any
) -> Engine:
    """A fresh engine in a ZeRO stage with more settings of the DeepSpeed file, or the plain one (None)."""
    module = Regression()
    groups = [
        Group("body", {f"first.{n}": p for n, p in module.first.named_parameters()}, 1e-2, 0.1),
        Group("head", {f"second.{n}": p for n, p in module.second.named_parameters()}, 3e-2),
    ]
    batching = Batching.of(BATCH, micro, world.size)
    if stage is None:
        return LocalEngine(module, groups, batching=batching, max_grad_norm=max_grad_norm)
    file = settings_file(folder, stage, **settings)
    return ZeroEngine(module, groups, world, batching=batching, max_grad_norm=max_grad_norm, file=file, as_asked=True)


def values(engine: Engine) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in engine.read(engine.parameters)}


def run_steps(
    world: World, stage: int | None, folder: Path, *, micro: int, first: int = 1, last: int = 6,
    max_grad_norm: float = 0.5, engine: Engine | None = None, bad: Sequence[int] = (), left_out: Sequence[int] = (),
) -> tuple[dict[str, Tensor], dict[str, float], Engine]:  # fmt: skip
    engine = engine or make(world, stage, folder, micro=micro, max_grad_norm=max_grad_norm)
    recorder = Recorder([], reduce=world.sum)
    norms: dict[str, float] = {}
    train(
        engine, Regression, Batches(world, micro, bad, left_out), counts, Span(first, last, decay=10), recorder, seed=0,
        hooks=[lambda step: norms.update(recorder.flush(step))],
        watched=lambda step: {group: [f"{group}.weight", f"{group}.bias"] for group in ("first", "second")},
    )  # fmt: skip
    return values(engine), norms, engine


def trained(world: World, stage: int | None, folder: Path, micro: int, max_grad_norm: float) -> Any:
    result, metrics, _ = run_steps(world, stage, folder, micro=micro, max_grad_norm=max_grad_norm)
    return result, {key: metrics[key] for key in METRICS}


def edited(world: World, stage: int, folder: Path, micro: int) -> Any:
    """Train, rewind everything to ones, look, train one step; and a reference that starts from ones."""
    _, _, engine = run_steps(world, stage, folder, micro=micro)
    ones = {name: torch.ones_like(value) for name, value in values(engine).items()}
    engine.edit(ones.items())
    engine.reset_optimizer()
    after_edit = values(engine)
    moments = moments_of(engine)
    run_steps(world, stage, folder, micro=micro, first=1, last=3, engine=engine)
    return ones, after_edit, moments, values(engine)


def moments_of(engine: Engine) -> dict[str, float]:
    """Sum of magnitudes of every tensor that the optimizer keeps for a piece of this rank's."""
    state = engine.optimizer_state()
    return {
        f"{piece.name}.{key}": float(tensor.abs().sum() if key == "step" else piece.of(tensor).abs().sum())
        for piece in engine.pieces
        for key, tensor in state.get(piece.leaf, {}).items()
    }


def resumed(world: World, stage: int | None, folder: Path, micro: int, settings: dict[str, Any] | None = None) -> Any:
    """Six steps at once, and three plus three over a checkpoint in a fresh engine."""
    whole, _, _ = run_steps(
        world, stage, folder, micro=micro, engine=make(world, stage, folder, micro=micro, **settings or {})
    )
    first = make(world, stage, folder, micro=micro, **settings or {})
    run_steps(world, stage, folder, micro=micro, last=3, engine=first)
    save_checkpoint(folder / "checkpoints", first, 3, {"note": "x"})
    fresh = make(world, stage, folder, micro=micro, **settings or {})
    state = load_checkpoint(folder / "checkpoints", fresh)
    assert state is not None
    continued, _, _ = run_steps(world, stage, folder, micro=micro, first=state["step"] + 1, engine=fresh)
    return whole, continued, state


def saved(world: World, stage: int | None, folder: Path, micro: int, step: int) -> None:
    """Train to a step and write a checkpoint."""
    _, _, engine = run_steps(world, stage, folder, micro=micro, last=step)
    save_checkpoint(folder / "checkpoints", engine, step, {})


def moved(world: World, stage: int | None, folder: Path, micro: int, to: Path) -> dict[str, Tensor]:
    """Load a checkpoint, write it again as it is, and train to step 6."""
    engine = make(world, stage, folder, micro=micro)
    state = load_checkpoint(folder / "checkpoints", engine)
    assert state is not None
    save_checkpoint(to, engine, state["step"], {})
    return run_steps(world, stage, folder, micro=micro, first=state["step"] + 1, engine=engine)[0]


def overflowed(
    world: World, stage: int, folder: Path, settings: dict[str, Any], bad: Sequence[int], left_out: Sequence[int],
    last: int, max_grad_norm: float = 0.5,
) -> Any:  # fmt: skip
    """Train in 16 bit over bad positions: values, metrics and the loss scale's state."""
    micro = BATCH // world.size
    engine = make(world, stage, folder, micro=micro, max_grad_norm=max_grad_norm, **settings)
    result, metrics, _ = run_steps(
        world, stage, folder, micro=micro, last=last, engine=engine, bad=bad, left_out=left_out
    )
    return result, {key: metrics[key] for key in METRICS}, engine.loss_scale.state()


def overflowed_and_resumed(world: World, stage: int, folder: Path, settings: dict[str, Any]) -> Any:
    """Steps 1 to 4 with an overflow at position 2: at once, and with a checkpoint after step 2."""
    micro = BATCH // world.size
    whole, _, _ = overflowed(world, stage, folder, settings, [2], [], 4)
    engine = make(world, stage, folder, micro=micro, **settings)
    run_steps(world, stage, folder, micro=micro, last=2, engine=engine, bad=[2])
    save_checkpoint(folder / "checkpoints", engine, 2, {})
    fresh = make(world, stage, folder, micro=micro, **settings)
    state = load_checkpoint(folder / "checkpoints", fresh)
    assert state is not None
    scale = fresh.loss_scale.state()
    continued, _, _ = run_steps(world, stage, folder, micro=micro, first=3, last=4, engine=fresh)
    return whole, continued, scale, state["data_position"]
