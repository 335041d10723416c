"""The straight-through estimator against gradients written by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from finemask_ds.masks.binarize import masked_rows, masked_weight, threshold


def toy(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, generator=generator).to(dtype)
    scores = torch.randn(6, 4, generator=generator) * 0.02
    return weight, scores, threshold(scores, 0.01), torch.randn(5, 4, generator=generator).to(dtype)


def test_threshold_keeps_what_reaches_it():
    scores = torch.tensor([0.02, 0.01, 0.0099999, 0.0, -0.02])
    assert threshold(scores, 0.01).tolist() == [True, True, False, False, False]
    assert threshold(scores.double(), 0.01).tolist() == [x >= 0.01 for x in scores.double().tolist()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_forward_is_the_weight_where_kept_and_positive_zero_elsewhere(dtype):
    weight, scores, mask, _ = toy(dtype)
    weight[0, 0], mask[0, 0] = -math.inf, False
    weight[0, 1], mask[0, 1] = math.nan, False
    weight[0, 2:], mask[0, 2:] = torch.tensor([-math.inf, -0.0], dtype=dtype), True
    for product in (masked_weight(weight, scores, mask), masked_weight(weight.T, scores.T, mask.T).T):
        assert product.dtype == dtype
        assert torch.equal(product[mask].view(torch.uint8), weight[mask].view(torch.uint8))
        assert not product[~mask].view(torch.uint8).any()


def test_a_full_mask_gives_the_weight_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.tensor([[-0.0, 1.0], [math.inf, 1e-7]], dtype=dtype)
        masked = masked_weight(weight, None, torch.ones(2, 2, dtype=torch.bool))
        assert masked.dtype == dtype
        assert torch.equal(masked.view(torch.uint8), weight.view(torch.uint8))


def test_gradients_equal_those_written_by_hand():
    """y = x (W M)^T, L = sum((y + 1)^3), G = dL/d(W M) = 3 ((y + 1)^2)^T x: scores get G W (Eq. 4), W G M."""
    weight, scores, mask, x = toy()
    weight.requires_grad_()
    scores.requires_grad_()
    y = F.linear(x, masked_weight(weight, scores, mask))
    ((y + 1) ** 3).sum().backward()
    by_hand = (3 * (y.detach() + 1) ** 2).T @ x
    assert torch.equal(scores.grad, by_hand * weight.detach())
    assert torch.equal(weight.grad, by_hand * mask)
    assert scores.grad[~mask].abs().min() > 0  # pruned entries hear of it too


def test_the_gradient_of_the_scores_does_not_depend_on_their_scale():
    weight, scores, mask, x = toy()
    gradients = []
    for scale in (1.0, 64.0):
        scaled = (scores * scale).requires_grad_()
        F.linear(x, masked_weight(weight, scaled, mask)).pow(2).sum().backward()
        gradients.append(scaled.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_get_fp32_gradients_from_16_bit_weights(dtype):
    weight, scores, mask, _ = toy(dtype)
    scores.requires_grad_()
    upstream = torch.linspace(-1, 1, 24).view(6, 4).to(dtype)
    masked = masked_weight(weight, scores, mask)
    assert masked.dtype == dtype
    masked.backward(upstream)
    assert scores.grad.dtype == torch.float32
    assert torch.equal(scores.grad, upstream.float() * weight.float())
    assert not torch.equal(scores.grad, (upstream * weight).float())  # a 16-bit product would have been rounded


def test_only_what_requires_a_gradient_gets_one():
    weight, scores, mask, _ = toy()
    assert not masked_weight(weight, scores, mask).requires_grad
    weight.requires_grad_()
    masked_weight(weight, scores, mask).sum().backward()
    assert scores.grad is None
    assert torch.equal(weight.grad, mask.float())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
        masked_weight(weight.detach(), scores.requires_grad_(), mask)
        assert [tensor.dtype for tensor in saved] == [torch.float32]
        masked_weight(weight, None, mask)
        assert [tensor.dtype for tensor in saved] == [torch.float32, torch.bool]


def test_a_product_made_before_is_the_result_and_changes_no_gradient():
    weight, scores, mask, x = toy()
    gradients = []
    for product in (None, torch.where(mask, weight, 0.0)):
        learnt = scores.clone().requires_grad_()
        masked = masked_weight(weight, learnt, mask, product)
        assert product is None or masked.data_ptr() == product.data_ptr()
        F.linear(x, masked).pow(2).sum().backward()
        gradients.append(learnt.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_masked_table_and_so_are_the_gradients(dtype, padding_idx):
    """Rows looked up twice, one never, one that is padding; the reference looks them up in all of W * M."""
    weight, scores, mask, _ = toy(dtype)
    rows = torch.tensor([[0, 2, 2], [5, 0, 3]])
    upstream = torch.linspace(-1, 1, 24).view(2, 3, 4).to(dtype)
    results = []
    for looked_up in (
        lambda w, s: masked_rows(w, s, mask, rows, padding_idx),
        lambda w, s: F.embedding(rows, masked_weight(w, s, mask), padding_idx),
    ):
        w, s = weight.clone().requires_grad_(), scores.clone().requires_grad_()
        out = looked_up(w, s)
        out.backward(upstream)
        results.append((out.detach(), w.grad, s.grad))
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        if dtype == torch.float32:
            assert torch.equal(ours, plain)
    assert torch.equal(results[0][0], results[1][0])
    by_hand = torch.zeros(6, 4).index_add_(0, rows.flatten(), upstream.float().view(-1, 4)) * weight.float()
    if padding_idx is not None:
        by_hand[padding_idx] = 0
    # Summed in fp32 over the places of a row, where the plain way sums 16-bit values.
    assert torch.equal(results[0][2], by_hand)


def test_there_is_no_second_derivative():
    weight, scores, mask, _ = toy()
    scores.requires_grad_()
    (first,) = torch.autograd.grad(masked_weight(weight, scores, mask).pow(2).sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
