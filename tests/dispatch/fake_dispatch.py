"""A process that dispatches a plan to fake workers: python fake_dispatch.py ROOT [SLOTS [GRACE_SEC]]."""

from __future__ import annotations

import sys
from pathlib import Path

from finemask_ds.dispatch.executor import dispatch
from finemask_ds.dispatch.local import LocalExecutor
from finemask_ds.dispatch.plan import Plan
from finemask_ds.dispatch.worker import GRACE_SEC
from finemask_ds.errors import UserError

COMMAND = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))

if __name__ == "__main__":
    slots = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    grace_sec = float(sys.argv[3]) if len(sys.argv) > 3 else GRACE_SEC
    try:
        dispatch(Plan.read(Path(sys.argv[1])), LocalExecutor(slots, COMMAND, grace_sec), poll_sec=0.05)
    except UserError as error:
        sys.exit(f"finemask: {error}")
