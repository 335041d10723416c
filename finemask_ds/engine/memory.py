"""Memory of this process: what it keeps, and how much it has used."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import resource
import sys
from pathlib import Path

import torch

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Names of glibc's options in malloc.h."""

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def keep_freed_memory(device: torch.device) -> None:
    """Let a process that computes on the CPU keep the memory it frees for its next tensors; nothing without glibc.

    By default glibc gives tensors of more than 32 MiB back to the system at once, and each step pays for new pages
    where the last had just returned them: 40 % of a step at BERT-base's shapes (results/README.md, "Speed"). What an
    engine before this one has left goes back first.
    """
    if device.type == "cpu" and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            gc.collect()
            libc.malloc_trim(0)
            libc.mallopt(_MMAP_MAX, 0)
            libc.mallopt(_TRIM_THRESHOLD, -1)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this rank has used so far, or since ``forget_peak_memory``, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with contextlib.suppress(OSError):
        if found := re.search(r"^VmHWM:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE):
            return int(found[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def forget_peak_memory(device: torch.device) -> None:
    """Start the peak anew, where the system lets us, so that one of many cells in a process tells its own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")  # proc(5): resets the peak of the resident set.
