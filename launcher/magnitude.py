#!/usr/bin/env python
"""Masks without training: python launcher/magnitude.py --kind omp, random or reconstruction (--help: every knob)."""

from finemask_ds.config import MagnitudeConfig
from finemask_ds.downstream import search_then_sweep
from finemask_ds.session import launch, leave

if __name__ == "__main__":
    leave(launch(MagnitudeConfig, search_then_sweep))
