"""Dynamic loss scaling for fp16: the scale's own rules, apart from who applies it.

One state machine for all ZeRO stages, because those that DeepSpeed uses under autocast differ by stage and never back
off in stages 1 to 3 (tests/engine/test_traps.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finemask_ds.errors import UserError

MAX_SKIPS_IN_A_ROW = 50
"""A run whose updates are all skipped for so long learns nothing and stops."""

LOSS_SCALE_KEYS = (
    "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis", "min_loss_scale",
)  # fmt: skip
"""What a DeepSpeed "fp16" block can say about the scale."""


@dataclass
class LossScale:
    """The factor on the loss that keeps fp16 gradients from vanishing; halved after an overflow, doubled now and then.

    ``LossScale.off()`` is the constant 1 of fp32 and bf16. Powers of two, so that scaling and unscaling change no bit
    of a gradient that fits.
    """

    scale: float = 2.0**16
    window: int = 1000
    """Steps without overflow after which the scale doubles."""
    hysteresis: int = 1
    """The scale is halved from the so-many-th overflow on."""
    refill: bool = False
    """Whether a good step forgives earlier overflows at once (otherwise the next doubling does)."""
    min_scale: float = 1.0
    is_on: bool = True
    is_dynamic: bool = True
    good_steps: int = 0
    """Steps without overflow since the last overflow or doubling."""
    overflows: int = 0
    """Overflows since the hysteresis was last refilled."""
    skipped: int = 0
    """Steps skipped so far."""
    skipped_in_row: int = 0

    @classmethod
    def off(cls) -> LossScale:
        """No scaling."""
        return cls(scale=1.0, is_on=False, is_dynamic=False)

    @classmethod
    def from_block(cls, block: Mapping[str, Any], file: str) -> LossScale:
        """The scale that a DeepSpeed "fp16" block describes; absent keys take the defaults of this class.

        Args:
            block: ``loss_scale`` (0: dynamic), ``initial_scale_power``, ``loss_scale_window``, ``hysteresis``,
                ``consecutive_hysteresis``, ``min_loss_scale``.
            file: where it stands, for messages.

        Raises:
            UserError: for a number that makes no scale.
        """
        block = {key: value for key, value in block.items() if value != "auto"}
        wrong = [key for key in LOSS_SCALE_KEYS if not isinstance(block.get(key, 0), int | float)]
        if wrong:
            raise UserError(f'{file} has "{wrong[0]}": {block[wrong[0]]!r} in its "fp16" block; type a number')
        static = block.get("loss_scale", 0)
        made = cls(
            scale=float(static) if static else 2.0 ** block.get("initial_scale_power", 16),
            window=block.get("loss_scale_window", 1000),
            hysteresis=block.get("hysteresis", 1),
            refill=block.get("consecutive_hysteresis", False),
            min_scale=float(block.get("min_loss_scale", 1)),
            is_dynamic=not static,
        )
        if made.scale <= 0 or made.window < 1 or made.hysteresis < 1 or made.min_scale <= 0:
            raise UserError(f'{file} has impossible loss-scale keys in its "fp16" block; type positive numbers')
        return made

    def update(self, *, overflow: bool) -> None:
        """Move the scale after a step: to be called when the step is over, so that none mixes two scales.

        Raises:
            UserError: after 50 overflows in a row.
        """
        if not overflow:
            self._grow()
            return
        self.skipped += 1
        self.skipped_in_row += 1
        self.good_steps = 0
        self.overflows += 1
        if self.is_dynamic and self.overflows >= self.hysteresis:
            self.scale = max(self.scale / 2, self.min_scale)
        if self.skipped_in_row >= MAX_SKIPS_IN_A_ROW:
            raise UserError(
                f"{self.skipped_in_row} steps in a row overflowed fp16 and were skipped, the loss scale is now "
                f'{self.scale:g}; type a lower learning rate, or "bfloat16" in the DeepSpeed file'
            )

    def _grow(self) -> None:
        self.skipped_in_row = 0
        self.good_steps += 1
        if self.refill:
            self.overflows = 0
        if self.is_dynamic and self.good_steps % self.window == 0:
            self.scale *= 2
            self.good_steps = self.overflows = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return {
            "is_on": self.is_on, "scale": self.scale, "good_steps": self.good_steps, "overflows": self.overflows,
            "skipped": self.skipped,
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state()``; the scale itself only where both runs have one."""
        self.skipped = state["skipped"]
        if self.is_on and state["is_on"]:
            self.scale, self.good_steps, self.overflows = state["scale"], state["good_steps"], state["overflows"]


class DeepSpeedScaler:
    """The run's loss scale under the names that DeepSpeed calls a scaler by.

    It never moves the scale: the engine does when DeepSpeed's step is over, so that no step divides by another scale
    than it multiplied by.
    """

    dynamic = True

    def __init__(self, loss_scale: LossScale):
        self._loss_scale = loss_scale
        self._is_unscaled = False
        self.skips = False
        """Whether stage 0 must leave out its update; stages 1 to 3 see an overflow themselves."""

    @property
    def cur_scale(self) -> float:
        """Stages 1 to 3: what the gradients carry."""
        return self._loss_scale.scale

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Stages 1 to 3, before backward."""
        return loss * self._loss_scale.scale

    def update_scale(self, overflow: bool) -> None:
        """Stages 1 to 3, in the middle of a step."""

    scale = scale_loss  # Stage 0's name for it.

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Stage 0, before it clips."""
        for group in optimizer.param_groups if self._loss_scale.is_on else ():
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(self._loss_scale.scale)
        self._is_unscaled = True

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stage 0's update."""
        if not self.skips:
            if not self._is_unscaled:
                self.unscale_(optimizer)
            optimizer.step()
        self._is_unscaled = False

    def update(self) -> None:
        """Stage 0, in the middle of a step."""
