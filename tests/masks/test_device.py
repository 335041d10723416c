"""The selection that accelerators make, step after step, against ``select``; here in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from finemask_ds.errors import UserError
from finemask_ds.masks.device import DeviceSelection
from finemask_ds.masks.matrices import Matrix
from finemask_ds.masks.select import select
from tests.masks.test_select import random_matrices

DEVICES = ["cpu" if not torch.cuda.is_available() else pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scope", ["local", "global"])
def test_masks_and_products_follow_scores_that_move(scope: str, device: str) -> None:
    """Steps of no, small and large moves, some with many ties: bit for bit the plain path's masks and W * M."""
    draw = torch.Generator().manual_seed(0)
    scores = {name: values.to(device) for name, values in random_matrices().items()}
    weights = {name: torch.randn(values.shape, generator=draw).to(device) for name, values in scores.items()}
    masks = {name: torch.zeros_like(values, dtype=torch.bool) for name, values in scores.items()}
    products = {name: torch.full_like(weight, 7.0) for name, weight in weights.items() if name != "a"}
    follow = DeviceSelection(
        {name: Matrix(scores[name], masks[name], weights[name], products.get(name)) for name in scores}, 0.7, scope
    )
    near, unmoved = dict.fromkeys(scores, 0.0), 0
    for step in range(9):
        rate = (1.0, 0.0, 1e-6)[step % 3]
        for values in scores.values():
            values += rate * torch.randn(values.shape, generator=draw).to(device)
            if step in (3, 8):
                values.copy_((values * 4).round() / 4)
        found = follow.renew(near)
        for name, (mask, threshold) in select(scores, 0.7, scope).items():
            assert torch.equal(masks[name], mask)
            assert found[name] == (near[name] if found == near else threshold)
            if name in products:
                kept = torch.where(mask, weights[name], 0.0)
                assert torch.equal(products[name].view(torch.int32), kept.view(torch.int32))
        unmoved += found == near
        near = dict(reversed(found.items()))  # A restart may bring them back in another order.
    assert 0 < unmoved < 9


@pytest.mark.parametrize("device", DEVICES)
def test_nan_that_lets_too_few_be_kept_is_refused(device: str) -> None:
    scores = torch.full((6, 6), math.nan, device=device)
    scores.view(-1)[:11] = torch.arange(11.0, device=device)
    follow = DeviceSelection({"a": Matrix(scores, torch.zeros_like(scores, dtype=torch.bool))}, 0.5, "local")
    with pytest.raises(UserError, match="NaN"):
        follow.renew({"a": 0.0})
