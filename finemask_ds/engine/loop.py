"""The only training loop. What happens now and then is a hook; when is told apart from what."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from finemask_ds.engine.base import Engine, Update
from finemask_ds.engine.metrics import Recorder
from finemask_ds.engine.world import World
from finemask_ds.errors import UserError

Batch = Mapping[str, Tensor]
Hook = Callable[[int], None]
"""Called with the number of the step just taken."""

_ASKED = "asked to end"
"""How many ranks were; summed with the step's counts, so that all ranks know it after the same step, at no cost."""
_STOPPED = "; the weights of the step before are kept; type a lower learning rate"


class Task(Protocol):
    """What the loop needs to know of an objective."""

    @property
    def losses(self) -> Sequence[str]:
        """Names of the sums that add up to the loss."""


@dataclass(frozen=True)
class Span:
    """Steps ``first`` to ``last`` (1-based, both taken) of a schedule that began after step ``origin``."""

    first: int
    last: int
    decay: int
    origin: int = 0
    warmup: int = 0

    def factor(self, step: int) -> float:
        """Share of the peak rate at ``step``: linear rise over ``warmup`` steps, linear fall to 0 after ``decay``."""
        done = step - self.origin - 1
        if done < self.warmup:
            return (done + 1) / (self.warmup + 1)
        return max(0.0, (self.decay - done) / (self.decay - self.warmup))


def is_due(interval: int, step: int, *, last: int | None = None) -> bool:
    """Whether ``step`` is a multiple of ``interval`` (0: none is) or the last one."""
    return step == last or (interval > 0 and step % interval == 0)


def every(interval: int, hook: Hook, *, last: int | None = None) -> Hook:
    """Run ``hook`` at each multiple of ``interval`` (0: never) and at step ``last``."""

    def run(step: int) -> None:
        if is_due(interval, step, last=last):
            hook(step)

    return run


def train(
    engine: Engine,
    task: Task,
    batches: Callable[[int], Sequence[Batch]],
    counts: Callable[[Batch], Mapping[str, int]],
    span: Span,
    recorder: Recorder,
    *,
    seed: int,
    after_step: Sequence[Hook] = (),
    hooks: Sequence[Hook] = (),
    watched: Callable[[int], Mapping[str, Sequence[str]]] = lambda step: {},
    before_stop: Hook = lambda step: None,
    terminated: Hook = lambda step: None,
) -> None:
    """Take the steps of ``span``.

    A step whose fp16 gradients overflow on any rank is skipped by all and taken again with the next batch: steps, and
    with them the schedule, count updates; the position in the data and the draws count batches.

    Args:
        engine: holds the module, whose forward gives the sums that ``task.losses`` names, and the optimizer.
        task: which sums are the loss.
        batches: position -> this rank's micro-batches.
        counts: micro-batch -> how many items each sum is over.
        span: which steps, and the learning rates' schedule.
        recorder: takes the metrics.
        seed: of the dropout draws, which depend on (seed, position, rank) and the shapes of the micro-batches alone.
        after_step: called in order after the optimizer's part of each step, and of the step as its time is taken.
        hooks: called in order after each step.
        watched: step -> label -> names of parameters whose gradient norm is recorded.
        before_stop: called with the last good step when the loss or a gradient is not finite.
        terminated: called, on all ranks, after the step in which some rank was asked to end.

    Raises:
        UserError: on all ranks, before weights change: a loss or gradient is not finite (fp16: 50 times in a row).
    """
    engine.module.train()
    clock, step = time.perf_counter(), span.first
    while step <= span.last:
        position = step + engine.loss_scale.skipped
        torch.manual_seed(_draw_seed(seed, position, engine.world.rank))
        micro_batches = batches(position)
        loss, metrics, is_last = _accumulate(engine, task, micro_batches, counts)
        _stop_unless_finite(engine, "the loss", loss, step, before_stop)
        rates = {group.name: group.peak_lr * span.factor(step) for group in engine.groups}
        update = engine.step(rates, watched(step))
        if not update.applied:
            _stop_unless_finite(engine, "the gradients' norm", update.norm, step, before_stop)
            continue
        for hook in after_step:
            hook(step)
        _record_speed(recorder, engine, micro_batches, time.perf_counter() - clock)
        _record_step(recorder, engine, metrics, update, rates)
        for hook in hooks:
            hook(step)
        if is_last:
            terminated(step)
        clock, step = time.perf_counter(), step + 1


