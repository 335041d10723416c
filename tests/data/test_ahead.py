"""Batches made ahead are the batches, in whatever order they are asked for."""

from __future__ import annotations

import threading

import pytest
import torch

from finemask_ds.data.ahead import Ahead, ahead


def batches(position: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.tensor([position, part])} for part in range(2)]


@pytest.mark.parametrize("asked", [(1, 2, 3, 4), (1, 2, 4, 4, 1, 2), (7,)])
def test_they_are_those_asked_for(asked: tuple[int, ...]) -> None:
    made = Ahead(batches, pin=False)
    for position in asked:
        assert [batch["input_ids"].tolist() for batch in made(position)] == [[position, 0], [position, 1]]


def test_the_next_ones_are_made_before_they_are_asked_for() -> None:
    made = threading.Event()

    def tell(position: int) -> list[dict[str, torch.Tensor]]:
        if position == 2:
            made.set()
        return batches(position)

    Ahead(tell, pin=False)(1)
    assert made.wait(timeout=60)


def test_what_goes_wrong_is_told_where_the_batch_is_asked_for() -> None:
    def fail(position: int) -> list[dict[str, torch.Tensor]]:
        if position == 2:
            raise OSError("no such block")
        return batches(position)

    made = Ahead(fail, pin=False)
    made(1)
    with pytest.raises(OSError, match="no such block"):
        made(2)


def test_a_cpu_makes_none_ahead() -> None:
    assert ahead(batches, torch.device("cpu")) is batches
