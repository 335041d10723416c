"""What a person sees while a plan runs: a line for each cell that ends, and on a terminal a live bar."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from finemask_ds.dispatch.estimate import seconds_left
from finemask_ds.dispatch.plan import Cell
from finemask_ds.dispatch.survey import Standing, State, Survey
from finemask_ds.errors import printable
from finemask_ds.units import duration


class Progress:
    """Tells of every cell once when it is done, and of every attempt once when it has failed."""

    def __init__(self, slots: int, console: Console | None = None) -> None:
        self._console = console or Console()
        self._slots = slots
        self._told: dict[str, tuple[bool, int]] = {}
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._bar = Bar(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("cells", total=None, left="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._even_unheard():
            self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        with self._even_unheard():
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
            self._console.file.flush()

    @contextlib.contextmanager
    def _even_unheard(self) -> Iterator[None]:
        """Go on in silence where nobody reads it any more: workers that save must not be left for that."""
        try:
            yield
        except (OSError, SystemExit):  # rich exits where a pipe is broken
            self._console.quiet = True

    def begin(self, seen: Survey, place: str) -> None:
        """The plan's size; what has ended before is not told again."""
        self._told = {cell.id: _ended(standing) for cell, standing in seen.cells(*State)}
        done, running = seen.count(State.DONE), seen.count(State.RUNNING)
        elsewhere = f", {running} running elsewhere" if running else ""
        left = len(seen.plan.cells) - done - running
        self.say(
            f"plan {seen.plan.root}: {len(seen.plan.cells)} cells, {done} done{elsewhere}, {left} to run on {place}"
        )

    def update(self, seen: Survey) -> None:
        """Tell what has ended since the last look."""
        left_sec = seconds_left(seen, self._slots)
        left = "" if left_sec is None else f"about {duration(left_sec)} left"
        done = seen.count(State.DONE)
        for cell, standing in seen.cells(*State):
            if (ended := _ended(standing)) != self._told.get(cell.id, (False, 0)):
                self._told[cell.id] = ended
                line = _line(cell, standing, seen)
                self.say(f"[{done}/{len(seen.plan.cells)}] {line}{f', {left}' if left and done else ''}")
        self._bar.update(self._task, completed=done, total=len(seen.plan.cells), left=left)

    def end(self, seen: Survey) -> None:
        """What has come of it all."""
        self.update(seen)
        failed = list(seen.cells(State.FAILED))
        if failed or seen.count(State.DONE) == len(seen.plan.cells):
            self.say(f"{seen.count(State.DONE)} of {len(seen.plan.cells)} cells are done, {len(failed)} failed")


def _ended(standing: Standing) -> tuple[bool, int]:
    return standing.state is State.DONE, len(standing.failures)


def _line(cell: Cell, standing: Standing, seen: Survey) -> str:
    if standing.state is State.DONE:
        result = standing.result
        seconds = result.get("seconds")
        told = f" in {duration(seconds)}" if isinstance(seconds, int | float) else ""
        score = result["score"]
        shown = f"{score:.4f}" if isinstance(score, int | float) else f"undefined ({result.get('undefined')})"
        return printable(f"{cell.id}: {result.get('metric', 'score')} {shown}{told}")
    if not standing.failures:
        return f"{cell.id}: {standing.state}"
    again = "given up" if standing.is_given_up(seen.plan.retries) else "tried again"
    tried = f"attempt {len(standing.failures)} of {seen.plan.retries + 1}"
    return printable(f"{cell.id}: failed, {tried}, {again}: {standing.error} ({standing.failures[-1][0].failed})")
