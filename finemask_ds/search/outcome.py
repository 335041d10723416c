"""What a search found, and what a mask file tells of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from finemask_ds.engine.base import Engine
from finemask_ds.engine.damage import complete_steps
from finemask_ds.masks.files import load_mask, save_mask
from finemask_ds.masks.mask import Mask
from finemask_ds.provenance import code_state
from finemask_ds.search.setting import Setting


@dataclass(frozen=True)
class Outcome:
    """What ``find_mask`` of a method gives."""

    mask: Mask
    steps: int
    """Optimizer steps spent."""
    seconds: float
    """Wall time of the search over all restarts, from loading theta_0 to the mask; evaluations and what watches the
    search apart, as in TAMT's Figure 6 and Table 3."""
    rank_seconds: float
    """The same of all ranks together, of which each start may have had another number."""
    head: Mapping[str, Tensor] | None = None
    """The MLM head as trained along, on the CPU, where the method trains it."""
    engine: str = ""
    """What trained and in which precision, in words; empty where nothing trained."""


def head_values(engine: Engine) -> dict[str, Tensor] | None:
    """Copies of the head's values where the engine trains one."""
    names = [name for group in engine.groups if group.name == "head" for name in group.parameters]
    return {name: value.cpu().clone() for name, value in engine.read(names)} or None


def mask_provenance(setting: Setting, steps: int, sparsity: float) -> dict[str, Any]:
    """What a mask file tells of where it comes from."""
    config = setting.search
    return {
        "model": config.model,
        "model_sha256": setting.model_sha256,
        "method": config.method,
        "targets": config.targets,
        "scope": config.scope,
        "target_sparsity": sparsity,
        "steps": steps,
        "seed": config.seed,
        "ranks": setting.world.size,
        "data": setting.corpus.provenance,
        "finemask_ds": version("finemask_ds"),
        "code": code_state(Path(__file__).parents[1]),
    }


def begun_from(setting: Setting) -> Mask | None:
    """The mask before the first step of a search that goes on from a checkpoint; None where it begins."""
    run = setting.run

    def read() -> Mask | None:
        return load_mask(run.start_mask) if run.start_mask.exists() and complete_steps(run.checkpoints) else None

    return setting.world.on_first(read)


def keep_mask(setting: Setting, path: Path, mask: Mask, steps: int, sparsity: float, seconds: float) -> None:
    """Write a mask on the way of a search, from the first rank (TAMT Sections 4.2.2 and 4.2.3)."""
    told = mask.with_provenance({**mask_provenance(setting, steps, sparsity), "seconds": seconds})
    setting.world.on_first(lambda: save_mask(path, told))
