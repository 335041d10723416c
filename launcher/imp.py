#!/usr/bin/env python
"""Iterative magnitude pruning: deepspeed launcher/imp.py --deepspeed configs/ds/zero2.json (--help: every knob)."""

from finemask_ds.config import ImpConfig
from finemask_ds.session import launch, leave, search

if __name__ == "__main__":
    leave(launch(ImpConfig, search))
