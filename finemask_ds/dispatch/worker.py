"""A worker: takes the next free cell of a plan, runs it, takes the next, so that imports are paid once."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from finemask_ds.dispatch.attempt import Claim, claim, end_attempts, whole_result
from finemask_ds.dispatch.plan import Cell, Plan, describe_mask
from finemask_ds.dispatch.survey import State, Survey, survey
from finemask_ds.errors import UserError
from finemask_ds.signals import Interrupted, Interruption

RunCell = Callable[[Mapping[str, Any], Path, Interruption], None]
"""Runs the cell of some options in an attempt's folder and leaves result.json there; told when it is to end."""
GRACE_SEC = 600.0
"""From SIGTERM until a worker that does not end is killed: it ends its step, an evaluation of all dev rows if that is
due, and saves."""
_LAUNCHERS = re.compile(
    r"(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|NODE_RANK|GROUP_RANK|MASTER_ADDR|MASTER_PORT)$"
    r"|CROSS_|OMPI_|PMI|MPI_LOCAL|MV2_|ROLE_|GROUP_WORLD_|TORCHELASTIC_|ACCELERATE_|DEEPSPEED_"
    r"|SLURM_(PROCID|LOCALID|NODEID|STEP|NTASKS|NPROCS|TASK)"
)
"""Environment variables from which a worker would believe that it is one of several ranks."""


def work(
    root: Path,
    run_cell: RunCell,
    *,
    cells: Collection[str] = (),
    log: str = "",
    job: str = "",
    interruption: Interruption | None = None,
) -> int:
    """Run cell after cell until none is free: each is done, failed for good or alive elsewhere.

    Cells that have failed come after those that have not. SIGTERM and Ctrl-C end the running cell without a
    result and without a failure, where it can save where it stands after that; another worker goes on with it.
    After an error of the program the worker ends too, as such a process (of a GPU above all) may not be fit for
    another cell.

    Args:
        root: the plan's folder; read again before each cell, as the plan may have been extended.
        run_cell: runs one cell.
        cells: ids of the only cells to run; empty: all.
        log: the file that this process prints to.
        job: what its executor calls this process, the same after the executor has started it anew: then what it
            left unfinished before is over.
        interruption: where somebody else is to know too whether this process was asked to end.

    Returns:
        An exit code: 0 where nothing is free any more, 1 after an error of the program, 128 and the signal's number
        where it was asked to end, so that whoever starts a worker anew knows whether there is more for it to do.

    Raises:
        UserError: where there is no plan or no such cell in it, or its folder cannot be written.
    """
    plan = Plan.read(root)
    if unknown := sorted(set(cells) - {cell.id for cell in plan.cells}):
        raise UserError(f"--cell {unknown[0]} is not in the plan {root}; finemask status {root} shows it")
    if job:
        end_attempts([plan.folder(cell) for cell in plan.cells if not cells or cell.id in cells], job)
    seen = None
    with (interruption or Interruption()).watching() as interruption:
        while not interruption.asked:
            seen = survey(Plan.read(root), seen)
            taken = _next(seen, cells, log, job)
            if taken is None:
                return 0
            if not _run(seen.plan, *taken, run_cell, interruption) and not interruption.asked:
                return 1
    return 128 + interruption.signal


def _next(seen: Survey, only: Collection[str], log: str, job: str) -> tuple[Cell, Claim] | None:
    free = [pair for pair in seen.cells(State.WAITING) if not only or pair[0].id in only]
    for cell, standing in sorted(free, key=lambda pair: len(pair[1].failures)):
        if claimed := claim(seen.plan.folder(cell), cell.task, standing.attempts, log, job):
            return cell, claimed
    return None


def _run(plan: Plan, cell: Cell, claimed: Claim, run_cell: RunCell, interruption: Interruption) -> bool:
    """Whether this process is fit for another cell."""
    attempt, start, fit = claimed.attempt, time.monotonic(), True
    with claimed.held(plan.stale_sec):
        try:
            print(f"{cell.id}: attempt {attempt.number} starts", flush=True)
            claimed.take_over()
            _check_mask(cell)
            with interruption.raising():
                run_cell(cell.options, attempt.folder, interruption)
            if whole_result(attempt.run.result, cell.task) is None:
                raise RuntimeError(f"{attempt.run.result} is missing or broken, though the cell has ended")
        except Interrupted:
            pass
        except (Exception, SystemExit) as error:
            fit = isinstance(error, UserError)
            if not interruption.asked:  # else it may have failed because it was interrupted
                sentence = str(error) if fit else f"{type(error).__name__}: {error}"
                print(traceback.format_exc(), flush=True)
                attempt.fail(sentence, traceback.format_exc(), time.monotonic() - start)
        published = attempt.publish(cell.task)
    state = "done" if published else "interrupted" if interruption.asked else "failed"
    print(f"{cell.id}: {state} after {time.monotonic() - start:.1f} s", flush=True)
    return fit


def _check_mask(cell: Cell) -> None:
    mask = cell.options.get("mask")
    if mask and describe_mask(mask).bits != cell.mask_bits:
        raise UserError(f"{mask} is another mask than when the plan was made: dispatch again")


def alone(variables: Mapping[str, str]) -> dict[str, str]:
    """Environment variables without those from which a process would believe that it is one of several ranks."""
    return {name: value for name, value in variables.items() if not _LAUNCHERS.match(name)}


def end_with(parent: int, interruption: Interruption) -> None:
    """From now on, end this process once its parent is gone: tidily, but at once where it was asked to end before."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        if not interruption.asked:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(GRACE_SEC)
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
