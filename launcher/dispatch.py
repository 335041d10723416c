#!/usr/bin/env python
"""Fine-tune masks on tasks: python launcher/dispatch.py --masks runs/x --tasks mrpc cola (--help: every knob)."""

from finemask_ds.config import SweepConfig
from finemask_ds.downstream import sweep
from finemask_ds.session import launch, leave

if __name__ == "__main__":
    leave(launch(SweepConfig, sweep))
