"""How far a run is: a progress bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING

from finemask_ds.engine.metrics import Destination
from finemask_ds.units import duration, readable

if TYPE_CHECKING:
    from rich.progress import Progress

SHOWN = ("train/", "dev/", "lr/", "speed/", "mask/sparsity/total")
_WINDOW = 20  # logged steps over which the speed is taken: a slow start must not haunt the estimate


class Console(Destination):
    """Shows the step, the metrics whose names start with one of `shown`, and the time left.

    `stream` defaults to standard error. On a terminal it is one bar, which shows losses and tokens per second
    only; elsewhere one line per logged step without any control code. `start_step` is the step a resumed run
    starts from.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        stream: IO[str] | None = None,
        shown: tuple[str, ...] = SHOWN,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._stream = stream or sys.stderr
        self._shown = shown
        self._clock = clock
        self._marks = deque([(clock(), start_step)], maxlen=_WINDOW)
        self._bar = _start_bar(self._stream, total_steps, start_step) if self._stream.isatty() else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Show one logged step."""
        eta = self._eta(step)
        shown = {name: value for name, value in values.items() if name.startswith(self._shown)}
        if self._bar is None:
            metrics = (f"{name} {readable(value)}" for name, value in shown.items())
            parts = [f"step {step}/{self._total}", *metrics, *([f"eta {eta}"] if eta else [])]
            print(*parts, sep="  ", file=self._stream, flush=True)
            return
        losses = {name.removeprefix("train/"): value for name, value in shown.items() if "loss" in name}
        parts = [f"{name} {readable(value)}" for name, value in losses.items()]
        if "speed/tokens_per_sec" in shown:
            parts.append(f"{readable(shown['speed/tokens_per_sec'])} tokens/s")
        self._bar.update(self._bar.task_ids[0], completed=step, metrics="  ".join(parts), eta=eta, refresh=True)

    def _eta(self, step: int) -> str:
        now = self._clock()
        then, first = self._marks[0]
        self._marks.append((now, step))
        if not first < step < self._total:
            return ""
        return duration((now - then) / (step - first) * (self._total - step))

    def close(self) -> None:
        """Leave the bar as it stands and give the terminal back."""
        if self._bar is not None:
            self._bar.stop()


def _start_bar(stream: IO[str], total: int, start: int) -> Progress:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    bar = Progress(
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[metrics]}"),
        TextColumn("[cyan]{task.fields[eta]}"),
        console=RichConsole(file=stream),
        # A refreshing thread would hold a lock that a forked data worker inherits.
        auto_refresh=False,
        expand=True,
    )
    bar.add_task("steps", total=total, completed=start, metrics="", eta="")
    bar.start()
    return bar
