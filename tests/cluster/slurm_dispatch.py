"""A process that dispatches a plan to fake workers in Slurm's queue: python slurm_dispatch.py ROOT [options]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from finemask_ds.dispatch.executor import dispatch
from finemask_ds.dispatch.plan import Plan
from finemask_ds.dispatch.slurm import SlurmExecutor
from finemask_ds.errors import UserError

WORKER = (sys.executable, str(Path(__file__).parents[1] / "dispatch" / "fake_worker.py"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--slots", type=int, default=0)
    parser.add_argument("--job_options", nargs="+", default=[])
    parser.add_argument("--job_setup", default="")
    parser.add_argument("--wait", default="yes")
    asked = parser.parse_args()
    again = () if asked.wait == "yes" else (sys.executable, *sys.orig_argv[1:], "--wait", "tidy")
    executor = SlurmExecutor(asked.slots, asked.job_options, asked.job_setup, WORKER, again=again, look_sec=0.5)
    dispatch(Plan.read(asked.root), executor, forgive=asked.wait != "tidy", poll_sec=0.1)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"finemask: {error}")
