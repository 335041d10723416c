"""The surface that both engines have: forward, backward, step, edit parameters, state in and out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finemask_ds.engine.world import World
from finemask_ds.errors import UserError


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate."""

    name: str
    """Short name for logs, e.g. ``mask``."""
    parameters: Mapping[str, nn.Parameter]
    peak_lr: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Batching:
    """How an optimizer step's sequences are cut up."""

    micro_batch_size: int
    """Sequences per forward on one rank."""
    num_micro_batches: int
    """Forwards per optimizer step on one rank."""

    @classmethod
    def of(cls, batch_size: int, micro_batch_size: int, world_size: int) -> Batching:
        """Cut ``batch_size`` sequences over ranks and micro-batches.

        Raises:
            UserError: where the numbers do not divide.
        """
        per_rank, rest = divmod(batch_size, world_size)
        micro = micro_batch_size or per_rank
        if rest or per_rank == 0 or per_rank % micro:
            raise UserError(
                f"--batch_size {batch_size} is not ranks x micro-batch x accumulation, {world_size} x {micro or 1} x n;"
                f" type a multiple of {world_size * max(micro, 1)}"
            )
        return cls(micro, per_rank // micro)

    def describe(self, world_size: int) -> str:
        """The arithmetic of a step, for the log."""
        total = world_size * self.num_micro_batches * self.micro_batch_size
        return (
            f"{world_size} rank(s) x {self.num_micro_batches} micro-batch(es) x {self.micro_batch_size} sequence(s) = "
            f"{total} per step"
        )


class Engine(ABC):
    """Trains a module whose forward maps a batch to named sums; knows nothing of pruning."""

    module: nn.Module
    world: World
    groups: Sequence[Group]

    @abstractmethod
    def describe(self) -> str:
        """Which engine this is and what it computes in, for the log."""

    @abstractmethod
    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the module on one micro-batch of this rank."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add this rank's part of the step's loss: gradients are summed over micro-batches and ranks, not averaged."""

    @abstractmethod
    def step(self, learning_rates: Mapping[str, float]) -> float:
        """Clip, update with one rate per group name, clear the gradients; return their global norm before clipping."""

    @abstractmethod
    def gathered(self, parameters: Iterable[nn.Parameter]) -> Any:
        """Context in which the parameters are whole on every rank, for reading."""

    @abstractmethod
    def edit(self, values: Mapping[str, Tensor]) -> None:
        """Overwrite trained parameters by name, on all ranks alike, in every copy that the engine keeps."""

    @abstractmethod
    def optimizer_leaves(self) -> list[Tensor]:
        """This rank's fp32 tensors that the optimizer updates, in a fixed order."""

    @abstractmethod
    def optimizer_state(self) -> dict[Any, dict[str, Tensor]]:
        """The inner AdamW's state: leaf -> moments and step."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything that is trained."""
        return {name: parameter for group in self.groups for name, parameter in group.parameters.items()}

    def reset_optimizer(self) -> None:
        """Forget all moments and the step count, as a fresh optimizer would."""
        with torch.no_grad():
            for state in self.optimizer_state().values():
                for tensor in state.values():
                    tensor.zero_()

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Whole fp32 values by name, one at a time; on the engine's device, valid until the next is drawn."""
        parameters = self.parameters
        for name in names:
            with self.gathered([parameters[name]]):
                yield name, parameters[name].detach()

    def moments(self) -> dict[str, Tensor]:
        """This rank's optimizer tensors, as ``LEAF.KEY``; empty before the first step in some engines."""
        state = self.optimizer_state()
        return {
            f"{index}.{key}": tensor
            for index, leaf in enumerate(self.optimizer_leaves())
            for key, tensor in state.get(leaf, {}).items()
        }

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Put back what ``moments`` gave on the same rank of an equal engine."""
        state = self.optimizer_state()
        with torch.no_grad():
            for index, leaf in enumerate(self.optimizer_leaves()):
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    stored = moments.get(f"{index}.{key}")
                    if stored is None:
                        continue
                    if key in state.setdefault(leaf, {}):
                        state[leaf][key].copy_(stored)
                    else:
                        # AdamW keeps its step count on the CPU, except where it is fused, which is on accelerators.
                        state[leaf][key] = stored.to(leaf.device).clone()

    def check_precision(self) -> None:
        """Refuse to train unless every trained parameter and its fp32 copy are fp32.

        Raises:
            UserError: naming the first that is not.
        """
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                raise UserError(f"{name} became {parameter.dtype} after initialisation; trained values must stay fp32")
        for leaf in self.optimizer_leaves():
            if leaf.dtype != torch.float32:
                raise UserError(f"the optimizer holds a {leaf.dtype} copy of the trained values; it must be fp32")

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Evaluation mode without gradients."""
        was_training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train(was_training)


def optimizer_for(groups: Sequence[Group], *, fused: bool) -> torch.optim.AdamW:
    """AdamW over the groups, with PyTorch's and the authors' betas and epsilon."""
    return torch.optim.AdamW(
        [
            {
                "params": list(group.parameters.values()),
                "lr": group.peak_lr,
                "weight_decay": group.weight_decay,
                "name": group.name,
            }
            for group in groups
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
        fused=fused,
    )


def set_learning_rates(optimizer: Any, learning_rates: Mapping[str, float]) -> None:
    """Write each group's rate; a pure function of the step sets it, so that nothing has to be saved or rewound."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rates[group["name"]]
