"""Find sparse subnetworks of pre-trained language models with DeepSpeed (OMP, IMP, TAMT).

What is most used from Python stands here too; it is imported when it is asked for, and torch with it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finemask_ds.config import ImpConfig, MagnitudeConfig, TamtConfig
    from finemask_ds.masks.files import load_mask, save_mask
    from finemask_ds.masks.mask import Mask
    from finemask_ds.models.export import apply_mask

__all__ = ["ImpConfig", "MagnitudeConfig", "Mask", "TamtConfig", "apply_mask", "load_mask", "save_mask"]

_FROM = {"Mask": "masks.mask", "apply_mask": "models.export", "load_mask": "masks.files", "save_mask": "masks.files"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FROM.get(name, 'config')}"), name)
