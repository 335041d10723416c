"""Swaps lower the error that they say: against products of matrices, and against the best mask where it is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finemask_ds.masks.select import num_kept, top_k_mask
from finemask_ds.masks.swap import Reconstruction


def problem(rows: int = 12, columns: int = 20, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, correlated inputs and wanted outputs that are not quite the weights' own, fp32."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=draw) @ torch.randn(columns, columns, generator=draw) / columns**0.5
    weight = torch.randn(rows, columns, generator=draw)
    return weight, x, x @ weight.T + 0.1 * torch.randn(tokens, rows, generator=draw)


def start_of(weight: Tensor, x: Tensor, sparsity: float) -> Tensor:
    return top_k_mask(weight.abs() * x.norm(dim=0), num_kept(weight.numel(), sparsity))


def error_by_hand(weight: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return (y.double() - x.double() @ (weight * mask).double().T).square().sum()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 0.95])
def test_the_error_is_that_of_the_outputs(sparsity: float) -> None:
    weight, x, y = problem()
    search = Reconstruction(weight, x.T @ x, y.T @ x, start_of(weight, x, sparsity))
    before = error_by_hand(weight, x, y, search.mask)
    found = search.error().double() + y.double().square().sum()
    torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-2)
    search.swap()
    found = search.error().double() + y.double().square().sum()
    torch.testing.assert_close(found, error_by_hand(weight, x, y, search.mask), rtol=1e-4, atol=1e-2)


def test_each_rise_is_what_flipping_that_weight_adds() -> None:
    weight, x, y = problem(rows=3, columns=5)
    search = Reconstruction(weight, x.T @ x, y.T @ x, start_of(weight, x, 0.5))
    expected = torch.empty(3, 5, dtype=torch.float64)
    for row in range(3):
        for column in range(5):
            flipped = search.mask.clone()
            flipped[row, column] = ~flipped[row, column]
            expected[row, column] = error_by_hand(weight, x, y, flipped) - error_by_hand(weight, x, y, search.mask)
    torch.testing.assert_close(search.rises().double(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_search_keeps_as_many_and_errs_no_more(sparsity: float, seed: int) -> None:
    weight, x, y = problem(seed=seed)
    start = start_of(weight, x, sparsity)
    search = Reconstruction(weight, x.T @ x, y.T @ x, start)
    search.swap()
    assert search.mask.sum() == start.sum()
    assert error_by_hand(weight, x, y, search.mask) <= error_by_hand(weight, x, y, start)
    assert torch.equal(start, start_of(weight, x, sparsity))  # the caller's mask is not touched


def test_correlated_inputs_let_it_err_far_less_than_their_norms_tell() -> None:
    weight, x, y = problem(rows=64, columns=64)
    start = start_of(weight, x, 0.7)
    search = Reconstruction(weight, x.T @ x, y.T @ x, start)
    search.swap()
    assert error_by_hand(weight, x, y, search.mask) < 0.7 * error_by_hand(weight, x, y, start)


@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.95])
def test_with_independent_inputs_it_finds_the_best_mask(sparsity: float) -> None:
    """Then every weight errs by itself, by |w| times the norm of its input, and the best mask has the largest."""
    weight, _, _ = problem()
    norms = torch.linspace(0.5, 2, 20)
    gram = norms.square().diag()
    best = top_k_mask(weight.abs() * norms, num_kept(weight.numel(), sparsity))
    anywhere = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(3)).view(weight.shape)
    search = Reconstruction(weight, gram, weight @ gram, anywhere < best.sum())
    assert not torch.equal(search.mask, best)
    search.swap(least_fall=1e-7)
    assert torch.equal(search.mask, best)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 0.999])
def test_sizes_reach_1_exactly_where_the_mask_keeps(sparsity: float) -> None:
    weight, x, y = problem()
    search = Reconstruction(weight, x.T @ x, y.T @ x, start_of(weight, x, sparsity))
    search.swap()
    sizes = search.sizes()
    assert sizes.isfinite().all()
    assert torch.equal(sizes >= 1, search.mask)
    missed = search.rises()[search.mask]
    above = sizes[search.mask] > 1
    order = missed[above].argsort()
    assert (sizes[search.mask][above][order].diff() >= 0).all()


def test_a_matrix_of_zeros_is_left_alone() -> None:
    mask = torch.tensor([[True, False, True, False]])
    search = Reconstruction(torch.zeros(1, 4), torch.eye(4), torch.zeros(1, 4), mask)
    search.swap()
    assert torch.equal(search.mask, mask)
    assert torch.equal(search.sizes() >= 1, mask)
