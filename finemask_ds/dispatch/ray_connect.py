"""The way into a Ray cluster that runs already, or one sentence why there is none; and what it has, as time goes by."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finemask_ds.errors import UserError

PROBE_SEC = 30.0
"""A cluster that has not answered by then is not there; Ray itself waits for minutes."""
LOOK_SEC = 1.0
"""Between two looks at the nodes."""
_PROBE = """import ray, sys
try:
    ray.init(sys.argv[1], log_to_driver=False)
except Exception as error:
    sys.exit(" ".join(str(error).split()))"""


def connect(address: str) -> Any:
    """Ray's module, connected to a cluster.

    Raises:
        UserError: as `usable`.
    """
    address = usable(address)
    import ray

    ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL)
    return ray


def usable(address: str) -> str:
    """The address of a cluster that answers, as another process was told; this one does not load Ray.

    Raises:
        UserError: where Ray is not installed or no cluster answers.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # else Ray prints what it thinks of tasks that ended
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # nor is a cluster ever started by a call
    if (Path.home() / ".ray" / "auth_token").exists():
        # Else Ray shows it only to a cluster that it finds by itself; one that asks for none does not mind.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if find_spec("ray") is None:
        raise UserError('--executor ray needs Ray: type pip install "finemask_ds[ray]"')
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    if reason := _objection(address):
        where = "of this machine" if address == "auto" else f"at {address}"
        raise UserError(
            f"no Ray cluster {where} can be used ({reason}): type ray start --address=HOST:PORT here and --ray_address "
            "HOST:PORT of a cluster that runs"
        )
    return address


def _objection(address: str) -> str:
    """Why a cluster cannot be used, "" if it can; tried in another process, as Ray waits for minutes and is loud."""
    if address != "auto":
        if not re.fullmatch(r"[^/]+:\d{1,5}", address):
            return "it is not given as HOST:PORT"
        if reason := _silence(address):
            return reason
    try:
        tried = subprocess.run(
            [sys.executable, "-c", _PROBE, address], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=PROBE_SEC, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"it has not answered within {PROBE_SEC:.0f} s"
    said = tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"]
    return said[-1] if tried.returncode else ""


def _silence(address: str) -> str:
    """Why nobody answers at HOST:PORT, "" where somebody does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        return str(error)
    return ""


class Nodes:
    """The nodes of a cluster; a thread asks for them, as whoever asks a lost head waits until Ray ends the process."""

    def __init__(self, ray: Any) -> None:
        """Ask for the first time, and from then on."""
        self._ray, self._head = ray, ray.get_runtime_context().gcs_address
        self._resources: list[Mapping[str, float]] = []
        self._answered, self._over = time.monotonic(), threading.Event()
        self._look()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def resources(self) -> list[Mapping[str, float]]:
        """What each node has that lived when the head last answered."""
        return self._resources

    @property
    def silent_sec(self) -> float:
        """How long ago that was."""
        return time.monotonic() - self._answered

    def answers(self) -> bool:
        """Whether the head is there at this moment."""
        return not _silence(self._head)

    def close(self) -> None:
        """Ask no more."""
        self._over.set()
        self._thread.join(timeout=LOOK_SEC)

    def _watch(self) -> None:
        while not self._over.wait(LOOK_SEC):
            with contextlib.suppress(Exception):  # Ray's, of a head that comes and goes: it is silent then
                self._look()

    def _look(self) -> None:
        self._resources = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        self._answered = time.monotonic()
