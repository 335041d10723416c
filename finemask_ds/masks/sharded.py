"""Exact selection over scores that no rank holds whole: each counts its own piece, and only counts travel.

The threshold is found digit by digit. A float's bits, read as an integer, rank as the float does; the ranks add up how
many scores have each leading digit (11 bits), which tells the digit of the k-th largest, and only the scores with that
digit are looked at again: three sums over the ranks, of at most 2,048 counts for each threshold that is sought, and a
few short ones. Where the threshold of a step ago is known, only the scores about it are looked at more than once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from finemask_ds.errors import UserError
from finemask_ds.masks.select import ABOUT, NAN, has_nan, num_kept, places

DIGITS = ((21, 11), (10, 11), (0, 10))
"""Shift and width in bits of each digit of a 32-bit key, from the highest."""


@dataclass(frozen=True)
class Shards:
    """The ranks among which the scores are divided; rank r's piece of a matrix precedes rank r + 1's."""

    rank: int
    size: int
    sum: Callable[[Tensor], Tensor]
    """int64 of any shape -> its sum over the ranks, on every rank."""


def select_sharded(
    pieces: Mapping[str, Tensor],
    num_weights: Mapping[str, int],
    sparsity: float,
    scope: str,
    shards: Shards,
    *,
    within: Mapping[str, Tensor] | None = None,
    near: Mapping[str, float] | None = None,
) -> dict[str, tuple[Tensor, float]]:
    """The part of ``masks.select.select`` that falls on this rank's pieces: the same bits as for whole matrices.

    Args:
        pieces: matrix's name -> fp32 [n], this rank's run of its flat scores (may be empty); the same names in the
            same order on every rank.
        num_weights: matrix's name -> scores on all ranks together.
        sparsity: share to remove, in [0, 1).
        scope: ``local`` ranks inside each matrix, ``global`` over all.
        shards: the ranks.
        within: matrix's name -> bool [n]; what is False there is never kept.
        near: matrix's name -> a threshold that was right a step ago; see ``select``.

    Returns:
        Matrix's name -> bool [n], kept, and the smallest kept score of its threshold's scope (infinite: none kept),
        or ``near`` where that still parts the kept from the others in all matrices.

    Raises:
        UserError: for a sparsity outside [0, 1) or scores that hold NaN, on every rank.
        ValueError: where ``within`` leaves fewer scores than are to be kept, on every rank.
    """
    names = list(pieces)
    rows = [0] * len(names) if scope == "global" else list(range(len(names)))
    if scope == "global":
        wanted = [num_kept(sum(num_weights.values()), sparsity)]
    else:
        wanted = [num_kept(num_weights[name], sparsity) for name in names]
    _refuse_nan([pieces[name] for name in names], shards)
    if near is not None and (still := _still_kept(pieces, within, near, rows, wanted, shards)):
        return {name: (kept, near[name]) for name, kept in still.items()}
    candidates = [_Candidates(pieces[name], None if within is None else within[name]) for name in names]
    left = torch.tensor(wanted)
    if near is not None:
        left = _leave_about([near[name] for name in names], candidates, rows, left, shards)
    prefix = torch.zeros(len(wanted), dtype=torch.int64)
    for shift, width in DIGITS:
        counts = torch.stack([part.count(shift, width) for part in candidates])
        if scope == "global":
            counts = counts.sum(0, keepdim=True)
        digit, left = _digit_of_kth(shards.sum(counts).cpu(), left)
        prefix = (prefix << width) + digit
        for row, part in zip(rows, candidates, strict=True):
            part.narrow(shift, width, int(digit[row]))
    ties = _ties_kept([part.number for part in candidates], rows, left, shards, device=candidates[0].device)
    kept = {}
    for name, row, part, number in zip(names, rows, candidates, ties, strict=True):
        key = int(prefix[row]) - (1 << 31)
        kept[name] = part.kept(number), _value(key) if wanted[row] else math.inf
    return kept


def _still_kept(
    pieces: Mapping[str, Tensor],
    within: Mapping[str, Tensor] | None,
    near: Mapping[str, float],
    rows: Sequence[int],
    wanted: Sequence[int],
    shards: Shards,
) -> dict[str, Tensor] | None:
    """What is kept by the old thresholds, where that is as much as is wanted in every row."""
    kept = {name: piece >= near[name] for name, piece in pieces.items()}
    if within is not None:
        kept = {name: mask & within[name] for name, mask in kept.items()}
    counts = torch.stack([mask.count_nonzero() for mask in kept.values()])
    totals = torch.zeros(len(wanted), dtype=torch.int64, device=counts.device)
    totals.index_add_(0, torch.tensor(rows, device=counts.device), counts)
    return kept if shards.sum(totals).tolist() == list(wanted) else None


def _leave_about(
    near: Sequence[float], candidates: Sequence[_Candidates], rows: Sequence[int], left: Tensor, shards: Shards
) -> Tensor:
    """Leave in question, in each row where the threshold is among them, the scores about the old one and no others.

    Returns:
        int64 [rows]: how many of those in question are still to be kept.
    """
    about = [
        part.between(old - ABOUT * abs(old), old + ABOUT * abs(old)) for part, old in zip(candidates, near, strict=True)
    ]
    numbers = torch.tensor([[int(some.above.count_nonzero()), some.places.numel()] for some in about])
    totals = torch.zeros(len(left), 2, dtype=torch.int64).index_add_(0, torch.tensor(rows), numbers)
    above, inside = shards.sum(totals.to(candidates[0].device)).cpu().unbind(1)
    found = (above < left) & (left <= above + inside)
    for row, part, some in zip(rows, candidates, about, strict=True):
        if found[row]:
            part.leave(some)
    return left - above * found


class _Between(NamedTuple):
    """The scores of a piece between two values, and those above."""

    above: Tensor
    """Bool of the piece."""
    places: Tensor
    """int64 [n]: where those between stand, in order."""
    keys: Tensor
    """int32 [n]: theirs."""


class _Candidates:
    """A piece's scores in question: all, then those about a value or that share the digits found so far."""

    def __init__(self, scores: Tensor, within: Tensor | None):
        self._scores, self._within = scores.detach(), within
        self._left: _Between | None = None
        """The few that are left; None: all are in question."""

    @property
    def device(self) -> torch.device:
        return self._scores.device

    @property
    def number(self) -> int:
        return self._all().numel() if self._left is None else self._left.keys.numel()

    def between(self, low: float, end: float) -> _Between:
        """Those from low to below the end; an end that is no number bounds nothing."""
        above, reach = self._scores >= end, ~(self._scores < low)
        if self._within is not None:
            above, reach = above & self._within, reach & self._within
        at = places(reach ^ above)
        return _Between(above, at, _keys(self._scores[at]))

    def leave(self, some: _Between) -> None:
        """Ask only about some from now on; those above them are kept."""
        self._left = some

    def count(self, shift: int, width: int) -> Tensor:
        """int64 [2 ** width]: candidates with each digit."""
        if self._left is not None:
            return torch.bincount(_digit(self._left.keys, shift, width), minlength=1 << width)
        half = 1 << (width - 1)
        # Straight from the bits, where negative scores stand in the order of their magnitudes: their half is turned.
        raw = torch.bincount((_bits(self._all()) >> shift) + half, minlength=1 << width)
        return torch.cat([raw[:half].flip(0), raw[half:]])

    def narrow(self, shift: int, width: int, digit: int) -> None:
        """Leave the candidates with this digit; those with a higher one are kept."""
        if self._left is None:
            first = (digit - (1 << (width - 1))) << shift
            low, end = _value(first), _value(first + (1 << shift))
            # The outermost digits hold the infinities, and beyond them only what is no number.
            self.leave(self.between(low, end))
            return
        above, at, keys = self._left
        digits = _digit(keys, shift, width)
        above[at[digits > digit]] = True
        same = digits == digit
        self.leave(_Between(above, at[same], keys[same]))

    def kept(self, ties: int) -> Tensor:
        """Bool of the piece: what is above those left, which are equal, and the first ``ties`` of them."""
        assert self._left is not None
        self._left.above[self._left.places[:ties]] = True
        return self._left.above

    def _all(self) -> Tensor:
        # Anew where it is needed, so that one matrix's is held and not those of all.
        return self._scores if self._within is None else self._scores[self._within]


