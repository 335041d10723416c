"""What is submitted to Slurm, and the record of it, so that any dispatcher finds again what another has submitted.

ROOT/slurm/jobs.json       arrays that may have tasks in the queue; written before sbatch is called
ROOT/slurm/NAME.sh         the script of an array, or of the small job after it (NAME-tidy.sh)
"""

from __future__ import annotations

import dataclasses
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finemask_ds.dispatch.plan import Plan
from finemask_ds.errors import UserError
from finemask_ds.run import atomic_write, read_json, write_json

PREFIX = "finemask-"
"""How the names of all our jobs begin."""
WARNING_SEC = 60
"""From SIGTERM to the time limit, in which a worker saves where it stands; Slurm may take a minute longer or less."""
_OURS = (
    "array", "chdir", "clusters", "dependency", "error", "help", "input", "job-name", "no-requeue", "open-mode",
    "output", "parsable", "requeue", "test-only", "usage", "version", "wait", "wrap",
)  # fmt: skip


@dataclass(frozen=True)
class Submission:
    """An array, one task for each cell."""

    name: str
    """Of the job; never given before."""
    cells: tuple[str, ...]
    attempts: tuple[int, ...]
    """How many attempts there were at each cell."""
    job: str = ""
    """Its number; "" until sbatch has answered."""
    tidy: str = ""
    """Number of the small job after it; "" where somebody waits for it instead, or did."""

    @classmethod
    def new(cls, cells: Sequence[str], attempts: Sequence[int]) -> Submission:
        """One that is about to be submitted."""
        return cls(f"{PREFIX}{secrets.token_hex(4)}", tuple(cells), tuple(attempts))

    def task(self, index: int) -> str:
        """What a worker is called that runs a cell of it."""
        return f"{self.name}_{index}"


def checked_options(options: Sequence[str]) -> list[str]:
    """``--job_options`` as arguments of sbatch; which of them exist is left to sbatch.

    Args:
        options: NAME=VALUE; an empty value is a flag.

    Raises:
        UserError: for one that dispatch sets itself.
    """
    found = []
    for option in options:
        name, _, value = option.partition("=")
        name = name.replace("_", "-")
        if any(ours.startswith(name) for ours in _OURS):  # sbatch understands abbreviations
            raise UserError(f"--job_options {option}: dispatch sets --{name} itself; leave it out")
        found.append(f"--{name}={value}" if value else f"--{name}")
    return found


def logs_of(plan: Plan, numbers: str) -> str:
    """Where a job prints to, as a pattern of Slurm.

    Raises:
        UserError: for a folder whose name Slurm cannot take.
    """
    folder = str(plan.logs.absolute())
    if "\\" in folder:
        raise UserError(f"Slurm writes no log under a name with a backslash ({folder}): type another --run")
    return f"{folder.replace('%', '%%')}/slurm-{numbers}.log"


def array_options(submission: Submission, slots: int, asked: Sequence[str], log: str) -> list[str]:
    """Arguments of sbatch for an array."""
    at_a_time = f"%{slots}" if slots else ""
    return [
        f"--array=0-{len(submission.cells) - 1}{at_a_time}", "--requeue", f"--job-name={submission.name}",
        f"--output={log}", "--open-mode=append", f"--signal=B:TERM@{WARNING_SEC}", *asked,
    ]  # fmt: skip


def tidy_options(name: str, jobs: Sequence[str], asked: Sequence[str], log: str) -> list[str]:
    """Arguments of sbatch for the small job after some arrays; it asks for what they do, which surely is granted."""
    return [f"--dependency=afterany:{':'.join(jobs)}", f"--job-name={name}", f"--output={log}", "--requeue", *asked]


def array_script(plan: Plan, submission: Submission, command: Sequence[str], setup: str) -> str:
    """The script that each task of an array runs: the site's set-up, then a worker with one cell."""
    root, index = str(plan.root.absolute()), "$SLURM_ARRAY_TASK_ID"
    log = f'{shlex.quote(f"{plan.logs.absolute()}/slurm-")}"${{SLURM_ARRAY_JOB_ID}}_{index}.log"'
    mine = f'--cell "${{cells[{index}]}}" --job "{submission.name}_{index}" --log {log}'
    lines = [
        "#!/bin/bash",
        f"cells=({' '.join(map(shlex.quote, submission.cells))})",
        'export OMP_NUM_THREADS="${SLURM_CPUS_ON_NODE:-1}" PYTHONUNBUFFERED=1',
        setup,
        # In place of the shell, so that Slurm's signals reach it.
        f"exec {shlex.join([*command, root])} {mine}",
    ]
    return "\n".join(lines) + "\n"


def tidy_script(command: Sequence[str], setup: str) -> str:
    """The script of the small job after the arrays: the dispatcher once more."""
    return "\n".join(["#!/bin/bash", setup, f"exec {shlex.join(command)}"]) + "\n"


def write_script(plan: Plan, name: str, text: str) -> Path:
    """Leave a script in the plan's folder."""
    path = plan.root / "slurm" / f"{name}.sh"
    with atomic_write(path) as stream:
        stream.write(text)
    return path


def read_submissions(plan: Plan) -> list[Submission]:
    """The arrays that may have tasks in the queue.

    Raises:
        UserError: where the record is broken.
    """
    path = plan.root / "slurm" / "jobs.json"
    try:
        return [_submission(value) for value in read_json(path)]
    except FileNotFoundError:
        return []
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no record of jobs ({error}): cancel the plan's jobs and delete it") from error


def write_submissions(plan: Plan, submissions: Sequence[Submission]) -> None:
    """Leave the record."""
    write_json(plan.root / "slurm" / "jobs.json", [dataclasses.asdict(one) for one in submissions])


def _submission(value: Any) -> Submission:
    return Submission(
        str(value["name"]), tuple(map(str, value["cells"])), tuple(map(int, value["attempts"])), str(value["job"]),
        str(value.get("tidy", "")),
    )  # fmt: skip
