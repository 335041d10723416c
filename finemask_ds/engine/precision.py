"""What this accelerator can do, and how a DeepSpeed file becomes the precision of a run.

Scores, masters and moments are fp32 on every path. A 16-bit run computes in torch autocast; DeepSpeed's "fp16" and
"bf16" blocks would cast every parameter, the scores too, and have no exception for single parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from finemask_ds.errors import UserError


def has_fast_bf16(device: torch.device) -> bool:
    """True on accelerators with bf16 matrix units (CPUs run 16-bit products some 500 times slower than fp32 here)."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def resolve_precision(settings: Mapping[str, Any], device: torch.device, file: str) -> tuple[dict[str, Any], str]:
    """The DeepSpeed settings with the precision this device can do, and one line that says what that is.

    Args:
        settings: the parsed DeepSpeed file.
        device: of this rank.
        file: the file's name, for messages.

    Raises:
        UserError: for an "fp16" or "bf16" block, or an autocast type other than bfloat16.
    """
    for block in ("fp16", "bf16"):
        if (settings.get(block) or {}).get("enabled"):
            raise UserError(
                f'{file} has a "{block}" block, which would cast the mask scores to 16 bit; type '
                '"torch_autocast": {"enabled": true, "dtype": "bfloat16"} in its place'
            )
    resolved = {key: value for key, value in settings.items() if key not in ("fp16", "bf16")}
    autocast = resolved.pop("torch_autocast", None) or {}
    if not autocast.get("enabled"):
        return resolved, "compute in fp32"
    if str(autocast.get("dtype", "bfloat16")).removeprefix("torch.") not in ("bfloat16", "bf16"):
        raise UserError(
            f'{file} asks for torch_autocast in {autocast["dtype"]}; this version computes in "bfloat16" or fp32'
        )
    if not has_fast_bf16(device):
        return (
            resolved,
            f"compute in fp32: {file} asks for bfloat16, for which this {device.type} has no fast arithmetic",
        )
    # An empty list of "safe" modules keeps DeepSpeed from gathering and reducing any parameter in 16 bit.
    resolved["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return resolved, "compute in bfloat16, scores, masters and moments in fp32"
