"""A worker as a process: started in a session of its own, so that all it starts can be ended with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from finemask_ds.errors import UserError


def spawn(
    command: Sequence[str], log: Path, variables: Mapping[str, str], folder: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a worker that prints to the end of a log, which a Ctrl-C at the terminal does not reach.

    Args:
        command: its words.
        log: a relative one lies in this process's folder.
        variables: its environment.
        folder: its working folder; None for this process's.

    Raises:
        UserError: where the log cannot be written.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        stream = open(log, "ab")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"cannot write {log} ({error.strerror}): name a folder you may write") from error
    with stream:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, cwd=folder, env=variables,
            start_new_session=True,
        )  # fmt: skip


def has_ended(worker: subprocess.Popen[bytes]) -> bool:
    """Whether it has, without asking for its exit code: until then its pid, and its group's, belong to nobody else."""
    return (
        worker.returncode is not None
        or os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    )


def end(
    workers: Sequence[subprocess.Popen[bytes]], grace_sec: float, is_urgent: Callable[[], bool] = lambda: False
) -> None:
    """Ask workers to end, and end what is left of them and their children after the grace, or once it is urgent."""
    for worker in workers:
        if worker.returncode is None:  # terminate() would ask for the code: see has_ended.
            os.kill(worker.pid, signal.SIGTERM)
    try:
        await_ends(lambda: all(map(has_ended, workers)), grace_sec, is_urgent)
    finally:
        for worker in workers:
            reap(worker)


def await_ends(have_ended: Callable[[], bool], grace_sec: float, is_urgent: Callable[[], bool]) -> None:
    """Wait until workers that were asked to end have, at most for the grace or until it is urgent."""
    deadline = time.monotonic() + grace_sec
    while not have_ended() and time.monotonic() < deadline and not is_urgent():
        time.sleep(0.05)


def reap(worker: subprocess.Popen[bytes]) -> int:
    """End what is left of a worker and its children; its exit code."""
    if worker.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)
    return worker.wait()


def told(code: int) -> str:
    """An exit code in words: ``ended with exit code 1``."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else ""
    hint = ": out of memory, or somebody killed it" if -code == signal.SIGKILL else ""
    return f"was ended by signal {-code} ({name}{hint})"


def check_measured(code: int, log: Path) -> None:
    """Pass on what a worker that measured refused: a sentence about bad input, which all cells of the kind would meet.

    Raises:
        UserError: where its exit code says that there is one, in its log.
    """
    if code == 2:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        sentences = [line for line in lines if line.startswith("finemask: ")]
        raise UserError(sentences[-1].removeprefix("finemask: ") if sentences else f"a cell cannot begin, see {log}")
