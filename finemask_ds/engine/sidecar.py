"""A tiny process beside a rank that ends it when it can no longer end itself.

A rank that is stopped (SIGSTOP), or whose interpreter is held by a call that never returns, runs no watchdog either,
and the launcher waits for it for ever. The sidecar hears the watchdog's beats over a pipe; when they stay away it kills
the rank. It lives in a session of its own, so that what stops the rank's group does not stop it, and ends with the
rank in any case. Its program is this file by itself, run without the package: a few MB, a few hundredths of a second.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

TICK_SEC = 1.0
_BEAT, _END = b".", b"!"


class Sidecar:
    """The rank's end of it."""

    def __init__(self, name: str, limit_sec: float):
        """Start the process.

        Args:
            name: of the rank, for what it says when the rank has ended without a word, or is ended by it.
            limit_sec: how long the beats may stay away.
        """
        import subprocess

        read, self._beats = os.pipe()
        os.set_blocking(self._beats, False)
        # Its standard error is the rank's, for its one line; of the rank's other files it holds none.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(__file__), str(os.getpid()), str(limit_sec), name],
            stdin=read, stdout=subprocess.DEVNULL, cwd="/", start_new_session=True,
        )  # fmt: skip
        os.close(read)

    def beat(self) -> None:
        """The rank lives; never waits, whatever has become of the sidecar."""
        self._sign(_BEAT)

    def dismiss(self) -> None:
        """The rank ends, or goes on without it."""
        # Said, not only closed: a process that the rank has forked may hold the pipe open.
        self._sign(_END)

    def close(self) -> None:
        """Dismiss it and wait until it is gone."""
        self.dismiss()
        os.close(self._beats)
        deadline = time.monotonic() + 3 * TICK_SEC
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(TICK_SEC / 100)
        self._process.kill()  # Does nothing where it has ended.
        self._process.wait()

    def _sign(self, sign: bytes) -> None:
        with contextlib.suppress(OSError):
            os.write(self._beats, sign)


def watch(beats: int, rank: int, limit_sec: float) -> str:
    """Wait until the rank dismisses its sidecar, ends, or its beats have stayed away for too long; which one it was.

    What is counted is ticks, not the clock: one that comes late because all of the machine, or all of the job, was
    stopped for a while counts as one.
    """
    poll = select.poll()
    poll.register(beats, select.POLLIN)
    silent_sec = 0.0
    while silent_sec <= limit_sec:
        signs = os.read(beats, 4096) if poll.poll(TICK_SEC * 1000) else None
        if signs is not None and signs.endswith(_END):
            return "dismissed"
        # A process whose parent is still the rank cannot take another's id for the rank's.
        if signs == b"" or os.getppid() != rank:
            return "ended"
        silent_sec = silent_sec + TICK_SEC if signs is None else 0.0
    return "silent"


def main(rank: int, limit_sec: float, name: str) -> None:
    """The sidecar's program; its standard input is the pipe."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # The launcher sends them to all below it; this ends with the rank.
    found, told = watch(0, rank, limit_sec), ""
    if found == "silent" and os.getppid() == rank:
        os.kill(rank, signal.SIGKILL)
        told = f"gave no sign of life for {limit_sec:.0f} s (stopped?) and was killed"
    elif found == "ended":
        told = "ended without a word: killed, out of memory or crashed"
    if told:
        print(f"finemask: {name} {told}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
