"""A fixed mask: what it does to training is what torch.nn.utils.prune does, and nothing pruned ever moves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from finemask_ds.engine.base import Batching, Group
from finemask_ds.engine.local import LocalEngine
from finemask_ds.finetune.constrain import FixedMask
from finemask_ds.masks.mask import Mask

STEPS = 8


class Regression(nn.Module):
    """Two layers and their squared error, as sums over rows."""

    losses = ("loss",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 1)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"loss": (self.second(self.first(batch["x"]).tanh())[:, 0] - batch["y"]).square().sum()}


@pytest.fixture
def mask() -> Mask:
    return Mask.random({"first.weight": (10, 6), "second.weight": (1, 10)}, 0.5, seed=1)


def data() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(16, 6), "y": torch.randn(16)}


def engine_of(model: Regression, weight_decay: float = 0.0, max_grad_norm: float = 0.0) -> LocalEngine:
    group = Group("weights", dict(model.named_parameters()), 1e-2, weight_decay)
    return LocalEngine(model, [group], batching=Batching(16, 1), max_grad_norm=max_grad_norm)


def trained(model: Regression, engine: LocalEngine) -> list[float]:
    """The norm of each step's gradients."""
    norms = []
    for _ in range(STEPS):
        engine.backward(engine.forward(data())["loss"])
        norms.append(engine.step({"weights": 1e-2}).norm)
    return norms


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_pruned_weights_and_moments_stay_zero_bit_for_bit(mask: Mask, weight_decay: float) -> None:
    model = Regression()
    engine = engine_of(model, weight_decay, max_grad_norm=1.0)
    fixed = FixedMask(engine, model, mask)
    trained(model, engine)
    fixed.check(engine)
    assert fixed.sparsity() == mask.sparsity()


def test_it_trains_as_torchs_own_pruning_does(mask: Mask) -> None:
    """W * M under autograd, an AdamW and a clipping of torch's: the same kept weights and norms."""
    model, reference = Regression(), Regression()
    engine = engine_of(model, max_grad_norm=0.5)
    FixedMask(engine, model, mask)
    norms = trained(model, engine)
    for name in mask:
        prune.custom_from_mask(reference.get_submodule(name.removesuffix(".weight")), "weight", mask[name])
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    wanted = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        reference(data())["loss"].backward()
        wanted.append(float(nn.utils.clip_grad_norm_(reference.parameters(), 0.5)))
        optimizer.step()
    for name in mask:
        layer, ours = reference.get_submodule(name.removesuffix(".weight")), model.get_parameter(name)
        torch.testing.assert_close(ours.detach(), (layer.weight_orig * layer.weight_mask).detach())
    torch.testing.assert_close(norms, wanted)


def test_the_norm_counts_kept_weights_only(mask: Mask) -> None:
    model = Regression()
    engine = engine_of(model)
    FixedMask(engine, model, mask)
    whole = copy.deepcopy(model)  # Its gradients are those of all weights.
    whole(data())["loss"].backward()
    kept = [
        parameter.grad[mask[name]] if name in mask else parameter.grad for name, parameter in whole.named_parameters()
    ]
    (norm, *_) = trained(model, engine)
    expected = torch.cat([gradient.flatten() for gradient in kept]).norm()
    assert norm == pytest.approx(float(expected), rel=1e-6)
    everything = torch.cat([parameter.grad.flatten() for parameter in whole.parameters()]).norm()
    assert norm < float(everything) * 0.99


def test_a_weight_that_moved_is_found(mask: Mask) -> None:
    model = Regression()
    engine = engine_of(model)
    fixed = FixedMask(engine, model, mask)
    trained(model, engine)
    row, column = (~mask["first.weight"]).nonzero()[0].tolist()
    with torch.no_grad():
        model.first.weight[row, column] = -0.0
    with pytest.raises(RuntimeError, match=r"1 pruned weights of first\.weight"):
        fixed.check(engine)
    with torch.no_grad():
        model.first.weight[row, column] = 0.0
    engine.optimizer_state()[model.first.weight]["exp_avg"][row, column] = 1e-30
    with pytest.raises(RuntimeError, match=r"1 pruned elements of exp_avg of first\.weight"):
        fixed.check(engine)
