"""How a plan stands, judged by files alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from finemask_ds.dispatch.attempt import Attempt, attempts_of, whole_result
from finemask_ds.dispatch.plan import Cell, Plan


class State(StrEnum):
    """How a cell stands."""

    DONE = "done"
    RUNNING = "running"
    """An attempt is known to live."""
    FAILED = "failed"
    """Tried as often as the plan allows."""
    WAITING = "waiting"


@dataclass(frozen=True)
class Standing:
    """One cell as it stands."""

    state: State
    attempts: tuple[Attempt, ...] = ()
    failures: tuple[tuple[Attempt, Mapping[str, Any]], ...] = ()
    """Attempts that count as failed, with their failed.json."""
    result: Mapping[str, Any] = field(default_factory=dict)
    """Of a cell that is done."""

    @property
    def error(self) -> str:
        """Why the last attempt that failed did, "" where none has."""
        return str(self.failures[-1][1].get("error", "")) if self.failures else ""

    def is_given_up(self, retries: int) -> bool:
        """Whether no further attempt will be made, though the last one may just be leaving."""
        return self.state is not State.DONE and len(self.failures) > retries


@dataclass(frozen=True)
class Survey:
    """All cells as they stand, in the plan's order."""

    plan: Plan
    standings: Mapping[str, Standing]
    """Cell id -> how it stands."""

    def count(self, state: State) -> int:
        """How many cells stand so."""
        return Counter(standing.state for standing in self.standings.values())[state]

    def cells(self, *states: State) -> Iterator[tuple[Cell, Standing]]:
        """The cells that stand so."""
        for cell in self.plan.cells:
            standing = self.standings[cell.id]
            if standing.state in states:
                yield cell, standing


def survey(plan: Plan, before: Survey | None = None, *, bury: bool = True) -> Survey:
    """Look at every cell; what was done in the survey before is done for good.

    Args:
        plan: the plan.
        before: an earlier survey.
        bury: leave failed.json for attempts that are found dead.
    """
    known = before.standings if before else {}
    return Survey(
        plan,
        {
            cell.id: known[cell.id]
            if cell.id in known and known[cell.id].state is State.DONE
            else look(plan.folder(cell), cell.task, plan.retries, plan.stale_sec, bury=bury)
            for cell in plan.cells
        },
    )


def excuse_failed(seen: Survey) -> int:
    """Give cells that have failed for good as many attempts as new ones; how many cells."""
    failed = [standing for _, standing in seen.cells(State.FAILED)]
    for standing in failed:
        for attempt, _ in standing.failures:
            attempt.excuse()
    return len(failed)


def look(folder: Path, task: str, retries: int, stale_sec: float, *, bury: bool = True) -> Standing:
    """How the cell of a folder stands; see `survey`."""
    if (result := whole_result(folder / "result.json", task)) is not None:
        return Standing(State.DONE, result=result)
    attempts = attempts_of(folder)
    alive, failures = False, []
    for attempt in attempts:
        holder, failure = attempt.holder(), attempt.failure()
        if holder is not None and not holder.is_dead(stale_sec):
            alive = True
        elif failure is None and holder is not None and whole_result(attempt.run.result, task) is not None:
            if bury and attempt.publish(task):  # its process died between the result and its publication
                return look(folder, task, retries, stale_sec, bury=bury)
        elif failure is None and holder is not None:
            if bury:
                attempt.bury()
            silent = {"error": "the worker fell silent"} if attempt.holder() else None  # else it has just ended tidily
            failure = attempt.failure() or silent
        if failure is not None and not failure.get("excused"):
            failures.append((attempt, failure))
    if alive:
        state = State.RUNNING
    else:
        state = State.FAILED if len(failures) > retries else State.WAITING
    return Standing(state, tuple(attempts), tuple(failures))
