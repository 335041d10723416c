"""What this accelerator can do, and how a DeepSpeed file becomes the precision of a run.

Scores, masters and moments are fp32 on every path. A 16-bit run computes in torch autocast; DeepSpeed's "fp16" and
"bf16" blocks would cast every parameter, the scores too, and have no exception for single parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from finemask_ds.engine.scaling import LossScale
from finemask_ds.errors import UserError

DTYPES = {"float16": torch.float16, "fp16": torch.float16, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
BLOCKS = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """What a run computes in."""

    compute: torch.dtype
    """Of products and of weights that are not trained."""
    loss_scale: LossScale
    told: str
    """One line for the log."""


def is_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """True on accelerators with matrix units for ``dtype`` (CPUs run 16-bit products some 500 times slower here)."""
    if device.type != "cuda":
        return False
    return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)


def resolve_precision(
    settings: Mapping[str, Any], device: torch.device, file: str, *, as_asked: bool = False
) -> tuple[dict[str, Any], Precision]:
    """The DeepSpeed settings with the precision this device can do.

    "torch_autocast" is taken as it is; an "fp16" or "bf16" block is translated to it, with its loss-scale keys.

    Args:
        settings: the parsed DeepSpeed file.
        device: of this rank.
        file: the file's name, for messages.
        as_asked: compute in 16 bit even where that is slow.

    Raises:
        UserError: for two precisions at once, or a type that is neither float16 nor bfloat16.
    """
    resolved = {key: value for key, value in settings.items() if key not in (*BLOCKS, "torch_autocast")}
    compute, block, translated = _asked(settings, file)
    if compute is None:
        return resolved, Precision(torch.float32, LossScale.off(), "compute in fp32")
    name = str(compute).removeprefix("torch.")
    if not as_asked and not is_fast(compute, device):
        told = f"compute in fp32: {file} asks for {name}, for which this {device.type} has no fast arithmetic"
        return resolved, Precision(torch.float32, LossScale.off(), told)
    # An empty list of "safe" modules keeps DeepSpeed from gathering and reducing any parameter in 16 bit.
    resolved["torch_autocast"] = {"enabled": True, "dtype": name, "lower_precision_safe_modules": []}
    scale = LossScale.from_block(block, file) if compute == torch.float16 else LossScale.off()
    told = f"compute in {name}, scores, masters and moments in fp32"
    if translated:
        told += f' ({file}: its "{translated}" block, which would cast the scores too, is read as "torch_autocast")'
    return resolved, Precision(compute, scale, told)


def _asked(settings: Mapping[str, Any], file: str) -> tuple[torch.dtype | None, Mapping[str, Any], str]:
    """The type that the file asks for, the block with its loss-scale keys, and the block's name if translated."""
    asked = {name: dtype for name, dtype in BLOCKS.items() if _is_on(settings.get(name) or {})}
    autocast = settings.get("torch_autocast") or {}
    block = settings.get("fp16") or {}
    if _is_on(autocast):
        named = str(autocast.get("dtype", "bfloat16"))
        dtype = DTYPES.get(named.removeprefix("torch."))
        if dtype is None:
            raise UserError(f'{file} asks for torch_autocast in {named}; type "float16" or "bfloat16"')
        if set(asked.values()) - {dtype}:
            raise UserError(f'{file} asks for {named} and for "{next(iter(asked))}"; keep one of the two blocks')
        return dtype, block, ""
    if len(asked) > 1:
        raise UserError(f'{file} enables both its "fp16" and its "bf16" block; keep one of the two')
    for name, dtype in asked.items():
        return dtype, block, name
    return None, block, ""


def _is_on(block: Mapping[str, Any]) -> bool:
    """Whether a block is enabled; "auto" leaves it to us, who do not."""
    return block.get("enabled") not in (None, False, "auto")


def check_mixed_precision(asked: str, device: torch.device) -> None:
    """Refuse fp16 where accelerate has no autocast for it.

    Raises:
        UserError: what to type.
    """
    if asked == "fp16" and device.type != "cuda":
        raise UserError("--mixed_precision fp16 needs an accelerator, and there is none; type --mixed_precision no")
