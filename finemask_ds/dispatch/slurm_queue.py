"""Slurm as it is asked: sbatch, squeue and scontrol alone, each within a time; accounting (sacct) is not needed."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finemask_ds import hostprocess
from finemask_ds.dispatch.worker import alone
from finemask_ds.errors import UserError

ANSWER_SEC = 60.0
"""How long Slurm may take for an answer."""
MOST_TASKS = 1001
"""Of an array, where Slurm does not tell its MaxArraySize: the default of that."""
_ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip
_SILENCE = re.compile(
    r"unable to contact slurm|timed out|temporarily unavailable|zero bytes|connection (refused|reset)|try again", re.I
)
"""What sbatch says when the fault is not in what was asked."""


class SilentError(Exception):
    """Slurm does not answer just now, as happens for minutes on a busy cluster."""


@dataclass(frozen=True)
class Task:
    """One task of a job array, as squeue tells of it until some minutes after its end."""

    job: str
    """As in ``scancel 12_3``."""
    state: str
    """RUNNING, PENDING, ..."""
    reason: str
    """Why it waits: Resources, Priority, JobHeldUser, ..."""

    @property
    def lives(self) -> bool:
        """Whether it runs, or will."""
        return self.state not in _ENDED


def check_here() -> None:
    """Refuse a machine without Slurm's commands.

    Raises:
        UserError: where one is missing.
    """
    for program in ("sbatch", "squeue", "scontrol"):
        if not shutil.which(program):
            raise UserError(
                f"there is no {program} on the PATH of {socket.gethostname()}: dispatch where Slurm's commands are, or "
                "type --executor local"
            )


def submit(options: Sequence[str], script: Path) -> str:
    """Submit a script; the job's number.

    Raises:
        SilentError: where nobody can know whether it was taken.
        UserError: with sbatch's own words where it refuses.
    """
    answer = _ask("sbatch", "--parsable", *options, str(script))
    if answer.returncode == 0:
        return answer.stdout.strip().split(";")[0]
    told = "; ".join(re.sub(r"^sbatch: (error: )?", "", line) for line in answer.stderr.splitlines() if line)
    if _SILENCE.search(told):
        raise SilentError(told)
    raise UserError(f"sbatch refuses the job ({told}): see --job_options")


def tasks(prefix: str) -> tuple[dict[tuple[str, int], Task], set[str]]:
    """What this user has whose names begin so.

    Returns:
        Tasks of arrays: (name, number in the array) -> task; numbers of the jobs that are no array and live.

    Raises:
        SilentError: where squeue does not answer.
    """
    answer = _ask("squeue", "--me", "--array", "--noheader", "--states=all", "--format=%F|%K|%T|%r|%j")
    if answer.returncode != 0:
        raise SilentError(answer.stderr.strip())
    found, single = {}, set()
    for line in answer.stdout.splitlines():
        job, number, state, reason, name = line.split("|", 4)
        if name.startswith(prefix) and number.isdecimal():
            found[name, int(number)] = Task(f"{job}_{number}", state, reason)
        elif name.startswith(prefix) and Task(job, state, reason).lives:
            single.add(job)
    return found, single


def most_tasks() -> int:
    """How many tasks an array of this cluster may have."""
    try:
        told = re.search(r"^MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config").stdout, re.M)
    except SilentError:
        told = None
    return int(told[1]) if told else MOST_TASKS


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    # What the job that this process may run in says of itself would be believed by the job that is submitted; and
    # with the mark of a supervised launch it would be ended with that.
    variables = {
        name: value
        for name, value in alone(os.environ).items()
        if name == "SLURM_CONF" or not name.startswith(("SLURM_", "SQUEUE_", hostprocess.VARIABLE))
    }
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=ANSWER_SEC, stdin=subprocess.DEVNULL, env=variables,
            start_new_session=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise SilentError(f"{command[0]} has not answered within {ANSWER_SEC:.0f} s") from error
