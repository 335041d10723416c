"""Running a plan: one loop for all executors, which only start workers, look after them and end them."""

from __future__ import annotations

import shlex
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from finemask_ds.dispatch.estimate import seconds_left, unmeasured
from finemask_ds.dispatch.plan import Plan
from finemask_ds.dispatch.progress import Progress
from finemask_ds.dispatch.survey import State, Survey, excuse_failed, survey
from finemask_ds.errors import UserError, printable
from finemask_ds.signals import Interruption, tell
from finemask_ds.units import duration

STARTS_PER_SLOT = 5
"""So many workers may be started for a slot without a cell being finished or failing."""

IDLE_SEC = 10.0
"""So long workers that have nothing to save may take to end."""
_SILENT_SEC = 2.0
"""So long nobody need know why nothing happens."""


class Executor(ABC):
    """Where workers run. Which cells are done is never its business: the files say that."""

    @property
    @abstractmethod
    def slots(self) -> int:
        """How many workers run at a time."""

    @property
    @abstractmethod
    def place(self) -> str:
        """Where they run, for the reader: ``2 cores of this machine``."""

    @property
    def waits(self) -> bool:
        """Whether somebody is to wait here until all is done; else what is started goes on by itself."""
        return True

    @property
    def patience(self) -> int:
        """So many workers may be started without a cell being finished or failing."""
        return STARTS_PER_SLOT * self.slots

    @abstractmethod
    def start(self, plan: Plan, waiting: Sequence[str]) -> int:
        """Start workers in free slots, no more than there are waiting cells (ids in order); how many."""

    @abstractmethod
    def poll(self, plan: Plan) -> int:
        """How many workers live; ends the attempts of those that died."""

    @abstractmethod
    def stop(self, plan: Plan, is_urgent: Callable[[], bool]) -> str:
        """Leave the workers, when this process ends.

        Where they depend on it they are ended, tidily if they can before it is urgent, and what they ran counts as
        interrupted. Where a queue outlives the one who submitted, they go on.

        Returns:
            What goes on and how to end it, for the reader; "" where nothing does.
        """

    @abstractmethod
    def advice(self, plan: Plan) -> str:
        """Where to look when workers end before they do anything."""

    def measure(self, plan: Plan, is_over: Callable[[], bool]) -> None:
        """Have `estimate.measure` run where workers would; not at all, unless an executor knows how.

        Raises:
            UserError: where a cell cannot even begin.
        """
        return


def dispatch(
    plan: Plan,
    executor: Executor,
    *,
    again: str | None = None,
    forgive: bool = True,
    measure: bool = True,
    poll_sec: float = 0.5,
) -> Survey:
    """Run what is missing or failed until nothing is left; print a line for each cell that ends.

    Ctrl-C or SIGTERM ends the workers (see `Executor.stop`), a further one at once, and the process (exit code 130 or
    143); a call with the same plan goes on.

    Args:
        plan: as `Plan.write` made it.
        executor: where to run.
        again: the command that goes on, for the reader; None for this process's own.
        forgive: give failed cells as many new attempts as a new one.
        measure: estimate the cost before anything runs.
        poll_sec: between two looks at the files.

    Returns:
        How the cells stand in the end: done or failed, unless the executor does not wait.

    Raises:
        UserError: where a cell cannot even begin, workers end at once, or the disk is full.
    """
    seen = survey(plan)
    if forgive:
        excuse_failed(seen)
    seen, error = survey(plan, seen), ""
    with Interruption().watching() as interruption, Progress(executor.slots) as progress:
        progress.begin(seen, executor.place)
        try:
            if measure and unmeasured(plan, seen):
                executor.measure(plan, lambda: interruption.asked)
            if not interruption.asked and seen.count(State.DONE) < len(plan.cells):
                progress.say(_cost(seen, executor))
                seen = _until_done(seen, executor, interruption, progress, poll_sec)
        except Exception as failure:
            error = printable(str(failure))
            raise
        finally:
            left = executor.stop(plan, _Patience(interruption, error, has_to_save=_unfinished(seen) > 0))
            if left and _unfinished(seen):
                progress.say(left)
        seen = survey(plan, seen)
        progress.end(seen)
    if interruption.asked:
        command = shlex.join([sys.executable, *sys.orig_argv[1:]]) if again is None else again
        done = f"{seen.count(State.DONE)} of {len(plan.cells)} cells are done"
        tell(f"interrupted, {done}; the same command goes on: {command}")
        raise SystemExit(128 + interruption.signal)
    return seen


class _Patience:
    """Asked again and again while workers end: whether it is urgent. Says once what is being waited for, and why."""

    def __init__(self, interruption: Interruption, error: str, *, has_to_save: bool) -> None:
        self._interruption, self._error, self._has_to_save = interruption, error, has_to_save
        self._was_asked = interruption.asked
        self._started, self._told = time.monotonic(), False

    def __call__(self) -> bool:
        waited = time.monotonic() - self._started
        if self._has_to_save and waited > _SILENT_SEC and not self._told:
            self._told = True
            why, again = f"{self._error}; " if self._error else "", " again" if self._was_asked else ""
            tell(f"{why}waiting until the workers have saved; Ctrl-C{again} ends them at once")
        insists = self._interruption.insists if self._was_asked else self._interruption.asked
        return insists or (not self._has_to_save and waited > IDLE_SEC)


def _until_done(
    seen: Survey, executor: Executor, interruption: Interruption, progress: Progress, poll_sec: float
) -> Survey:
    started, ended = 0, -1
    while not interruption.asked:
        alive = executor.poll(seen.plan)
        seen = survey(seen.plan, seen)
        progress.update(seen)
        now_ended = seen.count(State.DONE) + sum(len(one.failures) for one in seen.standings.values())
        if now_ended != ended:
            started, ended = 0, now_ended
        waiting = [cell.id for cell, _ in seen.cells(State.WAITING)]
        if not _unfinished(seen):
            break
        if waiting and alive < executor.slots:
            if started >= executor.patience:
                raise UserError(f"{started} workers ended before any cell did; {executor.advice(seen.plan)}")
            started += executor.start(seen.plan, waiting)
        if not executor.waits:
            break
        time.sleep(poll_sec)
    return seen


def _unfinished(seen: Survey) -> int:
    return seen.count(State.WAITING) + seen.count(State.RUNNING)


def _cost(seen: Survey, executor: Executor) -> str:
    alone, together = seconds_left(seen), seconds_left(seen, executor.slots)
    if alone is None or together is None:
        return "cost: unknown until the first cell is done"
    return f"cost: about {duration(alone)} of one worker, {duration(together)} on {executor.place}"
