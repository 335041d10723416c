"""The surface that both engines have: forward, backward, step, edit parameters, state in and out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from finemask_ds.data.collate import rank_share
from finemask_ds.engine.scaling import LossScale
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
        per_rank = rank_share(batch_size, world_size, micro_batch_size)
        micro = micro_batch_size or per_rank
        return cls(micro, per_rank // micro)

    def describe(self, world_size: int) -> str:
        """The arithmetic of a step, for the log."""
        total = world_size * self.num_micro_batches * self.micro_batch_size
        return (
            f"{world_size} rank(s) x {self.num_micro_batches} micro-batch(es) x {self.micro_batch_size} sequence(s) = "
            f"{total} per step"
        )


@dataclass(frozen=True)
class Piece:
    """A run of a trained parameter's flat elements that this rank updates: where its fp32 master and moments are."""

    name: str
    """Of the parameter."""
    start: int
    """Its first element's flat index in the parameter."""
    leaf: Tensor
    """The fp32 tensor that the optimizer updates; the key of its state."""
    where: slice
    """The piece's place in the flat leaf."""

    @property
    def stop(self) -> int:
        """Flat index in the parameter after the last element."""
        return self.start + self.where.stop - self.where.start

    def of(self, tensor: Tensor) -> Tensor:
        """The piece's own part, flat, of a tensor of the leaf's shape: its values, its gradient or a moment."""
        return tensor.detach().view(-1)[self.where]


@dataclass(frozen=True)
class Update:
    """What became of an optimizer step."""

    norm: float
    """Global norm of the gradients before clipping; not finite where some gradient is not."""
    norms: Mapping[str, float] = field(default_factory=dict)
    """The same for each group of parameters that was asked for."""

    @property
    def applied(self) -> bool:
        """False where the step was skipped on all ranks because a gradient is not finite."""
        return math.isfinite(self.norm)


class Engine(ABC):
    """Trains a module whose forward maps a batch to named sums; knows nothing of pruning."""

    module: nn.Module
    world: World
    groups: Sequence[Group]
    loss_scale: LossScale
    shapes: Mapping[str, tuple[int, ...]]
    """Of the trained parameters, by name; in stage 3 a parameter itself shows no shape."""
    is_sharded = False
    """Whether a trained value is updated by one rank only, in pieces; otherwise every rank updates all."""
    is_partitioned = False
    """Whether a trained value is whole inside ``gathered`` only."""

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
    def step(self, learning_rates: Mapping[str, float], watched: Mapping[str, Sequence[str]] | None = None) -> Update:
        """Clip, update with one rate per group name and clear the gradients.

        Args:
            learning_rates: by group name.
            watched: label -> names of the parameters whose gradients' norm is wanted, each under one label; costs a
                pass over them.

        Raises:
            UserError: after 50 steps in a row that overflowed fp16.
        """

    @abstractmethod
    def gathered(self, parameters: Iterable[nn.Parameter]) -> Any:
        """Context in which the parameters are whole on every rank, for reading."""

    @abstractmethod
    def edit(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrite trained parameters by name, on all ranks alike, in every copy that the engine keeps."""

    @abstractmethod
    def optimizer_state(self) -> dict[Any, dict[str, Tensor]]:
        """The inner AdamW's state: leaf -> moments and step."""

    @abstractmethod
    def find_pieces(self) -> list[Piece]:
        """What this rank updates, in a fixed order."""

    @cached_property
    def pieces(self) -> list[Piece]:
        """What this rank updates, in a fixed order; found once, as the leaves stay the same objects."""
        return self.find_pieces()

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

    def new_adam_step(self, leaf: Tensor) -> Tensor:
        """AdamW's step count of a leaf, zero, where the fused optimizer wants it: beside the leaf."""
        return torch.zeros((), dtype=torch.float32, device=leaf.device)

    def check_precision(self) -> None:
        """Refuse to train unless every trained parameter, its master and its moments are fp32.

        Raises:
            UserError: naming the first that is not.
        """
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                raise UserError(f"{name} became {parameter.dtype}; trained values must stay fp32")
        state = self.optimizer_state()
        for piece in self.pieces:
            kept = {"master": piece.leaf, **state.get(piece.leaf, {})}
            for kind, tensor in kept.items():
                if tensor.dtype != torch.float32:
                    raise UserError(f"the {kind} of {piece.name} became {tensor.dtype}; it must stay fp32")

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


def optimizer_for(groups: Sequence[Group]) -> torch.optim.AdamW:
    """AdamW over the groups, with PyTorch's and the authors' betas and epsilon; one pass over each tensor."""
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
        fused=True,
    )


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A micro-batch where it is computed on; from pinned memory without waiting for the copy."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def shapes_of(groups: Sequence[Group]) -> dict[str, tuple[int, ...]]:
    """Shapes of all trained parameters by name, before an engine may hide them."""
    return {name: tuple(value.shape) for group in groups for name, value in group.parameters.items()}


def whole_pieces(parameters: Mapping[str, nn.Parameter]) -> list[Piece]:
    """The pieces of an engine that updates every parameter whole, in place."""
    return [Piece(name, 0, parameter, slice(0, parameter.numel())) for name, parameter in parameters.items()]


def set_learning_rates(optimizer: Any, learning_rates: Mapping[str, float]) -> None:
    """Write each group's rate; a pure function of the step sets it, so that nothing has to be saved or rewound."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rates[group["name"]]


class GradientNorms:
    """Norms of chosen parameters' gradients, taken where every engine has them whole: as the optimizer reads them.

    At that moment they are reduced, unscaled and clipped, in the leaves, in every ZeRO stage and under offload.
    """

    def __init__(self, engine: Engine, optimizer: torch.optim.Optimizer):
        self._engine = engine
        self._label_of: dict[str, str] = {}
        self._squares: dict[str, Tensor] = {}
        optimizer.register_step_pre_hook(self._look)

    def watch(self, watched: Mapping[str, Sequence[str]]) -> None:
        """Look at the coming step's gradients: label -> names of parameters."""
        self._label_of = {name: label for label, names in watched.items() for name in names}
        zero = torch.zeros((), dtype=torch.float64, device=self._engine.world.device)
        self._squares = {label: zero.clone() for label in watched}

    def norms(self, norm: float, max_grad_norm: float) -> dict[str, float]:
        """Label -> norm before clipping, the same on every rank; collective where anything was watched.

        Args:
            norm: global norm before clipping.
            max_grad_norm: what it was clipped to; 0: not at all.
        """
        labels, self._label_of = sorted(self._squares), {}
        if not labels:
            return {}
        squares = torch.stack([self._squares.pop(label) for label in labels])
        if self._engine.is_sharded:
            squares = self._engine.world.sum(squares)
        unclipped = max(1.0, norm / max_grad_norm) if max_grad_norm else 1.0
        return {label: value * unclipped for label, value in zip(labels, squares.sqrt().tolist(), strict=True)}

    def _look(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self._label_of:
            return
        # In stages 1 to 3 one step of ours is a step of AdamW's for each flat leaf.
        leaves = {id(leaf) for group in optimizer.param_groups for leaf in group["params"]}
        for piece in self._engine.pieces:
            label = self._label_of.get(piece.name)
            if label is not None and id(piece.leaf) in leaves and piece.leaf.grad is not None:
                square = torch.linalg.vector_norm(piece.of(piece.leaf.grad), dtype=torch.float64).square()
                self._squares[label] += square.to(self._squares[label].device)
