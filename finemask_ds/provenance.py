"""What made a result: versions, commit, hardware, command; and was it made by the same config."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from finemask_ds.errors import OtherConfigError

PACKAGES = (
    "finemask_ds",
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "tokenizers",
    "numpy",
    "safetensors",
)
_GIT_SECONDS = 10
_FIGURES = "results"
"""Folder of measured figures: those that a plan has kept there do not change the code that makes the next."""


def collect() -> dict[str, Any]:
    """Return the facts about this process as JSON values; what cannot be known is None."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(sys.argv),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "code": code_state(Path(__file__).parent),
        "hardware": hardware(),
    }


def command_line(arguments: list[str]) -> str:
    """Return the command as one would type it, without the rank that the launcher added."""
    return re.sub(r" --local[_-]rank[= ]\d+", "", shlex.join(arguments))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def code_state(package: Path) -> dict[str, Any]:
    """Return the commit a package folder is at and whether its work tree is dirty; None for both outside git.

    Figures in results/ make no tree dirty. A package installed into an environment inside somebody's repository
    is not of that repository: only a folder whose files git tracks counts.
    """

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(package), *arguments]
        try:
            answer = subprocess.run(
                command, capture_output=True, text=True, timeout=_GIT_SECONDS, stdin=subprocess.DEVNULL
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return {"commit": None, "dirty": None}
    changes = git("status", "--porcelain", "--", ":/", f":(top,exclude){_FIGURES}")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else changes != ""}


def hardware() -> dict[str, Any]:
    """Return the CPU model, the cores this process may use, the memory in GiB and the GPUs' names."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu_model(), "cores": cores, "memory_gib": _memory_gib(), "gpus": _gpu_names()}


def _cpu_model() -> str | None:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine() or None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _gpu_names() -> list[str]:
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def refuse_other_config(
    folder: Path, saved: Any, current: Mapping[str, Any], defaults: Mapping[str, Any], ignored: Set[str]
) -> None:
    """Raise OtherConfigError if a folder's saved config differs from the current one.

    The sentence names every differing key with both values, and what to type. A key that one side lacks has
    its default there; keys in `ignored` may differ, and a path may be spelled otherwise.
    """
    if not isinstance(saved, dict):
        raise OtherConfigError(f"{folder}/config.json is no config of a run")
    before, now = dict(defaults) | saved, dict(defaults) | dict(current)
    compared = sorted((before.keys() | now.keys()) - ignored)
    differing = [key for key in compared if not _is_same(before.get(key), now.get(key))]
    if not differing:
        return
    change = {key: f"{key} was {_typed(before.get(key))}, now {_typed(now.get(key))}" for key in differing}
    if other := [change[key] for key in ("method", "config_version") if key in change]:
        raise OtherConfigError(f"{folder} was made by another method or version ({', '.join(other)})")
    old = [f"--{key} {_typed(before[key])}" for key in differing if before.get(key) != defaults.get(key)]
    left_out = [f"no --{key}" for key in differing if before.get(key) == defaults.get(key)]
    raise OtherConfigError(
        f"{folder} was made by another config ({', '.join(change.values())})",
        f"type another --run DIR, or go on with it by typing {', '.join([*old, *left_out])}",
    )


def _is_same(before: object, now: object) -> bool:
    """Whether two values are equal, or two spellings of one file; without a slash a name may be the hub's, or ours."""
    if before == now or not (isinstance(before, str) and isinstance(now, str) and "/" in before and "/" in now):
        return before == now
    try:
        return Path(before).expanduser().samefile(Path(now).expanduser())
    except (OSError, RuntimeError):
        return False


def _typed(value: object) -> str:
    """Show a value as one would type it after its option."""
    if isinstance(value, list):
        return " ".join(map(_typed, value))
    return shlex.quote(value) if isinstance(value, str) else json.dumps(value)
