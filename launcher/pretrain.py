#!/usr/bin/env python
"""Make the built-in model: deepspeed --num_gpus 2 launcher/pretrain.py --deepspeed configs/ds/zero2.json."""

import sys

from finemask_ds.config import PretrainConfig
from finemask_ds.session import launch, pretrain

if __name__ == "__main__":
    sys.exit(launch(PretrainConfig, pretrain))
