"""Which weights of a matrix to keep so that what it computes changes least: a search by swaps, without training.

A matrix W [rows, columns] that reads x is to give y. With a mask M it errs by the sum over tokens of |y - (W * M) x|^2,
which is quadratic in M and known from two sums over tokens alone: gram, of x x^T, and cross, of y x^T. Optimal Brain
Surgeon and its descendants (Hassibi & Stork 1993; SparseGPT, Frantar & Alistarh 2023) minimise it over masks and
weights; here the weights are frozen and the masks alone are searched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from finemask_ds.masks.binarize import masked
from finemask_ds.masks.initialise import ranked

LEAST_FALL = 1e-5
"""A round by which the error falls less, as a share of all weights' own errors, is the last of its size."""


@dataclass
class Reconstruction:
    """A masked matrix and what it errs by.

    Flipping M at (r, c) changes W * M by s W_rc, s = 1 where the weight comes back and -1 where it goes, and so the
    error by 2 s W_rc G_rc + W_rc^2 gram_cc, G = (W * M) gram - cross half its gradient. Rows err independently.
    """

    weight: Tensor
    """fp32 [rows, columns]."""
    gram: Tensor
    """fp32 [columns, columns]: sum over tokens of x x^T, x what the masked model's matrix reads."""
    cross: Tensor
    """fp32 [rows, columns]: sum over tokens of y x^T, y what the matrix is to give, its bias apart."""
    mask: Tensor
    """bool [rows, columns]; a copy of what is given, which ``swap`` changes."""

    def __post_init__(self) -> None:
        self.mask = self.mask.clone()
        self._own = self.weight.square() * self.gram.diag()
        self._gradient = masked(self.weight, self.mask) @ self.gram - self.cross
        # Numbers in place of conditions: on CPUs torch computes with them many times as fast.
        self._twice = self.weight * torch.where(self.mask, -2.0, 2.0)
        self._barred = {kept: torch.where(self.mask == kept, 0.0, torch.inf) for kept in (False, True)}
        num_rows = len(self.weight)
        self._best = {
            kept: (self._own.new_empty(num_rows), self._own.new_empty(num_rows, dtype=torch.int64))
            for kept in (False, True)
        }
        self._look(torch.arange(len(self.weight), device=self.weight.device))

    def error(self) -> Tensor:
        """Scalar: what the mask errs by, less the sum of |y|^2, which no mask changes."""
        return (masked(self.weight, self.mask) * (self._gradient - self.cross)).sum()

    def rises(self) -> Tensor:
        """fp32 [rows, columns]: what the error rises by where one weight is flipped, negative where it falls."""
        return torch.addcmul(self._own, self._twice, self._gradient)

    def swap(self, least_fall: float = LEAST_FALL) -> None:
        """Swap kept weights against others until the error falls no more; as many are kept as before.

        A round takes back the best weight of the rows that want theirs most, at first of half of them, and drops the
        least missed weight of as many rows, the same ones or others: rows which miss more come to keep more.
        """
        num_rows, worth = -(-len(self.weight) // 2), least_fall * float(self._own.sum())
        while num_rows:
            while self._round(num_rows) > worth:
                pass
            num_rows //= 2

    def _round(self, num_rows: int) -> float:
        """Flip one weight back and one away in so many rows each; undone where the error does not fall. Its fall."""
        back, rise_back = self._flip_best(num_rows, kept=False)
        away, rise_away = self._flip_best(len(back[0]), kept=True)
        fall = -float(rise_back + rise_away)
        if fall <= 0:
            self._flip(*away)
            self._flip(*back)
        return fall

    def _flip_best(self, num_rows: int, kept: bool) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Flip the best (not) kept weight of the rows where that costs least."""
        rises, columns = self._best[kept]
        least = rises.topk(num_rows, largest=False)
        rows = least.indices[least.values.isfinite()]  # A row may have none to flip.
        flipped, rise = (rows, columns[rows]), rises[rows].sum()
        self._flip(*flipped)
        return flipped, rise

    def _flip(self, rows: Tensor, columns: Tensor) -> None:
        """Flip one weight in each of these rows."""
        change = self._twice[rows, columns] / 2
        self._gradient.index_add_(0, rows, change[:, None] * self.gram.index_select(0, columns))
        self._twice[rows, columns] = -2 * change
        self.mask[rows, columns] = ~self.mask[rows, columns]
        for kept, barred in self._barred.items():
            barred[rows, columns] = torch.where(self.mask[rows, columns] == kept, 0.0, torch.inf)
        self._look(rows)

    def _look(self, rows: Tensor) -> None:
        """Find these rows' cheapest flips: the kept weight missed least, and the other one that helps most."""
        rises = torch.addcmul(*(one.index_select(0, rows) for one in (self._own, self._twice, self._gradient)))
        for kept, (values, columns) in self._best.items():
            values[rows], columns[rows] = (rises + self._barred[kept].index_select(0, rows)).min(dim=1)

    def sizes(self) -> Tensor:
        """How much each weight is missed: fp32 [rows, columns], at least 1 where it is kept and below 1 elsewhere.

        The root of what the error would rise by without a kept weight, or fall by with another one; see ``ranked``.
        """
        rises = self.rises()
        return ranked(torch.where(self.mask, rises, -rises).clamp(min=0).sqrt(), self.mask, phi=1.0)
