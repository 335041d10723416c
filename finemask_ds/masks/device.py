"""Exact selection step after step where the scores lie, on an accelerator: one pass over them while none crosses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from finemask_ds.errors import UserError
from finemask_ds.masks.matrices import Matrices, Matrix
from finemask_ds.masks.select import NAN, drop_ties, num_kept


class DeviceSelection:
    """Keeps masks, and W * M beside them, the exact selection of scores that an optimizer moves.

    The same bits as ``select``, but that scores are not searched for NaN: it is noticed where it lets too few be kept.
    """

    def __init__(self, matrices: Mapping[str, Matrix], sparsity: float, scope: str):
        """Take the tensors of each matrix, by name; they must stay where they are.

        Args:
            matrices: each with its mask, and with weight and product where W * M is kept.
            sparsity: share of all weights to remove, in [0, 1).
            scope: ``local`` ranks inside each matrix, ``global`` over all.
        """
        self._matrices = dict(matrices)
        self._rows = [list(matrices)] if scope == "global" else [[name] for name in matrices]
        """What is ranked together, by name."""
        self._tables = Matrices(list(matrices.values()), scope)
        sizes = [sum(matrices[name].scores.numel() for name in row) for row in self._rows]
        self._wanted = [num_kept(size, sparsity) for size in sizes]
        self._k = torch.tensor(self._wanted, device=next(iter(matrices.values())).scores.device)

    def renew(self, near: Mapping[str, float]) -> dict[str, float]:
        """Write the masks and products; the host waits for one count per matrix, or two where a score has crossed.

        Args:
            near: name -> the last threshold.

        Returns:
            Name -> the threshold: the last one where it still parts the kept from the others, else the smallest kept.

        Raises:
            UserError: where NaN among the scores leaves fewer than are to be kept.
        """
        thresholds = torch.tensor([near[row[0]] for row in self._rows], dtype=torch.float32, device=self._k.device)
        if any(self._refreshed(thresholds)):
            thresholds = self._tables.kth_largest(self._k, thresholds)
            surplus = self._refreshed(thresholds)
            if any(too_many < 0 for too_many in surplus):  # The k-th largest has fewer than k at or above it.
                raise UserError(NAN)
            self._drop_ties(thresholds.tolist(), surplus)
        found = thresholds.tolist()
        return {name: threshold for row, threshold in zip(self._rows, found, strict=True) for name in row}

    def _refreshed(self, thresholds: torch.Tensor) -> list[int]:
        """Write the masks and products; of each row, how many more are kept than are wanted."""
        counts = dict(zip(self._matrices, self._tables.refresh(thresholds).tolist(), strict=True))
        kept = [sum(counts[name] for name in row) for row in self._rows]
        return [number - wanted for number, wanted in zip(kept, self._wanted, strict=True)]

    def _drop_ties(self, thresholds: Sequence[float], surplus: Sequence[int]) -> None:
        """Where more scores equal a threshold than there is room for, which is rare, the last ones go."""
        for names, threshold, too_many in zip(self._rows, thresholds, surplus, strict=True):
            row = [self._matrices[name] for name in names]
            drop_ties(
                [matrix.scores for matrix in row],
                [matrix.mask for matrix in row if matrix.mask is not None],
                threshold,
                too_many,
            )
            for matrix in row:
                if too_many and matrix.product is not None and matrix.mask is not None:
                    matrix.product.masked_fill_(~matrix.mask, 0.0)
