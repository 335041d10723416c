"""From masks to scores: one fine-tuning, a sweep of them, and a search that ends in a sweep."""

from __future__ import annotations

import dataclasses
import os
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finemask_ds.config import FinetuneConfig, SearchConfig, SweepConfig
from finemask_ds.config.knobs import DispatchKnobs
from finemask_ds.data.tasks import default_tasks, task_named
from finemask_ds.dispatch.executor import dispatch
from finemask_ds.dispatch.executors import check_executor, executor_of
from finemask_ds.dispatch.plan import Plan
from finemask_ds.dispatch.plan import sweep as sweep_of
from finemask_ds.dispatch.survey import State
from finemask_ds.engine.local import accelerated
from finemask_ds.engine.world import this_process
from finemask_ds.errors import UserError
from finemask_ds.finetune.job import check_cells, check_tasks, with_model
from finemask_ds.finetune.train import fine_tune
from finemask_ds.lock import lives
from finemask_ds.options import parse
from finemask_ds.report.write import score_tables, write_report
from finemask_ds.search.dense import resolve_model
from finemask_ds.session import ranks_of, search, summary
from finemask_ds.signals import Interruption

GONE_SEC = 60.0
"""How long the other ranks of this host may take to end after a search."""


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune a subnetwork, or the full model, on a task, on the ranks that accelerate has started; its result."""
    config = with_model(config, [config.mask])
    with accelerated() as world:
        model = resolve_model(config.model, world)
        if world.size > 1:  # Of which each is asked by itself.
            return fine_tune(config, world, model=model)
        with Interruption().watching() as interruption, interruption.raising():
            return fine_tune(config, world, model=model, interruption=interruption)


def sweep(config: SweepConfig) -> str:
    """Fine-tune every mask on every task with every seed, as far as that is not done; the table and its page.

    Raises:
        UserError: for bad input, before anything starts; where cells failed for good, at the end.
    """
    if not config.masks and config.full == "no":
        raise UserError("there is nothing to fine-tune; type --masks with mask files or run directories of searches")
    config, root = with_model(config, config.masks), Path(config.run)
    tasks = [task_named(name, "--tasks") for name in config.tasks or default_tasks(config.model)]
    cells = sweep_of(
        config.masks, [task.name for task in tasks], config.seeds, config.num_samples,
        with_full=config.full == "yes", **config.shared_options(),
    )  # fmt: skip
    check_tasks(config, tasks)
    check_cells(config, resolve_model(config.model, this_process()))
    executor = executor_of(config)
    plan = Plan.write(root, cells, retries=config.retries)
    seen = dispatch(plan, executor, forgive=config.wait != "tidy")
    if not executor.waits and (left := len(plan.cells) - seen.count(State.DONE) - seen.count(State.FAILED)):
        return f"{left} of {len(plan.cells)} cells are left; look with: finemask status {shlex.quote(str(root))}"
    searches = [path for path in map(Path, config.masks) if path.is_dir()]
    page, left_out = write_report([root, *searches], None)
    if failed := seen.count(State.FAILED):
        raise UserError(
            f"{failed} of {len(plan.cells)} cells failed, see finemask status {shlex.quote(str(root))}; the same "
            f"command tries them again (what is done is in {page})"
        )
    return "\n".join([score_tables([root, *searches]), *left_out, f"page {page}"])


def search_then_sweep(config: SearchConfig) -> dict[str, Any]:
    """Search; with ``--dispatch``, the first rank then becomes the dispatcher once all ranks are gone from the devices.

    The first rank's process is replaced, not called from, so that nothing of the search stays on its device; its exit
    code is the sweep's.
    """
    with ranks_of(config) as world:
        world.on_first(lambda: _check_dispatch(config))
        result = search(config, world)
        ranks = world.gather((socket.gethostname(), os.getpid()))
    if config.dispatch != "no" and world.is_first:
        print(summary(result), flush=True)
        _wait_until_gone([pid for host, pid in ranks[1:] if host == socket.gethostname()])
        command = [
            sys.executable,
            str(Path(sys.argv[0]).with_name("dispatch.py")),
            *sweep_options(config, result["run"]),
        ]
        os.execv(sys.executable, command)
    return result


def _check_dispatch(config: SearchConfig) -> None:
    """Refuse before the search what would end the sweep after it.

    Raises:
        UserError: an unknown task of ``--tasks``, or one that ``--task_data`` does not have; what the executor refuses.
    """
    if config.dispatch == "no":
        return
    asked = parse(SweepConfig, sweep_options(config, config.run))
    try:
        check_executor(asked)
    except UserError as error:
        raise UserError(f"--dispatch {config.dispatch}: {error} (--executor is --dispatch here)") from error
    tasks = [task_named(name, "--tasks") for name in config.tasks or default_tasks(config.model)]
    try:
        check_tasks(asked, tasks)
    except UserError as error:
        raise UserError(f"the tasks of --dispatch: {error} (what is --data there is --task_data here)") from error


def sweep_options(config: SearchConfig, run: str) -> list[str]:
    """The options of launcher/dispatch.py for the mask that a search has left in ``run``."""
    options = ["--masks", run, "--model", config.model, "--run", str(Path(run) / "downstream")]
    options += ["--executor", config.dispatch, "--seeds", *map(str, config.finetune_seeds)]
    for name, value in {"data": config.task_data, "tasks": config.tasks, **dispatched(config)}.items():
        if value:
            options += [f"--{name}", *([str(value)] if isinstance(value, str | int) else map(str, value))]
    if config.dispatch == "slurm" and (job := os.environ.get("SLURM_JOB_ID")):
        options += ["--wait", "no", "--after", job]  # waiting would hold the devices of the search
    return options


def dispatched(config: DispatchKnobs) -> dict[str, Any]:
    """The knobs of dispatching, which a search hands on to the sweep."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(DispatchKnobs)}


def _wait_until_gone(pids: Sequence[int]) -> None:
    deadline = time.monotonic() + GONE_SEC
    while time.monotonic() < deadline and any(map(lives, pids)):
        time.sleep(0.1)
