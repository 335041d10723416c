#!/usr/bin/env python
"""Fine-tune a subnetwork on a task: python launcher/finetune.py --task mrpc --mask runs/x (--help: every knob)."""

from finemask_ds.config import FinetuneConfig
from finemask_ds.downstream import finetune
from finemask_ds.session import launch, leave

if __name__ == "__main__":
    leave(launch(FinetuneConfig, finetune))
