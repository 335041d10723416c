"""What the ranks of a pool run in the engine's tests: a small two-layer regression under any engine."""

from __future__ import annotations

import json
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

BATCH, FEATURES = 8, 6
SEED = 5


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
        return {"loss": ((guess - batch["y"]) ** 2).sum()}


class Batches:
    """Step -> this rank's micro-batches of a global batch drawn by step."""

    def __init__(self, world: World, micro: int):
        self.world, self.micro = world, micro

    def __call__(self, step: int) -> list[dict[str, Tensor]]:
        draw = torch.Generator().manual_seed(1000 + step)
        x, y = torch.randn(BATCH, FEATURES, generator=draw), torch.randn(BATCH, 3, generator=draw)
        mine = slice(self.world.rank * BATCH // self.world.size, (self.world.rank + 1) * BATCH // self.world.size)
        whole = {"x": x[mine], "y": y[mine], "input_ids": torch.zeros(len(x[mine]), 1)}
        parts = {key: value.split(self.micro) for key, value in whole.items()}
        return [{key: parts[key][i] for key in parts} for i in range(len(parts["x"]))]


def counts(batch: dict[str, Tensor]) -> dict[str, int]:
    return {"loss": batch["y"].numel()}


def settings_file(folder: Path, stage: int, **more: Any) -> str:
    path = folder / f"zero{stage}.json"
    if not path.exists():
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}, **more}))
    return str(path)


def make(world: World, stage: int | None, folder: Path, *, micro: int, max_grad_norm: float) -> Engine:
    module = Regression()
    groups = [
        Group("body", {f"first.{n}": p for n, p in module.first.named_parameters()}, 1e-2, 0.1),
        Group("head", {f"second.{n}": p for n, p in module.second.named_parameters()}, 3e-2),
    ]
    batching = Batching.of(BATCH, micro, world.size)
    if stage is None:
        return LocalEngine(module, groups, batching=batching, max_grad_norm=max_grad_norm)
    file = settings_file(folder, stage)
    return ZeroEngine(module, groups, world, batching=batching, max_grad_norm=max_grad_norm, file=file)


def values(engine: Engine) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in engine.read(engine.parameters)}


def run_steps(
    world: World, stage: int | None, folder: Path, *, micro: int, first: int = 1, last: int = 6,
    max_grad_norm: float = 0.5, engine: Engine | None = None,
) -> tuple[dict[str, Tensor], dict[str, float], Engine]:  # fmt: skip
    engine = engine or make(world, stage, folder, micro=micro, max_grad_norm=max_grad_norm)
    recorder = Recorder([], reduce=world.sum)
    norms: dict[str, float] = {}
    train(
        engine, engine_task(engine), Batches(world, micro), counts, Span(first, last, decay=10), recorder, seed=0,
        hooks=[lambda step: norms.update(recorder.flush(step))],
    )  # fmt: skip
    return values(engine), norms, engine


def engine_task(engine: Engine) -> Any:
    return Regression


def trained(world: World, stage: int | None, folder: Path, micro: int, max_grad_norm: float) -> Any:
    result, metrics, _ = run_steps(world, stage, folder, micro=micro, max_grad_norm=max_grad_norm)
    return result, {key: metrics[key] for key in ("train/loss", "train/grad_norm", "lr/body", "lr/head")}


def edited(world: World, stage: int, folder: Path, micro: int) -> Any:
    """Train, rewind everything to ones, look, train one step; and a reference that starts from ones."""
    _, _, engine = run_steps(world, stage, folder, micro=micro)
    ones = {name: torch.ones_like(value) for name, value in values(engine).items()}
    engine.edit(ones)
    engine.reset_optimizer()
    after_edit = values(engine)
    moments = {key: float(value.abs().sum()) for key, value in engine.moments().items()}
    run_steps(world, stage, folder, micro=micro, first=1, last=3, engine=engine)
    return ones, after_edit, moments, values(engine)


def resumed(world: World, stage: int | None, folder: Path, micro: int) -> Any:
    """Six steps at once, and three plus three over a checkpoint in a fresh engine."""
    whole, _, _ = run_steps(world, stage, folder, micro=micro)
    _, _, engine = run_steps(world, stage, folder, micro=micro, last=3)
    save_checkpoint(folder / "checkpoints", engine, 3, {"note": "x"})
    fresh = make(world, stage, folder, micro=micro, max_grad_norm=0.5)
    state = load_checkpoint(folder / "checkpoints", fresh)
    assert state is not None
    continued, _, _ = run_steps(world, stage, folder, micro=micro, first=state["step"] + 1, engine=fresh)
    return whole, continued, state
