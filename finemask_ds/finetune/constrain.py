"""How the weights of a subnetwork may move: those that the mask prunes are zero and stay zero, bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from finemask_ds.engine.base import Engine
from finemask_ds.engine.checkpoint import MOMENTS
from finemask_ds.masks.mask import Mask


class FixedMask:
    """f(x; M * theta) trained with M fixed (TAMT Section 3.3): W is W * M from the start and its gradient M * dL/dW.

    As W equals W * M all along, the model stays a plain one, without a product in its forward; what clipping and
    AdamW see of a pruned weight is 0, so its moments stay 0 and no update, and no weight decay, moves it.
    """

    def __init__(self, model: nn.Module, mask: Mask):
        """Set pruned weights to zero and hold their gradients there, in place.

        Args:
            model: plain; its parameters stay the same objects.
            mask: every name of it is a parameter of the model, of the same shape.
        """
        self.mask = mask
        self._weights: dict[str, nn.Parameter] = {}
        parameters = dict(model.named_parameters())
        for name, keep in mask.items():
            weight = parameters[name]
            with torch.no_grad():
                weight.masked_fill_(~keep.to(weight.device), 0.0)
            self._weights[name] = weight
            weight.register_hook(_Only(keep))

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
            _assert_zero(weight.detach(), self.mask[name], f"weights of {name}")
        state = engine.optimizer_state()
        for name, weight in self._weights.items():
            for moment in MOMENTS:
                if moment in state.get(weight, {}):
                    _assert_zero(state[weight][moment], self.mask[name], f"elements of {moment} of {name}")


class _Only:
    """A gradient hook: what the mask prunes gets none. The bits move to the gradient's device once."""

    def __init__(self, keep: Tensor):
        self._pruned = ~keep

    def __call__(self, gradient: Tensor) -> Tensor:
        self._pruned = self._pruned.to(gradient.device)
        return gradient.masked_fill(self._pruned, 0.0)


def _assert_zero(values: Tensor, keep: Tensor, what: str) -> None:
    moved = int(values.view(torch.int32)[~keep.to(values.device)].count_nonzero())
    if moved:
        raise RuntimeError(f"{moved} pruned {what} are not zero at the end; this is a fault of finemask")
