"""Masks that follow learnt scores, on an accelerator: exact selection and W * M of all matrices in a few launches.

Nothing waits for the device: the host reads no result, and no shape depends on one.

The k-th largest score is found by counting, without sorting. A float's bits, read as sign and magnitude, are an integer
that ranks as the float does: its key. A pass counts the scores that reach each of 63 probes, and leaves of the keys in
question those between two of them. The first probes stand around a guess, at distances that double; the later ones
divide evenly what is left. Seven passes always suffice, and two where the guess is within 64 keys of the answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from finemask_ds.masks.kernels import count_block, multiply_tile, narrow, refresh_block, surround
from finemask_ds.masks.select import SCOPES

BLOCK = 4_096
"""Scores that one program handles."""
LEVELS = 6
"""A pass divides the keys in question by 2 ** LEVELS."""
PASSES = 7
"""One around the guess, and six for the fewer than 2 ** 32 keys that may be left."""
TILE = 64
"""Rows and columns of a gradient that one program handles."""


class Matrix(NamedTuple):
    """The tensors of one matrix: contiguous, of one shape, on one device."""

    scores: Tensor
    """fp32, never NaN."""
    mask: Tensor | None = None
    """Bool, written by ``Matrices.refresh``; None: not wanted."""
    weight: Tensor | None = None
    """fp32, bf16 or fp16; needed where there is a product."""
    product: Tensor | None = None
    """Of the weight's dtype, written by ``Matrices.refresh``; None: not wanted."""


class Matrices:
    """Matrices whose tensors keep their places in memory, worked on together.

    A row is what is ranked together: one matrix (``local``) or all of them (``global``).
    """

    def __init__(self, matrices: Sequence[Matrix], scope: str = "local", *, block: int = BLOCK):
        """Build the tables of addresses; this alone waits for the device.

        Args:
            matrices: at least one; a matrix may have no elements.
            scope: ``local`` or ``global``.
            block: scores per program, a power of two.

        Raises:
            ValueError: for no matrices, an unknown scope, or tensors that are not as ``Matrix`` says.
        """
        if not matrices or scope not in SCOPES:
            raise ValueError(f"cannot rank {len(matrices)} matrices with scope {scope!r}: need one of {SCOPES}")
        for matrix in matrices:
            _check(matrix, matrices[0].scores.device)
        self._matrices, self._block = list(matrices), block
        sizes = [matrix.scores.numel() for matrix in matrices]
        starts = [(number, start) for number, size in enumerate(sizes) for start in range(0, size, block)]
        items = [(number, start, min(block, sizes[number] - start)) for number, start in starts]
        rows = [0] * len(sizes) if scope == "global" else list(range(len(sizes)))
        widths = [0 if matrix.product is None else matrix.product.element_size() for matrix in matrices]
        self._addresses = self._found()
        self._aligned = all(number % 16 == 0 for numbers in ([block], sizes, *self._addresses) for number in numbers)
        self._items, self._rows, self._widths = map(self._to_device, (items, rows, widths))
        self._scores, self._masks, self._weights, self._products = map(self._to_device, self._addresses)
        self._num_rows = rows[-1] + 1
        self.passes = self._to_device([0] * self._num_rows)
        """int64 [rows]: how often the last ``kth_largest`` read a row's scores."""

    def refresh(self, thresholds: Tensor) -> Tensor:
        """Renew each mask = scores >= threshold and each product = weight * mask, in one pass.

        The product is the weight, bit for bit, where kept, and +0.0 elsewhere even if the weight is not finite.

        Args:
            thresholds: fp32 [rows].

        Returns:
            int64 [matrices]: how many are kept.

        Raises:
            ValueError: where the thresholds are not as said.
            RuntimeError: where a tensor has moved.
        """
        self._check_places()
        self._check_rows(thresholds, torch.float32)
        counts = torch.zeros_like(self._rows)
        self._launch(
            refresh_block, len(self._items), self._items, self._rows, self._scores, self._masks, self._weights,
            self._products, self._widths, thresholds, counts, block=self._block, aligned=self._aligned, num_warps=8,
        )  # fmt: skip
        written = [tensor for matrix in self._matrices for tensor in (matrix.mask, matrix.product)]
        # So that a backward pass that still needs what was overwritten fails, as after torch's in-place operations.
        torch.autograd.graph.increment_version([tensor for tensor in written if tensor is not None])
        return counts

    def kth_largest(self, k: Tensor, near: Tensor) -> Tensor:
        """The exact k-th largest score of each row; infinities rank as numbers do, -0.0 equals 0.0.

        Args:
            k: int64 [rows], each from 0 to the row's number of scores; the values are not checked.
            near: fp32 [rows], guesses, such as the last thresholds: they change the time, never the result.

        Returns:
            fp32 [rows]: +inf where k is 0, and 0.0 where the score is -0.0.

        Raises:
            ValueError: where k or near are not as said.
            RuntimeError: where a tensor has moved.
        """
        self._check_places()
        self._check_rows(k, torch.int64)
        self._check_rows(near, torch.float32)
        parts = 1 << LEVELS
        low, high = torch.full_like(near, -math.inf), torch.full_like(near, math.inf)
        probes, counts = near.new_empty(len(near), parts), k.new_zeros(len(k), parts)
        left, self.passes = k.clone(), torch.zeros_like(k)
        self._launch(surround, self._num_rows, k, near, low, probes, parts=parts, num_warps=1)
        for _ in range(PASSES):
            self._launch(
                count_block, len(self._items), self._items, self._rows, self._scores, low, high, probes, counts,
                levels=LEVELS, block=self._block, aligned=self._aligned, num_warps=8,
            )  # fmt: skip
            self._launch(narrow, self._num_rows, low, high, probes, counts, left, self.passes, parts=parts, num_warps=1)
        return low

    def _launch(self, kernel: Any, programs: int, *args: Tensor, **options: Any) -> None:
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device_of(self._items):
            kernel[(programs,)](*args, **options)

    def _found(self) -> list[list[int]]:
        """Addresses of the scores, masks, weights and products; 0 for None."""
        columns = zip(*self._matrices, strict=True)
        return [[0 if tensor is None else tensor.data_ptr() for tensor in column] for column in columns]

    def _to_device(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._matrices[0].scores.device)

    def _check_places(self) -> None:
        if self._found() != self._addresses:
            raise RuntimeError("a tensor has moved in memory: make Matrices anew")

    def _check_rows(self, values: Tensor, dtype: torch.dtype) -> None:
        wanted = dtype, (self._num_rows,), self._items.device
        if (values.dtype, values.shape, values.device) != wanted or not values.is_contiguous():
            found = values.dtype, tuple(values.shape), values.device
            raise ValueError(f"need a contiguous tensor of {wanted}, not one of {found}")


