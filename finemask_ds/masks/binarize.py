"""From scores to masked weights: the threshold and its straight-through gradient (TAMT Section 3.4.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def threshold(scores: Tensor, phi: float) -> Tensor:
    """M = scores >= phi (TAMT Eq. 3), bool of the scores' shape, with phi rounded to the scores' dtype."""
    return scores >= torch.tensor(phi, dtype=scores.dtype)


def masked_weight(weight: Tensor, scores: Tensor | None, mask: Tensor) -> Tensor:
    """W * M with the straight-through gradient to the scores.

    Forward: W where M is True and +0.0 elsewhere, even where W is negative or not finite; W's dtype.
    Backward, for a gradient G of the result: the scores get G * W, as if they were M itself (TAMT Eq. 4),
    computed in their own dtype (fp32) even where W and G have 16 bits; the weight gets G where M is True and
    +0.0 elsewhere. What does not require a gradient costs none. There is no second derivative.

    Args:
        weight: [rows, columns], any floating dtype.
        scores: of the weight's shape, the ones to learn; None where the mask is fixed.
        mask: bool of the weight's shape. Its relation to the scores is the caller's affair.
    """
    return _MaskedWeight.apply(weight, scores, mask)


class _MaskedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor | None, mask: Tensor) -> Tensor:
        for_weight, for_scores, _ = ctx.needs_input_grad
        ctx.save_for_backward(weight if for_scores else None, mask if for_weight else None)
        ctx.scores_dtype = None if scores is None else scores.dtype
        return torch.where(mask, weight, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, mask = ctx.saved_tensors
        for_weight = None if mask is None else torch.where(mask, gradient, 0.0)
        for_scores = None if weight is None else gradient.to(ctx.scores_dtype) * weight.to(ctx.scores_dtype)
        return for_weight, for_scores, None
