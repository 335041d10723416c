#!/usr/bin/env python
"""Task-agnostic mask training: deepspeed launcher/tamt.py --deepspeed configs/ds/zero2.json (--help: every knob)."""

from finemask_ds.config import TamtConfig
from finemask_ds.downstream import search_then_sweep
from finemask_ds.session import launch, leave

if __name__ == "__main__":
    leave(launch(TamtConfig, search_then_sweep))