def _stop_unless_finite(engine: Engine, what: str, value: float, step: int, before_stop: Hook) -> None:
    """End the training at its last good state; not where there is a loss scale, which falls and is tried again."""
    if not math.isfinite(value) and not engine.loss_scale.is_on:
        before_stop(step - 1)
        raise UserError(f"{what} is {value} at step {step}{_STOPPED}")


def _accumulate(
    engine: Engine, task: Task, micro_batches: Sequence[Batch], counts: Callable[[Batch], Mapping[str, int]]
) -> tuple[float, dict[str, Tensor], bool]:
    """Forward and backward of a step's micro-batches.

    Returns:
        The loss over all ranks, metrics to record if the step counts, and whether some rank was asked to end after it.
    """
    counted = [*map(counts, micro_batches), {_ASKED: int(engine.world.termination.asked)}]
    totals = _total_counts(engine, counted)
    step_loss = torch.zeros((), dtype=torch.float64, device=engine.world.device)
    metrics: dict[str, Tensor] = {}
    for batch in micro_batches:
        sums = {name: value / max(totals[name], 1) for name, value in engine.forward(batch).items()}
        loss = torch.stack([sums[name] for name in task.losses]).sum()
        engine.backward(loss)
        step_loss += loss.detach()
        metrics = {name: value.detach() + metrics.get(name, 0) for name, value in sums.items()}
    # A rank's share of the step's means, so many times that the recorder's mean over ranks is their sum.
    metrics = {f"train/{name}": share * engine.world.size for name, share in metrics.items()}
    return engine.world.sum(step_loss).item(), metrics, totals[_ASKED] > 0


def _record_speed(recorder: Recorder, engine: Engine, micro_batches: Sequence[Batch], seconds: float) -> None:
    recorder.record("speed/step_sec", seconds)
    num_tokens = sum(batch["input_ids"].numel() for batch in micro_batches) * engine.world.size
    recorder.record("speed/tokens_per_sec", num_tokens / seconds, weight=seconds)  # all tokens by all seconds


def _record_step(
    recorder: Recorder,
    engine: Engine,
    metrics: Mapping[str, Tensor],
    update: Update,
    rates: Mapping[str, float],
) -> None:
    """The losses, the norms, the learning rates and, where there is one, the loss scale of a step that was taken."""
    for name, value in metrics.items():
        recorder.record(name, value)
    recorder.record_last("train/grad_norm", update.norm)
    for label, norm in update.norms.items():
        recorder.record_last(f"grad_norm/{label}", norm)
    for name, rate in rates.items():
        recorder.record_last(f"lr/{name}", rate)
    if engine.loss_scale.is_on:
        recorder.record_last("scale/loss_scale", engine.loss_scale.scale)
        recorder.record_last("scale/skipped_steps", engine.loss_scale.skipped)


@torch.no_grad()
def evaluate(
    forward: Callable[[Batch], Mapping[str, Tensor]],
    world: World,
    batches: Sequence[Batch],
    counts: Callable[[Batch], Mapping[str, int]],
) -> dict[str, float]:
    """Mean of each sum that ``forward`` gives over ``batches``, which every rank holds whole and takes in turns.

    A rank that has run out computes a batch again and counts it zero times, because in ZeRO-3 every forward is a
    collective of all ranks. Sums are fp64. A sum over nothing, as where no token happens to be masked, has no mean.
    """
    sums: dict[str, Tensor] = {}
    totals: dict[str, float] = {}
    for start in range(0, len(batches), world.size):
        index = start + world.rank
        weight = float(index < len(batches))
        batch = batches[min(index, len(batches) - 1)]
        counted = counts(batch)
        for name, value in forward(batch).items():
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + weight * value.double().cpu()
            totals[name] = totals.get(name, 0.0) + weight * counted[name]
    names = sorted(sums)
    table = torch.tensor(
        [[float(sums[name]), totals[name]] for name in names], dtype=torch.float64, device=world.device
    )
    sums_of = zip(names, world.sum(table).tolist(), strict=True)
    return {name: total / count for name, (total, count) in sums_of if count}


def _total_counts(engine: Engine, counted: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Counts summed over what is given, such as the step's micro-batches, and over all ranks."""
    names = sorted({name for one in counted for name in one})
    local = torch.tensor([sum(one.get(name, 0) for one in counted) for name in names], device=engine.world.device)
    return dict(zip(names, engine.world.sum(local).tolist(), strict=True))


def _draw_seed(seed: int, position: int, rank: int) -> int:
    """A seed for torch from what the draw is for; mixed so that neighbours are unrelated."""
    mixed = (seed * 0x9E3779B97F4A7C15 + position * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**64
    mixed ^= mixed >> 31
    return mixed % 2**63
