"""Ctrl-C and SIGTERM as something to ask for, not something that happens anywhere."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """The process was asked to end; no Exception, so that nothing mistakes it for a failure."""


class Interruption:
    """Remembers that SIGINT or SIGTERM came, and raises `Interrupted` only where that was allowed."""

    def __init__(self) -> None:
        self.signal = 0
        """The first signal that came; 0: none."""
        self._raises = False
        self._deferred = False

    @property
    def asked(self) -> bool:
        """Whether to end."""
        return bool(self.signal)

    @contextlib.contextmanager
    def watching(self) -> Iterator[Interruption]:
        """Catch both signals while the block runs; outside the main thread, where none arrives, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before: dict[int, Any] = {number: signal.signal(number, self._handle) for number in _ENDING}
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
                raise Interrupted
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
        self.signal = self.signal or number
        if self._raises and not self._deferred:
            self._raises = False
            raise Interrupted


_ENDING = (signal.SIGINT, signal.SIGTERM)
