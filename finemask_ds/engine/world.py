"""The ranks of a run: who am I, sum over all, and one rank doing what must be done once."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from finemask_ds.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that train together; ``World()`` is a single one."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """True on the one rank that writes and speaks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over all ranks, in place; the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, value: int) -> int:
        """The largest ``value`` of all ranks."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor.item())

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def on_first(self, action: Callable[[], T]) -> T:
        """Run a short action on the first rank only; every rank gets its (small) result, or its UserError."""
        if self.size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = action()
            except UserError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise UserError(outcome[1])
        return outcome[0]


def this_process() -> World:
    """A world of one, on the accelerator if there is one."""
    return World(device=torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu"))


def launched_rank() -> int:
    """The rank that the launcher gave this process (0 without a launcher), known before anything distributed starts."""
    return int(os.environ.get("RANK", "0"))
