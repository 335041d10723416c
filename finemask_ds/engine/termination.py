"""SIGTERM, which schedulers send some time before they kill, and Ctrl-C: a rank that trains saves, any other ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEAT_SEC = 5.0
"""Signals closer together than this are one: the scheduler may send it to a rank, and the launcher once more."""


class Terminated(BaseException):
    """All ranks have saved and end, because some of them were asked to; the message is for the user."""


class Termination:
    """Whether this process was asked to end, and what becomes of it then.

    A thread listens, because the main thread may wait in a collective, where Python calls no handler.
    """

    def __init__(self) -> None:
        self.asked = False
        """Whether a signal came while the rank trained: the loop tells the other ranks, and all save."""
        self.signal = signal.SIGTERM
        """The one that came; where only other ranks were asked, as a scheduler asks."""
        self.before_end: Callable[[], None] = lambda: None
        """Called before this process ends at once."""
        self._trains = False

    @classmethod
    def current(cls) -> Termination:
        """The one that handles this process's signals; where none does, one that is never asked."""
        handlers = [getattr(signal.getsignal(number), "__self__", None) for number in _SIGNALS]  # one may be ignored
        return next((handler for handler in handlers if isinstance(handler, cls)), None) or cls()

    @property
    def exit_code(self) -> int:
        """As shells tell it."""
        return 128 + self.signal

    @contextlib.contextmanager
    def handling(self) -> Iterator[None]:
        """Handle SIGTERM and Ctrl-C, unless ignored as in the background, in the block; in the main thread only."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        listener = threading.Thread(target=self._listen, args=(read,), name="finemask-sigterm", daemon=True)
        listener.start()
        told_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        numbers = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        handled_before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in handled_before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(told_before)
            os.close(write)
            listener.join()
            os.close(read)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Where a signal is only remembered, as the loop looks at ``asked`` in each step."""
        self._trains = True
        try:
            yield
        finally:
            self._trains = False
        if self.asked:
            self._end("after the last step")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Python calls this in the main thread, whenever that comes to it; the listener has heard already."""

    def _listen(self, read: int) -> None:
        first = 0.0
        while signals := os.read(read, 64):
            came = [number for number in _SIGNALS if number in signals]
            if not came:
                continue
            if not self.asked:
                self.signal = came[0]
            if not self._trains:
                self._end("outside of training")
            if self.asked and time.monotonic() - first > REPEAT_SEC:
                self._end("at the second one, before the step was done")
            if not self.asked:
                self.asked, first = True, time.monotonic()

    def _end(self, when: str) -> NoReturn:
        """Leave at once; one rank of each host says so."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            ended = f"ended on {socket.gethostname()} {when}; what is done and the last checkpoint stay"
            # The main thread may have turned sys.stderr elsewhere, as while a library is kept quiet.
            print(
                f"finemask: {self.signal.name}: {ended}, and the same command goes on", file=sys.__stderr__, flush=True
            )
        self.before_end()
        os._exit(self.exit_code)
