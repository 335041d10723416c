"""Selection on shards against selection of whole matrices: the same bits, whatever the cut."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finemask_ds.errors import UserError
from finemask_ds.masks.select import Selection, select
from finemask_ds.masks.sharded import Shards, pack, select_sharded, unpack
from tests.masks.test_select import SCORES, SPARSITIES, random_matrices


class Adder:
    """Adds up what as many threads bring, each call in lockstep: an all-reduce without processes."""

    def __init__(self, size: int):
        self._brought: list[Tensor | None] = [None] * size
        self._barrier = threading.Barrier(size)

    def of(self, rank: int) -> Callable[[Tensor], Tensor]:
        def add(tensor: Tensor) -> Tensor:
            self._brought[rank] = tensor
            self._barrier.wait(10)
            total = torch.stack([part for part in self._brought if part is not None]).sum(0)
            self._barrier.wait(10)
            return total

        return add


def on_shards(
    scores: dict[str, Tensor],
    sparsity: float,
    scope: str,
    size: int,
    within: dict[str, Tensor] | None = None,
    near: dict[str, float] | None = None,
) -> dict[str, Selection]:
    """Cut each matrix into runs of ceil(n / size), select on each in a thread of its own, and put them together."""
    adder = Adder(size)

    def cut(values: Tensor, rank: int) -> Tensor:
        length = -(-values.numel() // size)
        return values.flatten()[rank * length : (rank + 1) * length]

    def work(rank: int) -> dict[str, tuple[Tensor, float]]:
        return select_sharded(
            {name: cut(values, rank) for name, values in scores.items()},
            {name: values.numel() for name, values in scores.items()},
            sparsity, scope, Shards(rank, size, adder.of(rank)),
            within=None if within is None else {name: cut(allowed, rank) for name, allowed in within.items()},
            near=near,
        )  # fmt: skip

    with ThreadPoolExecutor(size) as threads:
        parts = list(threads.map(work, range(size)))
    return {
        name: Selection(torch.cat([part[name][0] for part in parts]).view(values.shape), parts[0][name][1])
        for name, values in scores.items()
    }


def assert_same(one: dict[str, Selection], two: dict[str, Selection]) -> None:
    assert list(one) == list(two)
    for name, (mask, threshold) in one.items():
        assert torch.equal(mask, two[name].mask)
        assert threshold == two[name].threshold


@settings(max_examples=150, deadline=None)
@given(
    matrices=st.lists(st.lists(SCORES, min_size=1, max_size=17), min_size=1, max_size=4),
    sparsity=SPARSITIES, scope=st.sampled_from(["local", "global"]), size=st.integers(1, 5),
)  # fmt: skip
def test_any_cut_selects_as_whole_matrices_do(
    matrices: list[list[float]], sparsity: float, scope: str, size: int
) -> None:
    """With ties, infinities, both zeros, and more ranks than scores."""
    scores = {str(index): torch.tensor(values) for index, values in enumerate(matrices)}
    assert_same(on_shards(scores, sparsity, scope, size), select(scores, sparsity, scope))


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("nearly", [0.0, 0.01])
def test_a_guess_of_the_thresholds_changes_no_mask(scope: str, nearly: float) -> None:
    scores = random_matrices()
    expected = select(scores, 0.7, scope)
    near = {name: selection.threshold + nearly for name, selection in expected.items()}
    assert_same(on_shards(scores, 0.7, scope, 3, near=near), expected)


@settings(max_examples=150, deadline=None)
@given(
    matrices=st.lists(st.lists(SCORES, min_size=1, max_size=17), min_size=1, max_size=4),
    sparsity=SPARSITIES, scope=st.sampled_from(["local", "global"]), size=st.integers(1, 3), data=st.data(),
)  # fmt: skip
def test_any_guess_leads_to_the_same_masks(
    matrices: list[list[float]], sparsity: float, scope: str, size: int, data: st.DataObject
) -> None:
    """Where the threshold lies about the guess, on its other side, far off or nowhere."""
    scores = {str(index): torch.tensor(values) for index, values in enumerate(matrices)}
    expected = select(scores, sparsity, scope)
    factor = st.sampled_from([0.98, 1.0, 1.02, -1.0, 1e6, math.inf, -math.inf])
    guesses = {name: selection.threshold * data.draw(factor) for name, selection in expected.items()}
    near = dict.fromkeys(scores, next(iter(guesses.values()))) if scope == "global" else guesses
    found = on_shards(scores, sparsity, scope, size, near=near)
    assert list(found) == list(expected)
    for name, (mask, threshold) in found.items():
        assert torch.equal(mask, expected[name].mask)
        assert threshold in (expected[name].threshold, near[name])


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pruned_further_on_shards(scope: str, size: int) -> None:
    scores = random_matrices()
    within = {name: selection.mask for name, selection in select(scores, 0.5, scope).items()}
    magnitudes = {name: values.abs() for name, values in random_matrices(1).items()}
    ours = on_shards(magnitudes, 0.7, scope, size, within)
    assert_same(ours, select(magnitudes, 0.7, scope, within=within))
    assert all(not (selection.mask & ~within[name]).any() for name, selection in ours.items())


@pytest.mark.parametrize("scope", ["local", "global"])
def test_ties_across_ranks_keep_the_lowest_index(scope: str) -> None:
    scores = {"a": torch.zeros(3, 5), "b": torch.tensor([[1.0, 0.0, 0.0]])}
    assert_same(on_shards(scores, 0.5, scope, 4), select(scores, 0.5, scope))


def test_bad_scores_fail_on_every_rank() -> None:
    scores = {"a": torch.tensor([1.0, math.nan, 0.0, 2.0])}
    with pytest.raises(UserError, match="NaN"):
        on_shards(scores, 0.5, "local", 3)
    within = {"a": torch.tensor([True, False, False, False])}
    with pytest.raises(ValueError, match=r"cannot keep \[2\] of \[1\]"):
        on_shards({"a": torch.arange(4.0)}, 0.5, "local", 2, within)


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 3))
def test_packed_bits_are_numpys(bits: list[bool], spare: int) -> None:
    kept, num_bytes = torch.tensor(bits, dtype=torch.bool), -(-len(bits) // 8) + spare
    packed = pack(kept, num_bytes)
    theirs = numpy.packbits(numpy.array(bits, dtype=bool), bitorder="little")
    assert packed.numpy().tobytes() == theirs.tobytes() + bytes(spare)
    assert torch.equal(unpack(packed)[: len(bits)], kept)
    assert not unpack(packed)[len(bits) :].any()
