"""The ranks of a run: who am I, sum over all, and one rank doing what must be done once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from finemask_ds.engine.termination import Termination
from finemask_ds.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that train together; ``World()`` is a single one."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    time_out: timedelta | None = None
    """How long a collective may wait; None: as long as torch lets it."""
    termination: Termination = field(default_factory=Termination.current, compare=False, repr=False)
    """Whether a scheduler wants this rank to end."""

    @property
    def is_first(self) -> bool:
        """True on the one rank that writes and speaks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over all ranks, in place; the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def from_first(self, tensor: Tensor) -> Tensor:
        """The first rank's ``tensor`` on every rank, each of which brings one of its shape, dtype and device."""
        if self.size == 1:
            return tensor
        on_device = tensor.to(self.device)
        dist.broadcast(on_device, src=0)
        return on_device.to(tensor.device)

    def gather(self, value: T) -> list[T]:
        """Every rank's (small, picklable) value, in the order of the ranks, on every rank."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def first_to_differ(self, told: Mapping[str, str]) -> tuple[int, list[str]] | None:
        """The first rank that has something else than rank 0 under a name, and those names, on every rank; or None."""
        everyone = self.gather(dict(told))
        for rank, theirs in enumerate(everyone):
            if differing := [name for name, value in everyone[0].items() if theirs.get(name) != value]:
                return rank, differing
        return None

    def gather_bytes(self, tensor: Tensor) -> Tensor:
        """uint8 [n], equally long on all ranks -> uint8 [ranks, n] on every rank."""
        if self.size == 1:
            return tensor[None]
        gathered = tensor.new_empty(self.size * tensor.numel())
        dist.all_gather_into_tensor(gathered, tensor)
        return gathered.view(self.size, -1)

    def together(self, action: Callable[[], T]) -> T:
        """Run an action on every rank; where it is a UserError on some, it is the first one's on all of them."""
        result, raised = None, None
        try:
            result = action()
        except UserError as error:
            raised = error
        first = next((error for error in self.gather(raised) if error is not None), None)
        if first is not None:
            raise first
        return result  # type: ignore[return-value]

    def on_first(self, action: Callable[[], T]) -> T:
        """Run a short action on the first rank only; every rank gets its (small) result, or its UserError."""
        if self.size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = action()
            except UserError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def this_process() -> World:
    """A world of one, on the accelerator if there is one."""
    return World(device=torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu"))


def launched_rank() -> int:
    """The rank that the launcher gave this process (0 without a launcher), known before anything distributed starts."""
    return int(os.environ.get("RANK", "0"))
