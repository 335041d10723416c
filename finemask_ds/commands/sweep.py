"""`finemask status` and `finemask worker`: a plan of cells as a person looks at it and as a process works on it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finemask_ds.errors import UserError

if TYPE_CHECKING:
    from finemask_ds.cli import Commands
    from finemask_ds.dispatch.estimate import MeasureCell
    from finemask_ds.dispatch.worker import RunCell
    from finemask_ds.signals import Interruption


def add_status(commands: Commands) -> None:
    """`finemask status ROOT`."""
    status = commands.add_parser("status", help="how the cells of a plan stand: done, running, failed and why")
    status.add_argument("root", type=Path, metavar="ROOT", help="folder of a plan, such as runs/sweep")
    status.add_argument("--once", action="store_true", help="print the table once, also on a terminal")
    status.add_argument("--retry", action="store_true", help="first give cells that have failed for good new attempts")
    status.set_defaults(handler=_status)


def add_worker(commands: Commands) -> None:
    """`finemask worker ROOT`, which executors start."""
    worker = commands.add_parser("worker", help="run free cells of a plan, one after the other (dispatch starts these)")
    add_worker_arguments(worker)
    worker.set_defaults(handler=lambda arguments: run_worker(arguments, _run_cell, _measure_cell))


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """What every worker's command line understands."""
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder of a plan, such as runs/sweep")
    parser.add_argument("--cell", nargs="+", default=[], metavar="ID", help="run only these cells")
    parser.add_argument("--cores", type=cores, default=(), metavar="0,1", help="stay on these cores, a thread on each")
    parser.add_argument("--parent", type=int, default=0, metavar="PID", help="end when this parent process is gone")
    parser.add_argument("--log", default="", metavar="FILE", help="where this process prints to, for the record")
    parser.add_argument("--job", default="", metavar="NAME", help="what the executor calls this process")
    parser.add_argument("--measure", action="store_true", help="run no cell, measure what the cells will cost")


def run_worker(arguments: argparse.Namespace, run_cell: RunCell, measure_cell: MeasureCell) -> int:
    """Pin this process, then work on the plan; its exit code (`dispatch.worker.work`).

    Raises:
        UserError: where there is no plan, or its folder cannot be written.
    """
    from finemask_ds.dispatch.estimate import measure
    from finemask_ds.dispatch.worker import alone, end_with, work
    from finemask_ds.signals import Interruption

    for name in os.environ.keys() - alone(os.environ).keys():
        del os.environ[name]
    if arguments.cores:  # before torch is imported, which counts its threads once
        try:
            os.sched_setaffinity(0, arguments.cores)
        except (OSError, OverflowError) as error:
            have = ",".join(map(str, sorted(os.sched_getaffinity(0))))
            raise UserError(f"--cores {arguments.cores} cannot be had; this process has {have}") from error
        os.environ["OMP_NUM_THREADS"] = str(len(arguments.cores))
    interruption = Interruption()
    if arguments.parent:
        end_with(arguments.parent, interruption)
    if arguments.measure:
        measure(arguments.root, measure_cell)
        return 0
    return work(
        arguments.root, run_cell, cells=arguments.cell, log=arguments.log, job=arguments.job, interruption=interruption
    )  # fmt: skip


def cores(text: str) -> tuple[int, ...]:
    """Numbers of cores, as 0,1."""
    return tuple(int(core) for core in text.split(","))


def _run_cell(options: Mapping[str, Any], folder: Path, interruption: Interruption) -> None:
    from finemask_ds.finetune.cell import run_cell

    run_cell(options, folder, interruption)


def _measure_cell(options: Mapping[str, Any]) -> float:
    from finemask_ds.finetune.cell import measure_cell

    return measure_cell(options)


def _status(arguments: argparse.Namespace) -> None:
    from finemask_ds.dispatch.plan import Plan
    from finemask_ds.dispatch.status import show_status
    from finemask_ds.dispatch.survey import excuse_failed, survey

    if arguments.retry:
        print(f"failed cells that wait for a worker again: {excuse_failed(survey(Plan.read(arguments.root)))}")
    show_status(arguments.root, once=arguments.once)
