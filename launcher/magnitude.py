#!/usr/bin/env python
"""Oneshot magnitude pruning and random masks: python launcher/magnitude.py --kind omp (--help shows every knob)."""

import sys

from finemask_ds.config import MagnitudeConfig
from finemask_ds.session import launch, search

if __name__ == "__main__":
    sys.exit(launch(MagnitudeConfig, search))
