"""The sidecar ends a process whose beats stay away, no other, and never outlives it; shown without torch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from finemask_ds.lock import lives
from tests.conftest import REPOSITORY

OWNER = """
import os, sys, time
from finemask_ds.engine.sidecar import Sidecar

sidecar = Sidecar("rank 7 on here", limit_sec=2)
child = os.fork()
if child == 0:  # It holds the pipe open, and neither beats nor ends.
    time.sleep(60)
    os._exit(0)
print(sidecar._process.pid, child, flush=True)
for line in sys.stdin:
    if line == "close\\n":
        sidecar.close()
        print("closed", flush=True)
    sidecar.beat() if line == "beat\\n" else None
"""


class Owner:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER], cwd=REPOSITORY, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.sidecar, self.child = map(int, self.process.stdout.readline().split())

    def say(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def beat_for(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.say("beat")
            time.sleep(0.2)


@pytest.fixture
def owner():  # type: ignore[no-untyped-def]
    owner = Owner()
    yield owner
    with contextlib.suppress(ProcessLookupError):
        os.kill(owner.child, signal.SIGKILL)
    owner.process.kill()
    owner.process.wait()
    assert ended(owner.sidecar)


def ended(pid: int) -> bool:
    """Whether a process ends within a bounded time; one whose parent has not asked for it counts."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not lives(pid):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_a_stopped_process_is_killed_and_named(owner: Owner) -> None:
    """Signals to all below the launcher, SIGTERM among them, do not keep the sidecar from it."""
    owner.beat_for(3)
    assert owner.process.poll() is None
    os.kill(owner.sidecar, signal.SIGTERM)
    os.killpg(owner.process.pid, signal.SIGSTOP)
    assert owner.process.wait(20) == -signal.SIGKILL
    assert owner.process.stderr is not None
    assert owner.process.stderr.readline().startswith("finemask: rank 7 on here gave no sign of life for 2 s")
    assert ended(owner.sidecar)


@pytest.mark.slow
def test_where_all_were_stopped_for_a_while_none_has_been_silent(owner: Owner) -> None:
    """A scheduler that suspends a job stops the sidecar too."""
    for pid in (owner.process.pid, owner.sidecar):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(5)
    for pid in (owner.sidecar, owner.process.pid):
        os.kill(pid, signal.SIGCONT)
    owner.beat_for(3)
    assert owner.process.poll() is None


@pytest.mark.parametrize("how", ["killed", "closed"])
def test_it_ends_with_its_process_and_its_use(owner: Owner, how: str) -> None:
    """Though a forked child holds the pipe open; a process that was killed is named, one that has closed it is not."""
    assert owner.process.stderr is not None
    if how == "closed":
        owner.say("close")
        assert owner.process.stdout is not None
        assert owner.process.stdout.readline() == "closed\n"
        assert ended(owner.sidecar)
    owner.process.kill()
    owner.process.wait()
    os.kill(owner.child, signal.SIGKILL)
    told = (
        "" if how == "closed" else "finemask: rank 7 on here ended without a word: killed, out of memory or crashed\n"
    )
    assert owner.process.stderr.read() == told
    assert ended(owner.sidecar)
