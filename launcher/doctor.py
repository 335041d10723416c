#!/usr/bin/env python
"""Is a cluster fit for a run: deepspeed --hostfile H launcher/doctor.py --ranks 16 --run DIR (--help: every knob)."""

from finemask_ds.config import DoctorConfig
from finemask_ds.doctor.examine import examine
from finemask_ds.session import launch, leave

if __name__ == "__main__":
    leave(launch(DoctorConfig, examine))
