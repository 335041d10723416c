"""A process that dispatches a plan to fake workers in a Ray cluster: python ray_dispatch.py ROOT ADDRESS [NEED ...]."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from finemask_ds.dispatch.executor import dispatch
from finemask_ds.dispatch.plan import Plan
from finemask_ds.dispatch.ray import RayExecutor
from finemask_ds.errors import UserError
from tests.dispatch.fake_dispatch import COMMAND

if __name__ == "__main__":
    root, address, *needs = sys.argv[1:]
    code = 0
    try:
        executor = RayExecutor(address, job_options=needs, command=COMMAND, gone_sec=5.0)
        dispatch(Plan.read(Path(root)), executor, poll_sec=0.1)
    except UserError as error:
        print(f"finemask: {error}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    os._exit(code)  # as launchers leave; Ray would wait for a head that is gone
