"""How long the work itself has taken."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stopwatch:
    """Seconds over all restarts of a run, from now on, and those of all ranks together."""

    before_sec: float = 0.0
    """Of the starts before this one."""
    ranks: int = 1
    """Of this start."""
    before_rank_sec: float = 0.0
    """Of the ranks of the starts before this one."""
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self.before_sec + time.monotonic() - self.started

    @property
    def rank_seconds(self) -> float:
        """Seconds so far times the ranks that each start had."""
        return self.before_rank_sec + (self.seconds - self.before_sec) * self.ranks

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it."""
        return {"seconds": self.seconds, "rank_seconds": self.rank_seconds}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Add what the starts before this one took, as far as the checkpoint tells."""
        self.before_sec = state.get("seconds", 0.0)
        self.before_rank_sec = state.get("rank_seconds", self.before_sec * self.ranks)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what the block takes."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.started += time.monotonic() - began
