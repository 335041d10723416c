"""Exact selection: of given scores, the k largest, inside each matrix or over all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from finemask_ds.errors import UserError

SCOPES = ("local", "global")
ABOUT = 1 / 32
"""Share of an old threshold by which a new one is first sought to either side of it."""
NAN = "the scores hold NaN, which has no rank: lower the learning rate or check the weights"
_SORTED_AT_ONCE = 4_096


class Selection(NamedTuple):
    """What is kept of a matrix."""

    mask: Tensor
    """Bool, of the scores' shape and device."""
    threshold: float
    """Smallest kept score (globally: of all matrices together); infinite where nothing is kept; see ``near``."""


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
    near: Mapping[str, float] | None = None,
) -> dict[str, Selection]:
    """Keep the n - round(S * n) largest scores: of each matrix (local), or of all together (global).

    Of equal scores the one earlier in the order of the mapping, then of lower flat index, is kept, so that
    every rank and every machine finds the same mask.

    Args:
        scores: matrix's name -> scores of any shape and real dtype, all on one device.
        sparsity: share of all weights to remove, in [0, 1).
        scope: ``local`` or ``global``.
        within: matrix's name -> bool; what is False there is never kept (iterative pruning).
        near: matrix's name -> a threshold that was right a step ago. The masks are the same with it; where it still
            parts the kept from the others, finding that out is all the work, and it is the selection's threshold.

    Raises:
        UserError: for a sparsity outside [0, 1), an unknown scope, or scores that hold NaN.
        ValueError: where ``within`` leaves fewer weights than are to be kept.
    """
    if scope not in SCOPES:
        raise UserError(f"scope {scope!r} is unknown: type one of {', '.join(SCOPES)}")
    allowed = {name: None if within is None else within[name] for name in scores}
    if scope == "local":

        def select_named(name: str) -> Selection:
            k = num_kept(scores[name].numel(), sparsity)
            return select_one(scores[name], k, within=allowed[name], near=near[name] if near else None)

        # numpy computes without holding the interpreter, so that as many matrices at once as torch may use threads.
        # Whatever of torch's ran in such a thread would start as many of its own; what ``within`` needs is torch's.
        with ThreadPoolExecutor(torch.get_num_threads() if within is None else 1) as threads:
            return dict(zip(scores, threads.map(select_named, scores), strict=True))
    k = num_kept(sum(values.numel() for values in scores.values()), sparsity)
    # One threshold serves all matrices, whichever name it is asked for by.
    guess = next(iter(near.values())) if near else None
    kept, threshold = _largest([_in_order(values, allowed[name]) for name, values in scores.items()], k, guess)
    return {
        name: Selection(_put_back(part, scores[name], allowed[name]), threshold)
        for name, part in zip(scores, kept, strict=True)
    }


def select_one(scores: Tensor, k: int, *, within: Tensor | None = None, near: float | None = None) -> Selection:
    """Keep the k largest scores of one tensor; of equal scores those of lower flat index.

    Args:
        scores: any shape and real dtype; infinities rank as numbers do, -0.0 equals 0.0.
        k: how many to keep.
        within: bool of the scores' shape; what is False there is never kept, even below a kept 0 or -inf.
        near: a guess of the threshold; see ``select``.

    Raises:
        UserError: where the scores hold NaN.
        ValueError: where there are fewer than k scores to keep.
    """
    (kept,), threshold = _largest([_in_order(scores, within)], k, near)
    return Selection(_put_back(kept, scores, within), threshold)


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """The mask of ``select_one``: bool of the scores' shape and device, True at the k largest."""
    return select_one(scores, k).mask


def places(flags: Tensor) -> Tensor:
    """Bool [n] -> int64, the indices where it is True, in order."""
    if flags.device.type == "cpu":  # where little is True, a hundred times as fast as torch
        return torch.from_numpy(numpy.flatnonzero(flags.numpy()))
    return flags.nonzero().flatten()


def drop_ties(scores: Sequence[Tensor], masks: Sequence[Tensor], threshold: float, surplus: int) -> None:
    """Where more scores equal the threshold than there is room for, let the last ``surplus`` of them go, in place."""
    for values, mask in zip(reversed(scores), reversed(masks), strict=True):
        if surplus:
            ties = places((values.detach() == threshold).flatten())[-surplus:]
            mask.view(-1)[ties] = False
            surplus -= ties.numel()