def pack(kept: Tensor, num_bytes: int) -> Tensor:
    """Bool [n] -> uint8 [num_bytes] on its device, in little bit order, padded with zeros."""
    bits = kept.new_zeros(num_bytes * 8, dtype=torch.bool)
    bits[: kept.numel()] = kept
    # Eight bools are the lowest bits of an integer's bytes; the product brings all of them into its highest byte.
    return (bits.view(torch.int64) * 0x0102_0408_1020_4080 >> 56).to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """uint8 [..., bytes] -> bool [..., 8 * bytes]."""
    eight = _eight_bools(packed.device).index_select(0, packed.int().flatten())
    return eight.view(packed.shape).view(torch.bool)


@cache
def _eight_bools(device: torch.device) -> Tensor:
    """int64 [256]: eight bools in the memory of one number, for each byte of as many bits."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return bits.bool().view(torch.int64).flatten()


def _refuse_nan(pieces: Sequence[Tensor], shards: Shards) -> None:
    if shards.sum(torch.stack([has_nan(piece) for piece in pieces]).any().long()).item():
        raise UserError(NAN)


def _bits(scores: Tensor) -> Tensor:
    """The bits of fp32 scores as int32, with those of 0.0 for -0.0."""
    return (scores + 0.0).view(torch.int32)


def _keys(scores: Tensor) -> Tensor:
    """int32 that rank as the fp32 scores do."""
    bits = _bits(scores)
    return torch.where(bits < 0, bits ^ 0x7FFF_FFFF, bits)


def _value(key: int) -> float:
    """The fp32 score of a key."""
    return torch.tensor(key ^ 0x7FFF_FFFF if key < 0 else key, dtype=torch.int32).view(torch.float32).item()


def _digit(keys: Tensor, shift: int, width: int) -> Tensor:
    """A digit of each key, int32 in [0, 2 ** width): the highest one carries the sign and is moved up."""
    digits = keys >> shift
    return digits + (1 << (width - 1)) if shift + width == 32 else digits & ((1 << width) - 1)


def _digit_of_kth(counts: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the digit of its ``left``-th largest key, and how many of that digit are still to be kept.

    Args:
        counts: int64 [rows, digits].
        left: int64 [rows]; a row that keeps nothing gets its largest key's digit, which nothing exceeds.

    Raises:
        ValueError: where a row has fewer keys than it is to keep.
    """
    if (counts.sum(1) < left).any():
        raise ValueError(f"cannot keep {left.tolist()} of {counts.sum(1).tolist()} scores")
    from_top = counts.flip(1).cumsum(1)
    place = torch.searchsorted(from_top, left.clamp(min=1)[:, None]).clamp(max=counts.shape[1] - 1)
    above = torch.where(place > 0, from_top.gather(1, (place - 1).clamp(min=0)), 0).squeeze(1)
    return counts.shape[1] - 1 - place.squeeze(1), left - torch.where(left > 0, above, 0)


def _ties_kept(
    numbers: Sequence[int], rows: Sequence[int], left: Tensor, shards: Shards, device: torch.device
) -> list[int]:
    """How many of this rank's scores at the threshold stay: those first in the order of matrix, rank and flat index."""
    table = torch.zeros(len(numbers), shards.size, dtype=torch.int64, device=device)
    table[:, shards.rank] = torch.tensor(numbers, device=device)
    kept, room = [], left.tolist()
    for row, counts in zip(rows, shards.sum(table).tolist(), strict=True):
        for rank, count in enumerate(counts):
            here = min(count, room[row])
            room[row] -= here
            if rank == shards.rank:
                kept.append(here)
    return kept
