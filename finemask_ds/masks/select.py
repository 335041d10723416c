"""Exact selection: of given scores, the k largest, inside each matrix or over all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from finemask_ds.errors import UserError

SCOPES = ("local", "global")
_SORTED_AT_ONCE = 4_096


class Selection(NamedTuple):
    """What is kept of a matrix."""

    mask: Tensor
    """Bool, of the scores' shape and device."""
    threshold: float
    """Smallest kept score (globally: of all matrices together); infinite where nothing is kept."""


def num_kept(num_weights: int, sparsity: float) -> int:
    """Weights that stay: n - round(S * n), rounded as Python does (an exact half goes to the even number).

    Raises:
        UserError: where the sparsity is not in [0, 1).
    """
    if not 0.0 <= sparsity < 1.0:
        raise UserError(f"sparsity {sparsity} is not in [0, 1): type the share to remove, as 0.7")
    return num_weights - round(sparsity * num_weights)


def magnitudes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|w| in fp32, by name: the scores of magnitude pruning."""
    return {name: weight.detach().float().abs() for name, weight in weights.items()}


def select(
    scores: Mapping[str, Tensor],
    sparsity: float,
    scope: str = "local",
    *,
    within: Mapping[str, Tensor] | None = None,
) -> dict[str, Selection]:
    """Keep the n - round(S * n) largest scores: of each matrix (local), or of all together (global).

    Of equal scores the one earlier in the order of the mapping, then of lower flat index, is kept, so that
    every rank and every machine finds the same mask.

    Args:
        scores: matrix's name -> scores of any shape and real dtype, all on one device.
        sparsity: share of all weights to remove, in [0, 1).
        scope: ``local`` or ``global``.
        within: matrix's name -> bool; what is False there is never kept (iterative pruning).

    Raises:
        UserError: for a sparsity outside [0, 1), an unknown scope, or scores that hold NaN.
        ValueError: where ``within`` leaves fewer weights than are to be kept.
    """
    if scope not in SCOPES:
        raise UserError(f"scope {scope!r} is unknown: type one of {', '.join(SCOPES)}")
    allowed = {name: None if within is None else within[name] for name in scores}
    if scope == "local":
        return {
            name: select_one(values, num_kept(values.numel(), sparsity), within=allowed[name])
            for name, values in scores.items()
        }
    k = num_kept(sum(values.numel() for values in scores.values()), sparsity)
    kept, threshold = _largest([_in_order(values, allowed[name]) for name, values in scores.items()], k)
    return {
        name: Selection(_put_back(part, scores[name], allowed[name]), threshold)
        for name, part in zip(scores, kept, strict=True)
    }


def select_one(scores: Tensor, k: int, *, within: Tensor | None = None) -> Selection:
    """Keep the k largest scores of one tensor; of equal scores those of lower flat index.

    Args:
        scores: any shape and real dtype; infinities rank as numbers do, -0.0 equals 0.0.
        k: how many to keep.
        within: bool of the scores' shape; what is False there is never kept, even below a kept 0 or -inf.

    Raises:
        UserError: where the scores hold NaN.
        ValueError: where there are fewer than k scores to keep.
    """
    (kept,), threshold = _largest([_in_order(scores, within)], k)
    return Selection(_put_back(kept, scores, within), threshold)


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """The mask of ``select_one``: bool of the scores' shape and device, True at the k largest."""
    return select_one(scores, k).mask


def _in_order(scores: Tensor, within: Tensor | None) -> Tensor:
    """The scores that take part, flat; 16-bit ones as fp32, which keeps their order and numpy knows."""
    values = scores.detach()
    values = values.flatten() if within is None else values[within.to(values.device)]
    return values.float() if values.element_size() == 2 else values


def _put_back(kept: Tensor, scores: Tensor, within: Tensor | None) -> Tensor:
    """What was decided on ``_in_order`` in the place where each score came from."""
    if within is None:
        return kept.view(scores.shape)
    mask = torch.zeros_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
    mask[within.to(scores.device)] = kept
    return mask


def _largest(pieces: Sequence[Tensor], k: int) -> tuple[list[Tensor], float]:
    """For each flat piece a bool mask of the k largest of all pieces together, and the smallest of these."""
    number = sum(piece.numel() for piece in pieces)
    if not 0 <= k <= number:
        raise ValueError(f"cannot keep {k} of {number} scores")
    # The largest of all is NaN where any is NaN; finding it allocates nothing.
    if any(piece.numel() and piece.amax().isnan() for piece in pieces):
        raise UserError("the scores hold NaN, which has no rank: lower the learning rate or check the weights")
    if k == 0:
        return [torch.zeros_like(piece, dtype=torch.bool) for piece in pieces], math.inf
    threshold: Any
    if pieces[0].device.type == "cpu":  # numpy compares three times as fast as torch
        arrays = [piece.numpy() for piece in pieces]
        threshold = _kth_largest(arrays, k)
        kept = [torch.from_numpy(array >= threshold) for array in arrays]
    else:
        threshold = torch.cat(list(pieces)).kthvalue(number - k + 1).values
        kept = [piece >= threshold for piece in pieces]
    surplus = sum(int(mask.count_nonzero()) for mask in kept) - k
    for piece, mask in zip(reversed(pieces), reversed(kept), strict=True):
        if surplus:  # more scores equal the threshold than there is room for: the last ones go
            ties = (piece == threshold.item()).nonzero().flatten()[-surplus:]
            mask[ties] = False
            surplus -= ties.numel()
    return kept, float(threshold)


def _kth_largest(pieces: Sequence[numpy.ndarray], k: int) -> numpy.generic:
    """The k-th largest value of all flat pieces together.

    Floyd and Rivest's selection (1975): two values of a sorted sample most likely have the k-th largest
    between them, and only what lies between them, some per cent, is looked at again. On 30,522 x 768 values
    that takes a quarter of the time of ``numpy.partition``. Where the sample misleads, the side that holds
    the answer is looked at instead; each round leaves out the two values themselves, so it ends.
    """
    number = sum(piece.size for piece in pieces)
    if number <= _SORTED_AT_ONCE:
        return numpy.sort(numpy.concatenate(pieces))[number - k]
    low, high = _bracket(pieces, number, k)
    reach_high = sum(int(numpy.count_nonzero(piece >= high)) for piece in pieces)
    if k <= reach_high:
        above = [piece[piece > high] for piece in pieces]
        return _kth_largest(above, k) if k <= _size(above) else high
    # Through indices, which is faster than a bool index where little is taken.
    between = [piece[numpy.flatnonzero((piece > low) & (piece < high))] for piece in pieces]
    if k <= reach_high + _size(between):
        return _kth_largest(between, k - reach_high)
    below = [piece[piece < low] for piece in pieces]
    reach_low = number - _size(below)
    return low if k <= reach_low else _kth_largest(below, k - reach_low)


def _bracket(pieces: Sequence[numpy.ndarray], number: int, k: int) -> tuple[numpy.generic, numpy.generic]:
    """Two values around the k-th largest's place in a sorted sample of about number ** (2/3) values.

    They stand four standard deviations of that place, or more, to either side of it.
    """
    # An odd stride: one that divides the rows' length would look at some columns only.
    stride = round(number ** (1 / 3)) | 1
    sample = numpy.sort(numpy.concatenate([piece[::stride] for piece in pieces]))
    place = (number - k) * sample.size // number
    margin = 2 * math.isqrt(sample.size)
    return sample[max(place - margin, 0)], sample[min(place + margin, sample.size - 1)]


def _size(pieces: Sequence[numpy.ndarray]) -> int:
    return sum(piece.size for piece in pieces)
