"""How the weights of a subnetwork may move: those that the mask prunes are zero and stay zero, bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from finemask_ds.engine.base import Engine
from finemask_ds.engine.checkpoint import MOMENTS
from finemask_ds.engine.local import LocalEngine
from finemask_ds.masks.binarize import masked
from finemask_ds.masks.mask import Mask


class FixedMask:
    """f(x; M * theta) trained with M fixed (TAMT Section 3.3): W is W * M from the start and its gradient M * dL/dW.

    As W equals W * M all along, the model stays a plain one, without a product in its forward; what clipping and
    AdamW see of a pruned weight is 0, so its moments stay 0 and no update, and no weight decay, moves it.
    """

    def __init__(self, engine: LocalEngine, model: nn.Module, mask: Mask):
        """Set pruned weights to zero, in place, and hold them there.

        Args:
            engine: trains the model's parameters, which are on its device.
            model: plain.
            mask: every name of it is a parameter of the model, of the same shape.
        """
        self.mask = mask
        parameters = dict(model.named_parameters())
        self._weights = {name: parameters[name] for name in mask}
        self._kept = {name: keep.to(engine.world.device) for name, keep in mask.items()}
        with torch.no_grad():
            for name, kept in self._kept.items():
                self._weights[name].copy_(masked(self._weights[name], kept))
        engine.before_clipping.append(self._clear_gradients)

    def _clear_gradients(self) -> None:
        """M * dL/dW, once a step, when micro-batches and ranks are summed up."""
        for name, kept in self._kept.items():
            gradient = self._weights[name].grad
            if gradient is not None:
                gradient.mul_(kept.view(torch.uint8))  # As numbers: by bool it is several times slower on CPUs.

    def sparsity(self) -> float:
        """Share of the masked matrices' weights that are zero now, counted."""
        zeros = sum(int((weight == 0).sum()) for weight in self._weights.values())
        return zeros / sum(weight.numel() for weight in self._weights.values())

    def check(self, engine: Engine) -> None:
        """Assert that every pruned weight and both its moments are +0.0, bit by bit.

        Raises:
            RuntimeError: naming the first matrix where they are not; a fault of ours and never of a user.
        """
        for name, weight in self._weights.items():
            _assert_zero(weight.detach(), ~self._kept[name], f"weights of {name}")
        state = engine.optimizer_state()
        for name, weight in self._weights.items():
            for moment in MOMENTS:
                if moment in state.get(weight, {}):
                    _assert_zero(state[weight][moment], ~self._kept[name], f"elements of {moment} of {name}")


def _assert_zero(values: Tensor, pruned: Tensor, what: str) -> None:
    moved = int(values.view(torch.int32)[pruned].count_nonzero())
    if moved:
        raise RuntimeError(f"{moved} pruned {what} are not zero at the end; this is a fault of finemask")
