#!/usr/bin/env python
"""Iterative magnitude pruning: deepspeed launcher/imp.py --deepspeed configs/ds/zero2.json (--help: every knob)."""

from finemask_ds.config import ImpConfig
from finemask_ds.downstream import search_then_sweep
from finemask_ds.session import launch, leave

if __name__ == "__main__":
    leave(launch(ImpConfig, search_then_sweep))
