"""The same surface through accelerate: one process, the tests' plain reference, or the ranks it has started."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import GradScalerKwargs
from torch import Tensor, nn

from finemask_ds.engine.base import (
    Batching,
    Engine,
    GradientNorms,
    Group,
    Piece,
    Update,
    optimizer_for,
    set_learning_rates,
    shapes_of,
    to_device,
    whole_pieces,
)
from finemask_ds.engine.launched import choose_interface
from finemask_ds.engine.memory import keep_freed_memory
from finemask_ds.engine.scaling import LossScale
from finemask_ds.engine.world import World, this_process


@contextlib.contextmanager
def accelerated() -> Iterator[World]:
    """Join the ranks that ``accelerate launch`` or torchrun started, one for each GPU; without them, this process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield this_process()
        return
    choose_interface(os.environ)
    state = PartialState(cpu=not torch.cuda.is_available())
    try:
        yield World(rank=state.process_index, size=state.num_processes, device=state.device)
    finally:
        state.destroy_process_group()


class LocalEngine(Engine):
    """Weights in fp32, whole on every rank; products in fp32 or, under autocast, in 16 bit."""

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[Group],
        *,
        batching: Batching,
        max_grad_norm: float,
        world: World | None = None,
        mixed_precision: str = "no",
    ):
        self._accelerator = _accelerator(mixed_precision)
        self.world = world or World(device=self._accelerator.device)
        self.groups, self.shapes = groups, shapes_of(groups)
        self.loss_scale = LossScale() if mixed_precision == "fp16" else LossScale.off()
        self._mixed_precision, self._max_grad_norm = mixed_precision, max_grad_norm
        self.before_clipping: list[Callable[[], None]] = []
        """What is done to the gradients of a step, summed over micro-batches and ranks, before their norm is taken."""
        keep_freed_memory(self.world.device)
        module.to(self.world.device)
        optimizer = optimizer_for(groups)
        self._norms = GradientNorms(self, optimizer)
        self.module, self._optimizer = self._accelerator.prepare(module, optimizer)
        self.check_precision()

    def describe(self) -> str:
        """See :class:`Engine`."""
        ranks = "one plain process" if self.world.size == 1 else f"{self.world.size} plain processes"
        compute = "fp32" if self._mixed_precision == "no" else f"{self._mixed_precision}, weights in fp32"
        return f"{ranks}, compute in {compute}"

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`Engine`."""
        return self.module(to_device(batch, self.world.device))

    def backward(self, loss: Tensor) -> None:
        """See :class:`Engine`."""
        # Ranks' gradients are averaged, where the engine's are summed.
        self._accelerator.backward(loss * (self.world.size * self.loss_scale.scale))

    def step(self, learning_rates: Mapping[str, float], watched: Mapping[str, Sequence[str]] | None = None) -> Update:
        """See :class:`Engine`."""
        set_learning_rates(self._optimizer, learning_rates)
        self._norms.watch(watched or {})
        if self.loss_scale.is_on:
            for gradient in [value.grad for value in self.parameters.values() if value.grad is not None]:
                gradient.div_(self.loss_scale.scale)
        for change in self.before_clipping:
            change()
        clipped_to = self._max_grad_norm or float("inf")
        total = self._accelerator.clip_grad_norm_(self.parameters.values(), clipped_to)
        assert total is not None
        norm = float(total)
        if math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad()
        if self.loss_scale.is_on:
            self.loss_scale.update(overflow=not math.isfinite(norm))
        return Update(norm, self._norms.norms(norm, self._max_grad_norm))

    def gathered(self, parameters: Iterable[nn.Parameter]) -> Any:
        """See :class:`Engine`; everything is always whole here."""
        return contextlib.nullcontext()

    def edit(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """See :class:`Engine`."""
        parameters = self.parameters
        with torch.no_grad():
            for name, value in values:
                parameters[name].copy_(value)

    def find_pieces(self) -> list[Piece]:
        """See :class:`Engine`; each parameter is its own leaf."""
        return whole_pieces(self.parameters)

    def optimizer_state(self) -> dict[Any, dict[str, Tensor]]:
        """See :class:`Engine`."""
        return self._optimizer.state


def _accelerator(mixed_precision: str) -> Accelerator:
    """Accelerate's devices, autocast and averaging of gradients; the loss scale is our own (see engine/scaling.py)."""
    # What the first engine of a process asked for would hold for all that follow.
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision=mixed_precision, kwargs_handlers=[GradScalerKwargs(enabled=False)])
