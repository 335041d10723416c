"""What is installed here; run as a program over ssh it prints that as JSON, in a moment: no torch is imported."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

from finemask_ds.provenance import code_state

PACKAGES = ("finemask_ds", "torch", "deepspeed", "transformers")


def installed() -> dict[str, str]:
    """Name -> version of Python and of the packages that hosts must have alike, and the commit of the code."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    state: dict[str, Any] = code_state(Path(__file__).parent)
    if state["commit"]:
        found["commit"] = state["commit"][:12] + (" with changes" if state["dirty"] else "")
    return found


if __name__ == "__main__":
    json.dump(installed(), sys.stdout)
