"""The same surface in one process, through accelerate: for work without ranks, and the tests' plain reference."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
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
    whole_pieces,
)
from finemask_ds.engine.scaling import LossScale
from finemask_ds.engine.world import World


class LocalEngine(Engine):
    """One process, one device, fp32."""

    def __init__(self, module: nn.Module, groups: Sequence[Group], *, batching: Batching, max_grad_norm: float):
        self._accelerator = Accelerator(mixed_precision="no")
        self.world = World(device=self._accelerator.device)
        self.groups, self.shapes, self.loss_scale = groups, shapes_of(groups), LossScale.off()
        self._max_grad_norm = max_grad_norm
        module.to(self.world.device)
        optimizer = optimizer_for(groups, fused=self.world.device.type == "cuda")
        self._norms = GradientNorms(self, optimizer)
        self.module, self._optimizer = self._accelerator.prepare(module, optimizer)
        self.check_precision()

    def describe(self) -> str:
        """See :class:`Engine`."""
        return "one plain process, compute in fp32"

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`Engine`."""
        return self.module({key: tensor.to(self.world.device) for key, tensor in batch.items()})

    def backward(self, loss: Tensor) -> None:
        """See :class:`Engine`."""
        self._accelerator.backward(loss)

    def step(self, learning_rates: Mapping[str, float], watched: Mapping[str, Sequence[str]] | None = None) -> Update:
        """See :class:`Engine`."""
        set_learning_rates(self._optimizer, learning_rates)
        self._norms.watch(watched or {})
        clipped_to = self._max_grad_norm or float("inf")
        total = self._accelerator.clip_grad_norm_(self.parameters.values(), clipped_to)
        assert total is not None
        norm = float(total)
        if math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad()
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
