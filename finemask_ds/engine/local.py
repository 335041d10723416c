"""The same surface in one process, through accelerate: for work without ranks, and the tests' plain reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finemask_ds.engine.base import Batching, Engine, Group, optimizer_for, set_learning_rates
from finemask_ds.engine.world import World


class LocalEngine(Engine):
    """One process, one device, fp32."""

    def __init__(self, module: nn.Module, groups: Sequence[Group], *, batching: Batching, max_grad_norm: float):
        self._accelerator = Accelerator(mixed_precision="no")
        self.world = World(device=self._accelerator.device)
        self.groups, self._max_grad_norm = groups, max_grad_norm
        module.to(self.world.device)
        fused = self.world.device.type == "cuda"
        self.module, self._optimizer = self._accelerator.prepare(module, optimizer_for(groups, fused=fused))
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

    def step(self, learning_rates: Mapping[str, float]) -> float:
        """See :class:`Engine`."""
        set_learning_rates(self._optimizer, learning_rates)
        limit = self._max_grad_norm or float("inf")
        norm = self._accelerator.clip_grad_norm_(self.parameters.values(), limit)
        self._optimizer.step()
        self._optimizer.zero_grad()
        assert norm is not None
        return float(norm)

    def gathered(self, parameters: Iterable[nn.Parameter]) -> Any:
        """See :class:`Engine`; everything is always whole here."""
        return contextlib.nullcontext()

    def edit(self, values: Mapping[str, Tensor]) -> None:
        """See :class:`Engine`."""
        parameters = self.parameters
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)

    def optimizer_leaves(self) -> list[Tensor]:
        """See :class:`Engine`."""
        return list(self.parameters.values())

    def optimizer_state(self) -> dict[Any, dict[str, Tensor]]:
        """See :class:`Engine`."""
        return self._optimizer.state
