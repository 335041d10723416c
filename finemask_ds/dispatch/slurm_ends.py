"""What it means for a cell that its task has left Slurm's queue: done, to be gone on with, or one more failure."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from finemask_ds.dispatch.attempt import attempts_of, claim, end_attempts, whole_result
from finemask_ds.dispatch.plan import Cell, Plan
from finemask_ds.dispatch.slurm_jobs import Submission


def is_barren(plan: Plan, one: Submission) -> bool:
    """Whether not a single cell of an array was begun by anybody since it was submitted."""
    return all(_is_untouched(plan.folder(cell), cell, before) for _, cell, before in _cells(plan, one))


def has_begun(plan: Plan, one: Submission) -> bool:
    """Whether a task of an array has begun its cell."""
    return any(
        attempt.job == one.task(index) for index, cell, _ in _cells(plan, one)
        for attempt in attempts_of(plan.folder(cell))
    )  # fmt: skip


def settle(plan: Plan, one: Submission, index: int, job: str, state: str) -> None:
    """Let the end of a task count for its cell; a second time it changes nothing.

    A task that saved where it stood before Slurm ended it leaves an interruption, on which the next goes on. All other
    ends without a result are failures, so that a plan's retries bound what is submitted.

    Args:
        plan: the plan.
        one: the array.
        index: of the task in it.
        job: what Slurm calls the task.
        state: in which it left the queue; "" where that is forgotten.
    """
    cell, before = next((cell, before) for number, cell, before in _cells(plan, one) if number == index)
    folder, name = plan.folder(cell), one.task(index)
    log = f"{plan.logs.absolute()}/slurm-{job}.log"
    ended = f"Slurm's job {job} " + (f"ended as {state}" if state else "has left the queue")
    mine = [attempt for attempt in attempts_of(folder) if attempt.job == name]
    if whole_result(folder / "result.json", cell.task) is not None:
        return
    if not mine:
        if _is_untouched(folder, cell, before) and (never := claim(folder, cell.task, attempts_of(folder), log, name)):
            never.attempt.fail(f"{ended} before it had begun the cell")
            never.lock.release()
        return
    last = mine[-1]
    if last.holder() is not None and last.publish(cell.task):  # it died between the result and its publication
        last.let_go()
    elif last.holder() is not None:
        end_attempts([folder], name, f"{ended} without leaving a word: killed, or its node is gone")
    elif last.failure() is None and state == "CANCELLED":
        last.fail(f"{ended}: somebody has cancelled it")
    elif last.failure() is None and not last.has_saved():
        last.fail(f"{ended} before the cell had saved anything: give it more time, as --job_options time=04:00:00")


def _cells(plan: Plan, one: Submission) -> Iterable[tuple[int, Cell, int]]:
    """Number of the task, its cell, and how many attempts that had; cells dropped from the plan are left out."""
    named = {cell.id: cell for cell in plan.cells}
    return [
        (index, named[cell], before)
        for index, (cell, before) in enumerate(zip(one.cells, one.attempts, strict=True))
        if cell in named
    ]


def _is_untouched(folder: Path, cell: Cell, before: int) -> bool:
    return whole_result(folder / "result.json", cell.task) is None and len(attempts_of(folder)) <= before