def score_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """Gradient * weight, the straight-through gradient of the scores (TAMT Eq. 4), computed in fp32 in one pass.

    Args:
        gradient: [rows, columns], fp32, bf16 or fp16, of any strides.
        weight: [rows, columns], fp32, bf16 or fp16, contiguous.

    Returns:
        fp32 [rows, columns], contiguous.

    Raises:
        ValueError: where the shapes are not equal and of two dimensions, or the weight is not contiguous.
    """
    if gradient.shape != weight.shape or weight.ndim != 2 or not weight.is_contiguous():
        raise ValueError(f"need two equal [rows, columns], not {tuple(gradient.shape)} and {tuple(weight.shape)}")
    product = torch.empty_like(weight, dtype=torch.float32)
    rows, columns = weight.shape
    with torch.cuda.device_of(weight):
        multiply_tile[(triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))](
            gradient, weight, product, rows, columns, gradient.stride(0), gradient.stride(1), tile=TILE
        )
    return product


def _check(matrix: Matrix, device: torch.device) -> None:
    scores, mask, weight, product = matrix
    for tensor in (tensor for tensor in matrix if tensor is not None):
        if tensor.shape != scores.shape or tensor.device != device or not tensor.is_contiguous():
            raise ValueError("need contiguous tensors, of one shape in a matrix and all on one device")
    if scores.dtype != torch.float32 or (mask is not None and mask.dtype != torch.bool):
        raise ValueError("need fp32 scores and bool masks")
    if product is not None:
        if weight is None or weight.dtype != product.dtype:
            raise ValueError("need with a product its weight, of the same dtype")
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"need weights of fp32, bf16 or fp16, not {weight.dtype}")
