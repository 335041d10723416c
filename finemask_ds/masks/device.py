"""Exact selection step after step where the scores lie, on an accelerator: one pass over them while none crosses."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from finemask_ds.masks.matrices import Matrices, Matrix
from finemask_ds.masks.select import num_kept, select, select_one


class DeviceSelection:
    """Keeps masks, and W * M beside them, the exact selection of scores that an optimizer moves.

    The same bits as ``select``, but that scores are not searched for NaN.
    """

    def __init__(self, matrices: Mapping[str, Matrix], sparsity: float, scope: str):
        """Take the tensors of each matrix, by name; they must stay where they are.

        Args:
            matrices: each with its mask, and with weight and product where W * M is kept.
            sparsity: share of all weights to remove, in [0, 1).
            scope: ``local`` ranks inside each matrix, ``global`` over all.
        """
        self._matrices, self._sparsity, self._scope = dict(matrices), sparsity, scope
        self._tables = Matrices(list(matrices.values()), scope)
        sizes = [matrix.scores.numel() for matrix in matrices.values()]
        self._wanted = [num_kept(size, sparsity) for size in ([sum(sizes)] if scope == "global" else sizes)]
        device = next(iter(matrices.values())).scores.device
        self._k = torch.tensor(self._wanted, device=device)

    def renew(self, near: Mapping[str, float]) -> dict[str, float]:
        """Write the masks and products; the host waits for one count per matrix, or two where a score has crossed.

        Args:
            near: name -> the last threshold.

        Returns:
            Name -> the threshold: the last one where it still parts the kept from the others, else the smallest kept.
        """
        guesses = [near[name] for name in self._matrices][: len(self._wanted)]
        thresholds = torch.tensor(guesses, dtype=torch.float32, device=self._k.device)
        if self._surplus(self._tables.refresh(thresholds)) != [0] * len(self._wanted):
            thresholds = self._tables.kth_largest(self._k, thresholds)
            self._drop_ties(self._surplus(self._tables.refresh(thresholds)))
        found = thresholds.tolist()
        return dict(zip(self._matrices, found * len(self._matrices) if self._scope == "global" else found, strict=True))

    def _surplus(self, counts: torch.Tensor) -> list[int]:
        """Of each row, how many more are kept than are wanted."""
        found = counts.tolist()
        rows = [sum(found)] if self._scope == "global" else found
        return [kept - wanted for kept, wanted in zip(rows, self._wanted, strict=True)]

    def _drop_ties(self, surplus: list[int]) -> None:
        """Where more scores equal a threshold than there is room for, which is rare, select as elsewhere."""
        if self._scope == "global":
            if surplus[0]:
                scores = {name: matrix.scores for name, matrix in self._matrices.items()}
                for name, selection in select(scores, self._sparsity, "global").items():
                    _write(self._matrices[name], selection.mask)
            return
        for matrix, too_many, wanted in zip(self._matrices.values(), surplus, self._wanted, strict=True):
            if too_many:
                _write(matrix, select_one(matrix.scores, wanted).mask)


def _write(matrix: Matrix, mask: torch.Tensor) -> None:
    assert matrix.mask is not None
    matrix.mask.copy_(mask)
    if matrix.product is not None and matrix.weight is not None:
        matrix.product.copy_(torch.where(mask, matrix.weight, 0.0))
