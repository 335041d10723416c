"""Workers as tasks of Slurm's job arrays, one cell each: `sbatch --array=...%K --requeue`.

The queue outlives the dispatcher, so that this may be interrupted, killed or started twice: what is submitted is
recorded (`slurm_jobs`), and a cell is submitted only while no task in the queue is its own. One cell for a task, not
cell after cell as local workers do: the time limit is that of one cell, other users' jobs get their turn in between,
and what importing costs (seconds) is little beside a fine-tuning (minutes to hours).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from finemask_ds.dispatch.attempt import attempts_of
from finemask_ds.dispatch.executor import Executor
from finemask_ds.dispatch.plan import Plan
from finemask_ds.dispatch.slurm_ends import has_begun, is_barren, settle
from finemask_ds.dispatch.slurm_jobs import (
    PREFIX,
    Submission,
    array_options,
    array_script,
    checked_options,
    logs_of,
    read_submissions,
    tidy_options,
    tidy_script,
    write_script,
    write_submissions,
)
from finemask_ds.dispatch.slurm_queue import SilentError, check_here, most_tasks, submit, tasks
from finemask_ds.errors import UserError
from finemask_ds.lock import Lock
from finemask_ds.signals import tell

LOOK_SEC = 10.0
"""Between two looks at the queue, which all users of a cluster share."""
PATIENCE_SEC = 1800.0
"""So long Slurm may be silent; what is in its queue goes on meanwhile."""
_USUAL = {"None", "JobArrayTaskLimit"}
"""Reasons to wait that nobody need know."""
_LOCK_SEC = 600.0
"""A dispatcher that submits for so long is gone."""


class SlurmExecutor(Executor):
    """Keeps one task in Slurm's queue for each cell that waits."""

    def __init__(
        self,
        slots: int = 0,
        job_options: Sequence[str] = (),
        job_setup: str = "",
        command: Sequence[str] | None = None,
        *,
        again: Sequence[str] = (),
        after: str = "",
        look_sec: float = LOOK_SEC,
    ) -> None:
        """Check what can be checked before anything is submitted.

        Args:
            slots: how many tasks at a time; 0: as many as Slurm lets.
            job_options: NAME=VALUE, options of sbatch.
            job_setup: file of shell lines that each job runs first, "" for none.
            command: of a worker, before its arguments (`commands.sweep`); None for ``finemask worker``.
            again: the command that goes on with the plan; with it nobody waits here, but a small job runs it when the
                array has left the queue.
            after: number of a job that must have ended before any cell begins.
            look_sec: between two looks at the queue.

        Raises:
            UserError: where Slurm's commands, the file or an option cannot be.
        """
        check_here()
        self._at_a_time = slots
        self._asked = checked_options(job_options)
        self._setup = _read(job_setup)
        self._command = tuple(command or (sys.executable, "-m", "finemask_ds", "worker"))
        if after and not after.isdecimal():
            raise UserError(f"--after {after} is no number of a job; squeue --me shows them")
        self._after = [f"--dependency=afterany:{after}"] if after else []
        self._again, self._look_sec = tuple(again), look_sec
        self._looked, self._is_new = -math.inf, False
        self._answered, self._hears, self._told_silence = time.monotonic(), False, False
        self._in_queue: dict[str, str] = {}  # cell -> its task
        self._known: list[Submission] = []  # those with tasks in the queue
        self._gone: list[tuple[Submission, dict[int, str]]] = []  # with states of those that have left it
        self._ended_tidy: set[str] = set()  # small jobs that somebody has cancelled
        self._settled: set[str] = set()
        self._told_reasons: set[str] = set()

    @property
    def slots(self) -> int:
        """See the base class."""
        return self._at_a_time or sys.maxsize

    @property
    def place(self) -> str:
        """See the base class."""
        return f"Slurm, {self._at_a_time} at a time" if self._at_a_time else "Slurm"

    @property
    def waits(self) -> bool:
        """See the base class."""
        return not self._again or not self._hears

    @property
    def patience(self) -> int:
        """See the base class; here the end of every task counts for its cell, so that nothing goes on for ever."""
        return sys.maxsize

    def start(self, plan: Plan, waiting: Sequence[str]) -> int:
        """See the base class."""
        if not self._is_new:
            return 0
        self._is_new = False  # one try after each look, however often this is asked
        started = 0
        try:
            if self._missing(waiting):
                started = self._submit_missing(plan, waiting)
            self._submit_tidy(plan)
        except SilentError as error:
            self._bear(error)
        return started

    def poll(self, plan: Plan) -> int:
        """See the base class."""
        if time.monotonic() - self._looked >= self._look_sec:
            self._looked = time.monotonic()
            try:
                self._look(plan)
                self._submit_tidy(plan)
            except SilentError as error:
                self._bear(error)
            else:
                self._is_new = True
                for one, gone in self._gone:
                    self._settle(plan, one, gone)
        return len(self._in_queue)

    def stop(self, plan: Plan, is_urgent: Callable[[], bool]) -> str:
        """See the base class; the queue is left as it is."""
        try:
            self._submit_tidy(plan)
        except (SilentError, UserError) as error:
            tell(f"no job goes on after what is in the queue ({error})")
        jobs = [one.job for one in self._living()]
        if not jobs:
            return ""
        tidy = list(dict.fromkeys(one.tidy for one in self._living() if one.tidy))
        then = f"job {' and '.join(tidy)} goes on after them" if tidy else "the same command finds them again"
        return f"job(s) {' '.join(jobs)} stay in Slurm's queue and {then}; scancel {' '.join([*jobs, *tidy])} ends them"

    def advice(self, plan: Plan) -> str:
        """See the base class."""
        return f"see {plan.logs}"

    def _missing(self, waiting: Sequence[str]) -> list[str]:
        """Cells without a task, neither in the queue nor one whose end does not count yet."""
        held = {one.cells[index] for one, gone in self._gone for index in gone if one.task(index) not in self._settled}
        return [cell for cell in waiting if cell not in self._in_queue and cell not in held]

    def _submit_missing(self, plan: Plan, waiting: Sequence[str]) -> int:
        """Submit arrays of the cells without a task; how many cells."""
        started = 0
        with Lock(plan.root / "slurm" / "lock").held(_LOCK_SEC):
            self._look(plan)  # again, as another dispatcher may just have held the lock
            most = most_tasks()
            while cells := self._missing(waiting)[: self._room(most)]:
                self._submit(plan, cells)
                started += len(cells)
        return started

    def _room(self, most: int) -> int:
        """How many cells the next array may have: all if it is the only one, else what the others leave."""
        alive = len(self._in_queue)
        return min(most, max(0, self._at_a_time - alive)) if self._at_a_time and alive else most

    def _submit(self, plan: Plan, cells: Sequence[str]) -> None:
        """Submit an array of cells."""
        folders = {cell.id: plan.folder(cell) for cell in plan.cells}
        new = Submission.new(cells, [len(attempts_of(folders[cell])) for cell in cells])
        log = logs_of(plan, "%A_%a")
        script = write_script(plan, new.name, array_script(plan, new, self._command, self._setup))
        # Before sbatch is called: whoever finds the array in the queue must know whose cells it runs.
        write_submissions(plan, [*self._known, new])
        plan.logs.mkdir(parents=True, exist_ok=True)
        job = submit(array_options(new, self._at_a_time, [*self._asked, *self._after], log), script)
        self._known.append(replace(new, job=job))
        write_submissions(plan, self._known)
        self._in_queue |= {cell: f"{job}_{index}" for index, cell in enumerate(cells)}

    def _living(self) -> list[Submission]:
        """The arrays with tasks in the queue."""
        jobs = {task.partition("_")[0] for task in self._in_queue.values()}
        return [one for one in self._known if one.job in jobs]

    def _submit_tidy(self, plan: Plan) -> None:
        """Where nobody is to wait here, submit the small job after all arrays in the queue that have none, whosever."""
        if not self._again or all(one.tidy for one in self._living()):
            return
        with Lock(plan.root / "slurm" / "lock").held(_LOCK_SEC):
            recorded = read_submissions(plan)  # again, as another dispatcher may just have held the lock
            theirs = {one.name: "" if one.tidy in self._ended_tidy else one.tidy for one in recorded}
            if jobs := {one.name: one.job for one in self._living() if not theirs.get(one.name)}:
                name = f"{PREFIX}tidy-{list(jobs.values())[-1]}"
                script = write_script(plan, name, tidy_script(self._again, self._setup))
                options = tidy_options(name, list(jobs.values()), self._asked, logs_of(plan, "tidy-%j"))
                theirs |= dict.fromkeys(jobs, submit(options, script))
                write_submissions(plan, [replace(one, tidy=theirs[one.name]) for one in recorded])
        self._known = [replace(one, tidy=theirs.get(one.name, "")) for one in self._known]

    def _look(self, plan: Plan) -> None:
        """See which tasks live and which have left the queue.

        Raises:
            SilentError: where Slurm does not answer; what was seen before stays.
        """
        known = read_submissions(plan)  # first, as another dispatcher may submit at any time
        found, single = tasks(PREFIX)
        self._ended_tidy = {one.tidy for one in known} - single
        known = [replace(one, tidy="" if one.tidy in self._ended_tidy else one.tidy) for one in known]
        self._answered, self._hears, self._told_silence = time.monotonic(), True, False
        self._in_queue, self._known, self._gone = {}, [], []
        reasons: set[str] = set()
        for one in known:
            own = {index: found.get((one.name, index)) for index in range(len(one.cells))}
            number = one.job or next((task.job.partition("_")[0] for task in own.values() if task), "")
            living = {index: task for index, task in own.items() if task and task.lives}
            self._in_queue |= {one.cells[index]: task.job for index, task in living.items()}
            reasons |= {task.reason for task in living.values() if task.state == "PENDING"} - _USUAL
            gone = {index: task.state if task else "" for index, task in own.items() if index not in living}
            if number:  # else sbatch may still be at work, or has refused it
                self._gone.append((replace(one, job=number), gone))
            if living or (number and any(one.task(index) not in self._settled for index in gone)):
                self._known.append(replace(one, job=number))
        if new := reasons - self._told_reasons:
            told = f"{len(self._in_queue)} tasks in the queue, some wait for {', '.join(sorted(new))}"
            print(f"Slurm: {told}", flush=True)
        self._told_reasons |= reasons

    def _settle(self, plan: Plan, one: Submission, gone: Mapping[int, str]) -> None:
        """Let the ends of an array's tasks count.

        Raises:
            UserError: where all have ended and none has begun its cell, as those of another array would.
        """
        if not (new := {index: state for index, state in gone.items() if one.task(index) not in self._settled}):
            return
        if not has_begun(plan, one):
            if len(gone) < len(one.cells):
                return  # until it is clear whether the script or the nodes of some tasks are at fault
            if not self._in_queue and is_barren(plan, one):
                with Lock(plan.root / "slurm" / "lock").held(_LOCK_SEC):  # a fresh start may try again
                    write_submissions(plan, [other for other in read_submissions(plan) if other.name != one.name])
                ends = "/".join(sorted(set(gone.values()) - {""})) or "left the queue"
                raise UserError(
                    f"none of the {len(gone)} tasks of Slurm's job {one.job} has begun its cell ({ends}): it was "
                    f"cancelled, or --job_setup or --job_options is at fault; see {plan.logs}/slurm-{one.job}_*.log"
                )
        for index, state in new.items():
            settle(plan, one, index, f"{one.job}_{index}", state)
            self._settled.add(one.task(index))

    def _bear(self, error: SilentError) -> None:
        """Wait for Slurm, not for ever.

        Raises:
            UserError: when it has been silent for too long.
        """
        if not self._told_silence:
            print(f"finemask: Slurm does not answer ({error}); asking again", file=sys.stderr, flush=True)
        self._hears, self._told_silence = False, True
        if time.monotonic() - self._answered > PATIENCE_SEC:
            raise UserError(
                f"Slurm has been silent for {PATIENCE_SEC / 60:.0f} min ({error}): start the same command again later"
            ) from error


def _read(setup: str) -> str:
    try:
        return Path(setup).read_text(encoding="utf-8") if setup else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --job_setup {setup} ({error}): type a file of shell lines") from error
