"""Ctrl-C, SIGTERM and the loss of the terminal as something to ask for, not something that happens anywhere."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

REPEAT_SEC = 1.0
"""Signals closer together than this are one: a launcher may pass on what its process has had already."""


def tell(what: str) -> None:
    """Say something on the way out; a lost terminal, or a `| tee` that had the same Ctrl-C, hears it no more."""
    with contextlib.suppress(OSError):
        print(f"finemask: {what}", file=sys.stderr, flush=True)


class Interrupted(BaseException):
    """The process was asked to end; no Exception, so that nothing mistakes it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number
        """As shells tell it."""


class Interruption:
    """Remembers that SIGINT, SIGTERM or SIGHUP came, and raises `Interrupted` only where that was allowed."""

    def __init__(self) -> None:
        self.signal = 0
        """The first signal that came; 0: none."""
        self.insists = False
        """Whether a further one came: what would still be done before the end is to be left."""
        self._first = 0.0
        self._raises = False
        self._deferred = False

    @property
    def asked(self) -> bool:
        """Whether to end."""
        return bool(self.signal)

    @contextlib.contextmanager
    def watching(self) -> Iterator[Interruption]:
        """Catch the signals while the block runs, SIGHUP not under nohup; do nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = [n for n in _ENDING if (n, signal.getsignal(n)) != (signal.SIGHUP, signal.SIG_IGN)]
        before: dict[int, Any] = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Raise `Interrupted` where a signal came before or comes during the block; once only."""
        try:
            self._raises = True
            if self.asked:
                raise Interrupted(self.signal)
            yield
        finally:
            self._raises = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Leave it to the block to look at `asked` and to raise `Interrupted` where it is ready."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal, self._first = number, time.monotonic()
        self.insists = self.insists or time.monotonic() - self._first > REPEAT_SEC
        if self._raises and not self._deferred:
            self._raises = False
            raise Interrupted(self.signal)


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
