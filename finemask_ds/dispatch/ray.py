"""Workers as tasks of a Ray cluster that runs already: on hosts where ``ray start`` was typed, or under Kubernetes.

Ray only says where a worker runs and whether its node lives; what is done, the files say.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finemask_ds.dispatch.attempt import end_attempts
from finemask_ds.dispatch.executor import Executor
from finemask_ds.dispatch.local import MEASURE_SEC
from finemask_ds.dispatch.plan import Plan
from finemask_ds.dispatch.process import await_ends, check_measured, told
from finemask_ds.dispatch.ray_connect import Nodes, connect, usable
from finemask_ds.dispatch.ray_task import run_worker
from finemask_ds.dispatch.worker import GRACE_SEC
from finemask_ds.errors import UserError
from finemask_ds.run import disk_full_is_user_error

LOST_SEC = 120.0
"""So long a cluster may have no room for a single worker."""
GONE_SEC = 30.0
"""So long its head may be silent; after 60 s Ray itself ends this process, without a word to the reader."""
_NAMES = {"num_cpus": "CPU", "num_gpus": "GPU"}
"""Options of Ray's tasks that are called otherwise among a node's resources."""


class RayExecutor(Executor):
    """Keeps one task in the cluster for each worker that its nodes have room for; nodes may come and go."""

    def __init__(
        self,
        address: str = "",
        slots: int = 0,
        job_options: Sequence[str] = (),
        command: Sequence[str] | None = None,
        grace_sec: float = GRACE_SEC,
        gone_sec: float = GONE_SEC,
    ) -> None:
        """Connect to the cluster.

        Args:
            address: HOST:PORT of its head; "" for RAY_ADDRESS, or the cluster that this machine belongs to.
            slots: how many workers at a time; 0: as many as its nodes have room for.
            job_options: NAME=VALUE, what a worker needs: num_cpus, num_gpus, memory (bytes), resources by name.
            command: of a worker, before its arguments (`commands.sweep`); None for ``finemask worker``.
            grace_sec: from SIGTERM to SIGKILL.
            gone_sec: so long the cluster's head may be silent.

        Raises:
            UserError: where Ray is not installed, no cluster answers or no node can hold a worker.
        """
        asked = _numbers(job_options)
        self._ray = connect(address)
        self._slots, self._command = slots, tuple(command or ())
        self._grace_sec, self._gone_sec = grace_sec, gone_sec
        self._cluster = f"the Ray cluster at {self._ray.get_runtime_context().gcs_address}"
        self._nodes, self._had_room = Nodes(self._ray), time.monotonic()
        self._run = self._ray.remote(run_worker)
        self._name, self._started, self._last_end = f"ray-{secrets.token_hex(4)}", 0, ""
        self._tasks: dict[Any, tuple[str, Path]] = {}  # Ray's reference -> job and log
        try:
            self._needs = self._complete(asked)
            if not self.slots:
                raise UserError(
                    f"no node of {self._cluster} has {self._each}: ask for less by --job_options, or type --slots to "
                    "wait for nodes that it adds by itself"
                )
        except UserError:
            self._leave()
            raise

    @staticmethod
    def check(address: str, job_options: Sequence[str]) -> None:
        """Refuse what the constructor would, as far as that can be known without a connection.

        Raises:
            UserError: where Ray is not installed, no cluster answers or an option is no amount.
        """
        _numbers(job_options)
        usable(address)

    @property
    def slots(self) -> int:
        """See the base class."""
        return self._slots or self._room()

    @property
    def place(self) -> str:
        """See the base class."""
        return f"{self.slots} worker{'s' * (self.slots > 1)} of {self._cluster}, {self._each} each"

    def start(self, plan: Plan, waiting: Sequence[str]) -> int:
        """See the base class."""
        fresh = sum(map(_is_empty, (log for _, log in self._tasks.values())))  # each will take a cell that waits
        free = max(0, min(self.slots - len(self._tasks), len(waiting) - fresh))
        if not free or not self._nodes.answers():
            return 0
        for _ in range(free):
            self._started += 1
            job = f"{self._name}-{self._started}"
            log = plan.logs / f"{job}.log"
            self._tasks[self._submit(plan, job, log)] = job, log
        return free

    def poll(self, plan: Plan) -> int:
        """See the base class.

        Raises:
            UserError: where a node does not see the plan, or the head or all nodes have been gone for long.
        """
        self._check_head()
        self._had_room = time.monotonic() if self.slots else self._had_room
        if time.monotonic() - self._had_room > LOST_SEC:
            raise UserError(
                f"{self._cluster} has had no node with {self._each} for {LOST_SEC:.0f} s: start nodes by ray start, "
                "then type the same command"
            )
        for task in self._ended(list(self._tasks)):
            job, log = self._tasks.pop(task)
            how = self._how(plan, task)
            self._last_end = f"the last {how}, see {log}"
            end_attempts(plan.folders, job, f"the worker {how}")
        return len(self._tasks)

    def stop(self, plan: Plan, is_urgent: Callable[[], bool]) -> str:
        """See the base class."""
        self._cancel(list(self._tasks), is_urgent)
        for job, _ in self._tasks.values():
            end_attempts(plan.folders, job)
        self._tasks.clear()
        self._leave()
        return ""

    def advice(self, plan: Plan) -> str:
        """See the base class."""
        return self._last_end or f"see {plan.logs}"

    def measure(self, plan: Plan, is_over: Callable[[], bool]) -> None:
        """See the base class."""
        log = plan.logs / "measure.log"
        log.unlink(missing_ok=True)
        task = self._submit(plan, f"{self._name}-measure", log, "--measure")
        deadline = time.monotonic() + MEASURE_SEC
        while not self._ended([task], wait_sec=0.1):
            self._check_head()
            if is_over() or time.monotonic() > deadline:
                return self._cancel([task], is_over)
        try:
            check_measured(self._result(plan, task)[1], log)
        except self._ray.exceptions.RayError as error:
            raise UserError(
                f"no worker can begin in {self._cluster} ({self._reason(error)}): install finemask_ds on its nodes"
            ) from error

    def _has_lost_head(self) -> bool:
        # Where it answers, only this process stood still.
        return self._nodes.silent_sec > self._gone_sec and not self._nodes.answers()

    def _check_head(self) -> None:
        if self._has_lost_head():
            raise UserError(f"{self._cluster} is gone: start it again, then type the same command")

    def _leave(self) -> None:
        self._nodes.close()
        if self._nodes.answers():  # else Ray would wait for minutes, and what it holds goes with this process
            self._ray.shutdown()

    def _submit(self, plan: Plan, job: str, log: Path, *options: str) -> Any:
        with disk_full_is_user_error(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            log.touch()
        rest = {name: need for name, need in self._needs.items() if name not in ("CPU", "GPU", "memory")}
        task = self._run.options(
            num_cpus=self._needs.get("CPU", 0), num_gpus=self._needs.get("GPU", 0), memory=self._needs.get("memory"),
            resources=rest, max_retries=0, scheduling_strategy="SPREAD",
        )  # fmt: skip
        arguments = (str(plan.root), "--log", str(log), "--job", job, *options)
        threads = max(1, int(self._needs.get("CPU", 1)))
        return task.remote(self._command, arguments, os.getcwd(), str(log), threads, self._grace_sec)

    def _ended(self, tasks: list[Any], wait_sec: float = 0.0) -> list[Any]:
        return list(self._ray.wait(tasks, num_returns=len(tasks), timeout=wait_sec)[0]) if tasks else []

    def _cancel(self, tasks: list[Any], is_urgent: Callable[[], bool]) -> None:
        """End tasks tidily, then at once."""
        for task in tasks:
            self._ray.cancel(task)
        await_ends(
            lambda: len(self._ended(tasks)) == len(tasks), self._grace_sec + 2,
            lambda: is_urgent() or self._has_lost_head(),
        )  # fmt: skip
        ended = self._ended(tasks)
        for task in tasks:
            if task not in ended:
                self._ray.cancel(task, force=True)

    def _result(self, plan: Plan, task: Any) -> tuple[str, int]:
        """Host and exit code of a worker that has ended.

        Raises:
            UserError: where its node does not see the plan.
            RayError: where its node or Ray's part of it died first.
        """
        host, code = self._ray.get(task)
        if code is None:
            raise UserError(
                f"{host} does not see {plan.root.absolute()}: mount the shared file system there, or type --run with a "
                f"folder that every node of {self._cluster} sees"
            )
        return host, code

    def _how(self, plan: Plan, task: Any) -> str:
        try:
            host, code = self._result(plan, task)
            return f"on {host} {told(code)}"
        except self._ray.exceptions.RayError as error:
            return f"was lost: {self._reason(error)}"

    def _reason(self, error: Exception) -> str:
        """Why a task has no result: the last line of an error in its Python, else Ray's first sentence."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return lines[-1] if isinstance(error, self._ray.exceptions.RayTaskError) else lines[0].split(". ")[0]

    @property
    def _each(self) -> str:
        options = {resource: option for option, resource in _NAMES.items()}
        return " ".join(f"{options.get(name, name)}={need:g}" for name, need in self._needs.items())

    def _complete(self, asked: Mapping[str, float]) -> dict[str, float]:
        """What a worker needs, by Ray's names: as asked, else a core, and a GPU where the cluster has any."""
        known = {
            name for node in self._nodes.resources for name in node if not name.startswith(("node:", "object_store"))
        }
        known |= {"CPU", "GPU", "memory"}
        if unknown := sorted(asked.keys() - known):
            options = sorted({name for name in known if name.islower()} | _NAMES.keys())
            raise UserError(
                f"--job_options {unknown[0]}={asked[unknown[0]]:g} names nothing that a node of {self._cluster} has; "
                f"type one of {' '.join(options)}"
            )
        gpus = any(node.get("GPU", 0) >= 1 for node in self._nodes.resources)
        needs = {"CPU": 1.0, "GPU": float(gpus), **asked}
        if not any(needs.values()):
            raise UserError("--job_options asks for nothing; type for instance num_cpus=1")
        return {name: need for name, need in needs.items() if need}

    def _room(self) -> int:
        """How many workers the nodes can hold; Ray counts in ten-thousandths."""
        each = {name: max(1, round(need * 10_000)) for name, need in self._needs.items()}
        return sum(
            min(round(node.get(name, 0) * 10_000) // need for name, need in each.items())
            for node in self._nodes.resources
        )


def _is_empty(log: Path) -> bool:
    try:
        return log.stat().st_size == 0
    except OSError:  # somebody tidied up, or a network file system stutters
        return False


def _numbers(job_options: Sequence[str]) -> dict[str, float]:
    """NAME=VALUE as resources by Ray's names.

    Raises:
        UserError: where a value is no number.
    """
    found = {}
    for option in job_options:
        name, _, value = option.partition("=")
        try:
            found[_NAMES.get(name, name)] = number = float(value)
        except ValueError:
            number = -1.0
        if not 0 <= number < float("inf"):
            raise UserError(f"--job_options {option} is no amount of a resource; type a number, as in num_cpus=4")
    return found
