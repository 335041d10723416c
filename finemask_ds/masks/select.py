"""Exact selection: of given scores, the k largest, inside each matrix or over all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
_CHUNK = 1 << 20
Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""``map``, or that of a pool of threads."""


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
    # numpy computes without holding the interpreter, so that as many matrices at once as torch may use threads.
    if scope == "local":

        def select_named(name: str) -> Selection:
            k = num_kept(scores[name].numel(), sparsity)
            return select_one(scores[name], k, within=allowed[name], near=near[name] if near else None)

        # Whatever of torch's ran in such a thread would start as many of its own; what ``within`` needs is torch's.
        with ThreadPoolExecutor(torch.get_num_threads() if within is None else 1) as threads:
            return dict(zip(scores, threads.map(select_named, scores), strict=True))
    k = num_kept(sum(values.numel() for values in scores.values()), sparsity)
    # One threshold serves all matrices, whichever name it is asked for by.
    guess = next(iter(near.values())) if near else None
    pieces = [_in_order(values, allowed[name]) for name, values in scores.items()]
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        kept, threshold = _largest(pieces, k, guess, threads.map)
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


def _largest(pieces: Sequence[Tensor], k: int, near: float | None, each: Each = map) -> tuple[list[Tensor], float]:
    """For each flat piece a bool mask of the k largest of all pieces together, and a threshold of them."""
    number = sum(piece.numel() for piece in pieces)
    if not 0 <= k <= number:
        raise ValueError(f"cannot keep {k} of {number} scores")
    if pieces[0].device.type == "cpu":  # numpy compares and counts faster than torch
        kept, threshold = _largest_arrays([piece.numpy() for piece in pieces], k, near, each)
        return [torch.from_numpy(part) for part in kept], float(threshold)
    if any(map(has_nan, pieces)):
        raise UserError(NAN)
    if k == 0:
        return [torch.zeros_like(piece, dtype=torch.bool) for piece in pieces], math.inf
    value = torch.cat(list(pieces)).kthvalue(number - k + 1).values
    masks = [piece >= value for piece in pieces]
    drop_ties(pieces, masks, float(value), sum(int(mask.count_nonzero()) for mask in masks) - k)
    return masks, float(value)


def _largest_arrays(
    pieces: Sequence[numpy.ndarray], k: int, near: float | None, each: Each
) -> tuple[list[numpy.ndarray], Any]:
    """``_largest`` of flat arrays; ``each`` maps over chunks of them.

    Every score is compared with two values, between which the k-th largest lies; only those between are ranked. NaN,
    which neither reaches a value nor is below it, is among them, so that a first selection needs no search for it.
    """
    if k == 0 or near is not None:
        _refuse_nan(pieces, each)
    if k == 0:
        return [numpy.zeros(piece.shape, dtype=bool) for piece in pieces], math.inf
    kept = [numpy.empty(piece.shape, dtype=bool) for piece in pieces]
    chunks = [Chunk(*views) for both in zip(pieces, kept, strict=True) for views in zip(*map(_cut, both), strict=True)]
    low: Any
    high: Any
    if near is None:
        low, high = _bracket(pieces, _size(pieces), k)
    else:
        if (number := sum(each(lambda chunk: chunk.keep(numpy.greater_equal, near), chunks))) == k:
            return kept, near  # No score has crossed it.
        reach = ABOUT * abs(near)
        low, high = (near, near + reach) if number > k else (near - reach, near)
    number, between = _part(chunks, low, numpy.greater_equal, high, each)
    if not number < k <= number + _size(between):  # The sample has misled, or much is equal.
        _refuse_nan(pieces, each)
        low = _kth_largest(pieces, k)
        number, between = _part(chunks, low, numpy.greater, low, each)
    return kept, _fill(chunks, between, k - number)


class Chunk(NamedTuple):
    """Scores that are compared at once: few enough to stay in a core's cache between two comparisons."""

    scores: numpy.ndarray
    kept: numpy.ndarray
    """Bool, written in place."""

    def keep(self, compare: numpy.ufunc, value: Any) -> int:
        """Keep the scores that compare so with a value, and no others; how many."""
        return int(numpy.count_nonzero(compare(self.scores, value, out=self.kept)))


def _cut(values: numpy.ndarray) -> list[numpy.ndarray]:
    return [values[start : start + _CHUNK] for start in range(0, values.size, _CHUNK)]


def _part(
    chunks: Sequence[Chunk], low: Any, compare: numpy.ufunc, high: Any, each: Each
) -> tuple[int, list[numpy.ndarray]]:
    """Keep what compares so with ``high``: how many; and of each chunk where what is neither kept nor below stands."""

    def part(chunk: Chunk) -> tuple[int, numpy.ndarray]:
        # As indices, which is faster than a bool index where little is taken. No score is kept and below.
        return chunk.keep(compare, high), numpy.flatnonzero(chunk.kept == (chunk.scores < low))

    numbers, between = zip(*each(part, chunks), strict=True)
    return sum(numbers), list(between)


def _fill(chunks: Sequence[Chunk], between: Sequence[numpy.ndarray], room: int) -> Any:
    """Keep also the ``room`` largest of the scores between, of equal ones the first; the smallest of them."""
    scores = numpy.concatenate([chunk.scores[at] for chunk, at in zip(chunks, between, strict=True)])
    _refuse_nan([scores])
    threshold = numpy.partition(scores, scores.size - room)[scores.size - room]
    chosen = scores > threshold
    ties = numpy.flatnonzero(scores == threshold)
    chosen[ties[: room - int(numpy.count_nonzero(chosen))]] = True
    parts = numpy.split(chosen, numpy.cumsum([at.size for at in between])[:-1])
    for chunk, at, part in zip(chunks, between, parts, strict=True):
        chunk.kept[at[part]] = True
    return threshold


def _refuse_nan(pieces: Sequence[numpy.ndarray], each: Each = map) -> None:
    """Raise the UserError where a score is NaN, which the largest of all then is."""
    if any(each(lambda piece: piece.size and numpy.isnan(piece.max()), pieces)):
        raise UserError(NAN)


def _kth_largest(pieces: Sequence[numpy.ndarray], k: int) -> numpy.generic:
    """The k-th largest value of all flat pieces together.

    Floyd and Rivest's selection (1975): two values of a sorted sample most likely have the k-th largest
    between them, and only what lies between them, some per cent, is looked at again. On 30,522 x 768 values
    that takes a quarter of the time of ``numpy.partition``. Where the sample misleads, the side that holds
    the answer is looked at instead; each round leaves out the two values themselves, so it ends.
    """
    number = _size(pieces)
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

    They stand three standard deviations of that place, or more, to either side of it.
    """
    # An odd stride: one that divides the rows' length would look at some columns only.
    stride = round(number ** (1 / 3)) | 1
    sample = numpy.sort(numpy.concatenate([piece[::stride] for piece in pieces]))
    place = (number - k) * sample.size // number
    margin = 3 * math.isqrt(sample.size) // 2
    return sample[max(place - margin, 0)], sample[min(place + margin, sample.size - 1)]


def _size(pieces: Sequence[numpy.ndarray]) -> int:
    return sum(piece.size for piece in pieces)
