"""What a Ray task runs on its node: a worker as a process beside Ray's own, which torch never enters."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from finemask_ds.dispatch.local import Slot, environment
from finemask_ds.dispatch.process import end, has_ended, spawn


def run_worker(
    command: Sequence[str], arguments: Sequence[str], folder: str, log: str, threads: int, grace_sec: float
) -> tuple[str, int | None]:
    """Run a worker until it ends, or until this task is cancelled.

    Should this process die, as it does with its node's raylet or with the dispatcher, the worker ends by ``--parent``.

    Args:
        command: of a worker, before its arguments; empty for the ``finemask worker`` of this node.
        arguments: the worker's.
        folder: the dispatcher's working folder.
        log: a file which the dispatcher has made.
        threads: of the worker.
        grace_sec: from SIGTERM to SIGKILL.

    Returns:
        This host and the worker's exit code; None where the log is not there, as no file system is shared.
    """
    # By SIGINT Ray cancels a task; a raylet that a shell has started in the background ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    path = Path(folder, log)
    if not path.exists():
        return socket.gethostname(), None
    command = command or (sys.executable, "-m", "finemask_ds", "worker")
    worker = spawn(
        [*command, *arguments, "--parent", str(os.getpid())],
        path,
        environment(os.environ, Slot(tuple(range(threads)))),
        Path(folder),
    )
    try:
        while not has_ended(worker):
            time.sleep(0.1)
    except KeyboardInterrupt:
        pass
    finally:
        end([worker], grace_sec)
    return socket.gethostname(), worker.returncode
