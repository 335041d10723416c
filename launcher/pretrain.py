#!/usr/bin/env python
"""Make the built-in model: deepspeed --num_gpus 2 launcher/pretrain.py --deepspeed configs/ds/zero2.json."""

from finemask_ds.config import PretrainConfig
from finemask_ds.session import launch, leave, pretrain

if __name__ == "__main__":
    leave(launch(PretrainConfig, pretrain))
