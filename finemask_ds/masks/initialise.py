"""Scores before the first step of mask training; phi is the threshold of TAMT Eq. 3."""

from __future__ import annotations

import torch
from torch import Tensor

from finemask_ds.masks.select import top_k_mask


def binary(mask: Tensor, alpha: float = 2.0, phi: float = 0.01) -> Tensor:
    """alpha * phi where the mask keeps, else 0 (TAMT Eq. 5; Section 4.2.4 for a random mask).

    Args:
        mask: bool [rows, columns].
        alpha: at least 1.
        phi: positive.

    Returns:
        fp32 of the mask's shape and device.
    """
    return torch.where(mask, torch.tensor(alpha * phi, dtype=torch.float32), 0.0)


def ranked(weight: Tensor, mask: Tensor, phi: float = 0.01) -> Tensor:
    """phi * |w| / t, t the smallest positive one of as many magnitudes as are kept, so that those near t flip first.

    The mask is the OMP mask of the weight, or another one whose order the magnitudes give. Scores of at least phi are
    exactly the kept ones, whatever is rounded or tied: a kept score is never below phi, a pruned one never reaches it.

    Args:
        weight: [rows, columns].
        mask: bool of the weight's shape.
        phi: positive.

    Returns:
        fp32 of the weight's shape and device, finite.
    """
    magnitudes = weight.detach().to(torch.float32).abs()
    largest = top_k_mask(magnitudes, int(mask.sum()))
    smallest = torch.where(largest & (magnitudes > 0), magnitudes, torch.inf).amin()
    # In this order w == t gives phi itself; where nothing is kept, t is infinite and every score 0.
    scores = magnitudes / smallest * phi
    border = torch.tensor(phi, dtype=torch.float32, device=weight.device)
    below = torch.nextafter(border, torch.zeros_like(border))
    scores = torch.where(mask, scores.maximum(border), scores.minimum(below))
    return scores.clamp(max=torch.finfo(torch.float32).max)
