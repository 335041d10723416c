"""How long the work itself has taken."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Stopwatch:
    """Seconds over all restarts of a run, from now on."""

    before_sec: float = 0.0
    """Of the starts before this one."""
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self.before_sec + time.monotonic() - self.started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what the block takes."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.started += time.monotonic() - began
