"""Workers on this machine: one for each GPU, or for each core where there is none, pinned."""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finemask_ds.dispatch.attempt import end_attempts
from finemask_ds.dispatch.executor import Executor
from finemask_ds.dispatch.plan import Plan
from finemask_ds.dispatch.process import check_measured, end, has_ended, reap, spawn, told
from finemask_ds.dispatch.worker import GRACE_SEC, alone
from finemask_ds.errors import UserError

MEASURE_SEC = 900.0
"""An estimate is not worth more."""


@dataclass(frozen=True)
class Slot:
    """Room for one worker."""

    cores: tuple[int, ...]
    gpu: str = ""
    """As in CUDA_VISIBLE_DEVICES; "" for none."""


class LocalExecutor(Executor):
    """Runs workers as processes of this machine, each in a session of its own: a Ctrl-C reaches them only tidily."""

    def __init__(self, slots: int = 0, command: Sequence[str] | None = None, grace_sec: float = GRACE_SEC) -> None:
        """Lay out the slots.

        Args:
            slots: how many workers at a time; 0: a worker for each GPU, else for each core.
            command: of a worker, before its arguments (`commands.sweep`); None for ``finemask worker``.
            grace_sec: from SIGTERM to SIGKILL.
        """
        self._slots = layout(slots, usable_cores(), visible_gpus(os.environ))
        self._command = tuple(command or (sys.executable, "-m", "finemask_ds", "worker"))
        self._grace_sec = grace_sec
        self._workers: dict[int, subprocess.Popen[bytes]] = {}
        self._last_end = ""

    @property
    def slots(self) -> int:
        """See the base class."""
        return len(self._slots)

    @property
    def place(self) -> str:
        """See the base class."""
        what = "GPU" if self._slots[0].gpu else "worker"
        each = len(self._slots[0].cores)
        return f"{self.slots} {what}{'s' * (self.slots > 1)} of this machine, {each} core{'s' * (each > 1)} each"

    def start(self, plan: Plan, waiting: Sequence[str]) -> int:
        """See the base class."""
        free = [number for number in range(self.slots) if number not in self._workers][: len(waiting)]
        for number in free:
            self._workers[number] = self._spawn(plan, number, self._log(plan, number))
        return len(free)

    def poll(self, plan: Plan) -> int:
        """See the base class."""
        for number, worker in list(self._workers.items()):
            if has_ended(worker):
                code = reap(worker)
                del self._workers[number]
                self._last_end = f"the last {told(code)}, see {self._log(plan, number)}"
                end_attempts(plan.folders, worker.pid, f"the worker {told(code)}")
        return len(self._workers)

    def stop(self, plan: Plan, is_urgent: Callable[[], bool]) -> str:
        """See the base class."""
        workers = list(self._workers.values())
        end(workers, self._grace_sec, is_urgent)
        self._workers.clear()
        for worker in workers:
            end_attempts(plan.folders, worker.pid)
        return ""

    def advice(self, plan: Plan) -> str:
        """See the base class."""
        return self._last_end or f"see {plan.logs}"

    def measure(self, plan: Plan, is_over: Callable[[], bool]) -> None:
        """See the base class."""
        log = plan.logs / "measure.log"
        log.unlink(missing_ok=True)
        worker = self._spawn(plan, 0, log, "--measure")
        deadline = time.monotonic() + MEASURE_SEC
        try:
            while not has_ended(worker) and not is_over() and time.monotonic() < deadline:
                time.sleep(0.05)
        finally:
            code = reap(worker)
        if not is_over():
            check_measured(code, log)

    def _log(self, plan: Plan, number: int) -> Path:
        return plan.logs / f"slot-{number}.log"

    def _spawn(self, plan: Plan, number: int, log: Path, *options: str) -> subprocess.Popen[bytes]:
        slot = self._slots[number]
        cores = ",".join(map(str, slot.cores))
        arguments = [str(plan.root), "--cores", cores, "--parent", str(os.getpid()), "--log", str(log), *options]
        return spawn([*self._command, *arguments], log, environment(os.environ, slot))


def layout(slots: int, cores: Sequence[int], gpus: Sequence[str]) -> list[Slot]:
    """Share out cores and GPUs.

    Args:
        slots: how many; 0: one for each GPU, else for each core.
        cores: numbers of the cores this process may use.
        gpus: as in CUDA_VISIBLE_DEVICES.

    Raises:
        UserError: for a negative number.
    """
    if slots < 0:
        raise UserError(f"--slots {slots} must not be negative; 0 is one for each GPU, or for each core")
    number = slots or len(gpus) or len(cores)
    share = max(1, len(cores) // number)
    return [
        Slot(
            tuple(cores[(slot * share + core) % len(cores)] for core in range(share)),
            gpus[slot % len(gpus)] if gpus else "",
        )
        for slot in range(number)
    ]


def usable_cores(cgroups: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Numbers of the cores this process may use, no more than a container's quota of processor time fills."""
    cores = sorted(os.sched_getaffinity(0))
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number, and no quota
            quota, period = (int(word) for name in files for word in (cgroups / name).read_text().split())
            if quota > 0:
                return cores[: max(1, math.ceil(quota / period))]
    return cores


def visible_gpus(variables: Mapping[str, str]) -> list[str]:
    """The GPUs that a process with these environment variables may use, asked without torch."""
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = re.findall(r"^GPU (\d+):", answer.stdout, re.M)
    if not found or (asked := variables.get("CUDA_VISIBLE_DEVICES")) is None:
        return found
    return [gpu for gpu in (one.strip() for one in asked.split(",")) if gpu and gpu != "-1"]


def environment(variables: Mapping[str, str], slot: Slot) -> dict[str, str]:
    """A worker's environment: this one without what a launcher of ranks has put there, and the slot's device."""
    kept = alone(variables) | {"OMP_NUM_THREADS": str(len(slot.cores)), "PYTHONUNBUFFERED": "1"}
    kept.setdefault("TOKENIZERS_PARALLELISM", "false" if len(slot.cores) == 1 else "true")
    if slot.gpu:
        kept["CUDA_VISIBLE_DEVICES"] = slot.gpu
    return kept
