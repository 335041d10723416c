"""From scores to masked weights: the threshold and its straight-through gradient (TAMT Section 3.4.1)."""

from __future__ import annotations

import importlib.util
import os
import shutil
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a number -> integers that hold its bits."""


def threshold(scores: Tensor, phi: float) -> Tensor:
    """M = scores >= phi (TAMT Eq. 3), bool of the scores' shape, with phi rounded to the scores' dtype."""
    return scores >= torch.tensor(phi, dtype=scores.dtype)


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """The values where the mask is True and +0.0 elsewhere, even where they are negative or not finite.

    Their bits times 0 or 1: without the -0.0 and NaN of a product of floats, and on CPUs five to ten times as fast as
    ``torch.where``, which branches at each element.

    Args:
        values: of any shape and floating dtype.
        mask: bool of that shape, on the same device.
    """
    return (values.view(_BITS[values.element_size()]) * mask.view(torch.uint8)).view(values.dtype)


def has_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels (``masks.matrices``) run on this device; elsewhere torch's operations do the same."""
    return device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    """Looked for once and not in every backward pass; Triton compiles what launches its kernels when they are used."""
    has_compiler = "CC" in os.environ or any(map(shutil.which, ("clang", "gcc", "cc")))
    return has_compiler and importlib.util.find_spec("triton") is not None


def masked_weight(weight: Tensor, scores: Tensor | None, mask: Tensor, product: Tensor | None = None) -> Tensor:
    """W * M with the straight-through gradient to the scores.

    Forward: W where M is True and +0.0 elsewhere, even where W is negative or not finite; W's dtype.
    Backward, for a gradient G of the result: the scores get G * W, as if they were M itself (TAMT Eq. 4),
    computed in their own dtype (fp32) even where W and G have 16 bits; the weight gets G * M. What does not
    require a gradient costs none. There is no second derivative.

    Args:
        weight: [rows, columns], any floating dtype.
        scores: of the weight's shape, the ones to learn; None where the mask is fixed.
        mask: bool of the weight's shape. Its relation to the scores is the caller's affair.
        product: W * M where the caller has it already; it is returned as it is.
    """
    return _MaskedWeight.apply(weight, scores, mask, product)


def masked_rows(
    weight: Tensor, scores: Tensor | None, mask: Tensor, rows: Tensor, padding_idx: int | None = None
) -> Tensor:
    """Rows of W * M, an embedding's forward, with ``masked_weight``'s gradients; nothing but those rows is computed.

    Args:
        weight: [rows, columns], any floating dtype.
        scores: of the weight's shape; None where the mask is fixed.
        mask: bool of the weight's shape.
        rows: int64 of any shape, the rows to look up.
        padding_idx: a row that gets no gradient.

    Returns:
        [*rows.shape, columns] of the weight's dtype.
    """
    return _MaskedRows.apply(weight, scores, mask, rows, -1 if padding_idx is None else padding_idx)


class _MaskedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor | None, mask: Tensor, product: Tensor | None) -> Tensor:
        for_weight, for_scores, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(weight if for_scores else None, mask if for_weight else None)
        ctx.scores_dtype = None if scores is None else scores.dtype
        return masked(weight, mask) if product is None else product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, mask = ctx.saved_tensors
        # As numbers, since torch's products with bool are several times slower on CPUs.
        for_weight = None if mask is None else gradient * mask.view(torch.uint8)
        for_scores = None if weight is None else _score_gradient(gradient, weight, ctx.scores_dtype)
        return for_weight, for_scores, None, None


def _score_gradient(gradient: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """G * W in the scores' dtype."""
    if dtype == torch.float32 and has_kernels(weight.device):
        from finemask_ds.masks.matrices import score_gradient  # Needs Triton, which CPUs do not.

        return score_gradient(gradient, weight)
    return gradient.to(dtype) * weight.to(dtype)


class _MaskedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scores: Tensor | None, mask: Tensor, rows: Tensor, padding_idx: int
    ) -> Tensor:
        for_weight, for_scores, *_ = ctx.needs_input_grad
        ctx.save_for_backward(weight if for_scores else None, mask if for_weight else None, rows)
        ctx.num_rows, ctx.padding_idx = weight.shape[0], padding_idx
        ctx.scores_dtype = None if scores is None else scores.dtype
        return masked(weight[rows], mask[rows])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        weight, mask, rows = ctx.saved_tensors
        touched = rows.unique()

        def of_table(values: Tensor) -> Tensor:
            """The gradient of the whole table, of which only the rows looked up are not zero."""
            return torch.ops.aten.embedding_dense_backward(values, rows, ctx.num_rows, ctx.padding_idx, False)

        for_weight = for_scores = None
        if mask is not None:
            for_weight = of_table(gradient)
            for_weight[touched] *= mask[touched]
        if weight is not None:
            for_scores = of_table(gradient.to(ctx.scores_dtype))
            for_scores[touched] *= weight[touched].to(ctx.scores_dtype)
        return for_weight, for_scores, None, None, None
