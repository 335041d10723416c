"""`finemask status`: a plan as a table, live on a terminal."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from finemask_ds.dispatch.estimate import seconds_left
from finemask_ds.dispatch.plan import Plan
from finemask_ds.dispatch.survey import State, Survey, survey
from finemask_ds.errors import printable
from finemask_ds.units import duration

REFRESH_SEC = 2.0
_SHOWN = 12
"""Running and failed cells that a live table lists, each."""


def show_status(root: Path, *, once: bool = False, console: Console | None = None) -> None:
    """Print a plan's table, on a terminal again and again until nothing is left or Ctrl-C.

    Raises:
        UserError: where the folder holds no plan.
    """
    seen = survey(Plan.read(root), bury=False)
    console = console or Console()
    if once or not console.is_terminal:
        wide = console if console.is_terminal else Console(file=console.file, width=1000)
        wide.print(status(seen), soft_wrap=not console.is_terminal)
        return
    try:
        with Live(status(seen, _SHOWN), console=console, auto_refresh=False) as live:
            while seen.count(State.WAITING) + seen.count(State.RUNNING):
                time.sleep(REFRESH_SEC)
                seen = survey(Plan.read(root), seen, bury=False)
                live.update(status(seen, _SHOWN), refresh=True)
    except KeyboardInterrupt:
        pass


def status(seen: Survey, shown: int | None = None) -> RenderableType:
    """Counts by task and method, who runs what, what failed and why.

    Args:
        seen: the cells.
        shown: list only so many running and failed cells, each; None: all.
    """
    parts: list[RenderableType] = [_counts(seen), Text(_summary(seen))]
    running = [_running(cell.id, standing.attempts[-1].facts()) for cell, standing in seen.cells(State.RUNNING)]
    failed = []
    for cell, standing in seen.cells(State.FAILED, State.WAITING, State.RUNNING):
        if standing.failures:
            attempt, failure = standing.failures[-1]
            again = "" if standing.is_given_up(seen.plan.retries) else ", tried again"
            log = f", log {failure['log']}" if failure.get("log") else ""
            failed.append(f"  {cell.id}{again}: {standing.error} ({attempt.failed}{log})")
    for title, lines in (("running", running), ("failed", failed)):
        if lines:
            kept = lines[:shown]
            more = [f"  and {len(lines) - len(kept)} more"] if len(kept) < len(lines) else []
            parts.append(Text("\n".join(["", title, *map(printable, kept), *more])))
    return Group(*parts)


def _counts(seen: Survey) -> Table:
    counts: dict[tuple[str, str], Counter[State]] = defaultdict(Counter)
    for cell, standing in seen.cells(*State):
        counts[cell.task, cell.method][standing.state] += 1
        counts["total", ""][standing.state] += 1
    total = counts.pop(("total", ""), Counter())
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, title=str(seen.plan.root), title_justify="left")
    table.add_column("task", "total")
    table.add_column("method")
    for state in State:
        table.add_column(str(state), _number(total[state]), justify="right", style=_COLOUR[state])
    table.add_column("cells", str(total.total()), justify="right")
    for (task, method), one in counts.items():
        names = (Text(printable(name)) for name in (task, method))
        table.add_row(*names, *(_number(one[state]) for state in State), str(one.total()))
    return table


_COLOUR = {State.DONE: "green", State.RUNNING: "cyan", State.FAILED: "red", State.WAITING: ""}


def _number(count: int) -> str:
    return str(count) if count else "-"


def _summary(seen: Survey) -> str:
    running = seen.count(State.RUNNING)
    left = seconds_left(seen, max(running, 1))
    done = f"{seen.count(State.DONE)} of {len(seen.plan.cells)} cells are done"
    if not running + seen.count(State.WAITING):
        return done
    if not running:
        return f"{done}; nothing runs: dispatch again to go on, unless they wait in Slurm's queue"
    if left is None:
        return f"{done}, {running} running"
    return f"{done}, {running} running, about {duration(left)} left"


def _running(name: str, facts: dict[str, object]) -> str:
    start = facts.get("start")
    since = f" for {duration(max(0.0, time.time() - start))}" if isinstance(start, int | float) else ""
    return f"  {name}: on {facts.get('host', 'an unknown host')}, pid {facts.get('pid', '?')}{since}"
