"""Initial scores reach the threshold exactly where the starting mask keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finemask_ds.masks.binarize import threshold
from finemask_ds.masks.initialise import binary, ranked
from finemask_ds.masks.select import num_kept, top_k_mask

PHI = 0.01
WEIGHTS = st.lists(
    st.floats(-10, 10, width=32) | st.sampled_from([0.5, -0.5, 0.0, -0.0, 1e-45]), min_size=2, max_size=40
)


def omp(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    return top_k_mask(weight.abs(), num_kept(weight.numel(), sparsity))


def test_binary_is_equation_5():
    mask = torch.tensor([[True, False], [False, True]])
    scores = binary(mask, alpha=2.0, phi=0.01)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, torch.tensor([[0.02, 0.0], [0.0, 0.02]]))
    assert torch.equal(threshold(binary(mask, alpha=1.0, phi=PHI), PHI), mask)


@settings(max_examples=300)
@given(WEIGHTS, st.floats(0, 1, exclude_max=True))
def test_ranked_scores_reach_phi_exactly_where_omp_keeps(values, sparsity):
    """Also among tied and zero weights, where magnitudes alone cannot tell."""
    weight = torch.tensor(values, dtype=torch.float32)[None]
    mask = omp(weight, sparsity)
    scores = ranked(weight, mask, PHI)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert (scores >= 0).all()
    assert torch.equal(threshold(scores, PHI), mask)
    assert torch.equal(top_k_mask(scores, int(mask.sum())), mask)


def test_ranked_is_phi_times_the_magnitude_over_the_threshold():
    weight = torch.randn(50, 60, generator=torch.Generator().manual_seed(0))
    mask = omp(weight, 0.7)
    smallest = weight.abs()[mask].min()
    scores = ranked(weight, mask, PHI)
    expected = PHI * weight.abs().double() / smallest.double()
    torch.testing.assert_close(scores.double(), expected, rtol=3e-7, atol=0)
    assert scores[weight.abs() == smallest].tolist() == [torch.tensor(PHI).item()]
    order = weight.abs().flatten().argsort()
    assert (scores.flatten()[order].diff() >= 0).all()


def test_at_sparsity_0_the_smallest_positive_magnitude_is_at_phi():
    weight = torch.tensor([[0.0, -0.25, 0.5, 1.0]])
    scores = ranked(weight, omp(weight, 0.0), phi=1.0)
    assert scores.tolist() == [[1.0, 1.0, 2.0, 4.0]]


def test_a_matrix_of_which_nothing_is_kept_stays_below_phi():
    weight = torch.tensor([[3.0, -1.0, 0.0]])
    assert ranked(weight, torch.zeros(1, 3, dtype=torch.bool), PHI).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("power", [2.0**-6, 2.0**5])
def test_scores_scale_with_phi_bit_for_bit(power):
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    mask = omp(weight, 0.7)
    assert torch.equal(ranked(weight, mask, PHI * power), ranked(weight, mask, PHI) * power)
    assert torch.equal(binary(mask, 2.0, PHI * power), binary(mask, 2.0, PHI) * power)