def has_nan(scores: Tensor) -> Tensor:
    """Bool scalar on the scores' device; the largest of all is NaN where any is, and finding it allocates nothing."""
    return scores.amax().isnan() if scores.numel() else torch.zeros((), dtype=torch.bool, device=scores.device)


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


def _largest(pieces: Sequence[Tensor], k: int, near: float | None) -> tuple[list[Tensor], float]:
    """For each flat piece a bool mask of the k largest of all pieces together, and a threshold of them."""
    number = sum(piece.numel() for piece in pieces)
    if not 0 <= k <= number:
        raise ValueError(f"cannot keep {k} of {number} scores")
    if pieces[0].device.type == "cpu":  # numpy compares and counts faster than torch
        kept, threshold = _largest_arrays([piece.numpy() for piece in pieces], k, near)
        return [torch.from_numpy(part) for part in kept], float(threshold)
    if any(map(has_nan, pieces)):
        raise UserError(NAN)
    if k == 0:
        return [torch.zeros_like(piece, dtype=torch.bool) for piece in pieces], math.inf
    value = torch.cat(list(pieces)).kthvalue(number - k + 1).values
    masks = [piece >= value for piece in pieces]
    drop_ties(pieces, masks, float(value), sum(int(mask.count_nonzero()) for mask in masks) - k)
    return masks, float(value)


def _largest_arrays(pieces: Sequence[numpy.ndarray], k: int, near: float | None) -> tuple[list[numpy.ndarray], Any]:
    """``_largest`` of flat arrays.

    Every score is compared with two values, between which the k-th largest lies; only those between are ranked.
    """
    if any(piece.size and numpy.isnan(piece.max()) for piece in pieces):
        raise UserError(NAN)
    if k == 0:
        return [numpy.zeros(piece.shape, dtype=bool) for piece in pieces], math.inf
    if near is None:
        low, high = _bracket(pieces, _size(pieces), k)
        kept, reach = _reaching(pieces, high), _reaching(pieces, low)
    else:
        kept = reach = _reaching(pieces, near)
        if (number := _count(kept)) == k:  # No score has crossed it.
            return kept, near
        if number > k:
            kept = _reaching(pieces, near + ABOUT * abs(near))
        else:
            reach = _reaching(pieces, near - ABOUT * abs(near))
    if not _count(kept) < k <= _count(reach):  # The sample has misled, or much is equal.
        low = _kth_largest(pieces, k)
        kept, reach = [piece > low for piece in pieces], [piece >= low for piece in pieces]
    return kept, _fill(kept, reach, pieces, k - _count(kept))


def _fill(
    kept: Sequence[numpy.ndarray], reach: Sequence[numpy.ndarray], pieces: Sequence[numpy.ndarray], room: int
) -> Any:
    """Keep also, in place, the ``room`` largest of the scores that reach but are not kept yet; the smallest of them."""
    # Through indices, which is faster than a bool index where little is taken.
    at = [numpy.flatnonzero(upper ^ lower) for upper, lower in zip(kept, reach, strict=True)]
    between = numpy.concatenate([piece[of] for piece, of in zip(pieces, at, strict=True)])
    threshold = numpy.partition(between, between.size - room)[between.size - room]
    chosen = between > threshold
    ties = numpy.flatnonzero(between == threshold)
    chosen[ties[: room - int(numpy.count_nonzero(chosen))]] = True
    parts = numpy.split(chosen, numpy.cumsum([of.size for of in at])[:-1])
    for upper, of, part in zip(kept, at, parts, strict=True):
        upper[of[part]] = True
    return threshold


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
    reach_high = _count(_reaching(pieces, high))
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


def _reaching(pieces: Sequence[numpy.ndarray], value: numpy.generic | float) -> list[numpy.ndarray]:
    return [piece >= value for piece in pieces]


def _count(masks: Sequence[numpy.ndarray]) -> int:
    return sum(int(numpy.count_nonzero(mask)) for mask in masks)


def _size(pieces: Sequence[numpy.ndarray]) -> int:
    return sum(piece.size for piece in pieces)
