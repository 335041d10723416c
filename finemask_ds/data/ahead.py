"""The next step's batches, made in a thread while an accelerator computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Batches = Callable[[int], Sequence[Mapping[str, Tensor]]]
"""Position -> micro-batches; a pure function, so that asking ahead changes nothing."""


class Ahead:
    """``batches`` with the position after the one asked for under way: the same batches, in any order of asking.

    Args:
        batches: makes them.
        pin: put them into page-locked memory, from which copies to an accelerator do not wait.
    """

    def __init__(self, batches: Batches, *, pin: bool):
        self._batches, self._pin = batches, pin
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[list[dict[str, Tensor]]]] | None = None

    def __call__(self, position: int) -> list[dict[str, Tensor]]:
        """The micro-batches of ``position``."""
        coming = self._next
        made = coming[1] if coming and coming[0] == position else self._thread.submit(self._make, position)
        self._next = (position + 1, self._thread.submit(self._make, position + 1))
        return made.result()

    def _make(self, position: int) -> list[dict[str, Tensor]]:
        return [
            {name: tensor.pin_memory() if self._pin else tensor for name, tensor in batch.items()}
            for batch in self._batches(position)
        ]


def ahead(batches: Batches, device: torch.device) -> Batches:
    """``batches`` as a device wants them: on accelerators ahead of their time; a CPU would only share its cores."""
    return batches if device.type == "cpu" else Ahead(batches, pin=device.type == "cuda")
