"""The main job on the built-in language: every method at 70 %, through the deepspeed launcher, and what it is worth.

The searches end in a table of dev losses; then every subnetwork, and the full model, is fine-tuned on the five built-in
tasks with some seeds, which ends in a table of scores and a page.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from finemask_ds.data.tasks import BUILTIN_TASKS
from finemask_ds.errors import UserError
from finemask_ds.recipes.stages import Stage, run_stage, run_stages, table

SHARED = (
    *("--model", "builtin", "--data", "builtin", "--sparsity", "0.7", "--seq_len", "64", "--batch_size", "64"),
    *("--dropout", "0", "--log_every", "50", "--watch_every", "50", "--eval_every", "0"),
    *("--save_every", "100"),
)
"""Options of every search; no dropout, since nothing is read often enough to be learnt by heart."""

FAST = ("--preset", "fast")
"""Masks of few steps; the paper's setting is the default of launcher/tamt.py."""

STAGES = (
    Stage("pretrain", "pretrain.py"),
    Stage("random", "magnitude.py", ("--kind", "random"), ranks=0),
    Stage("omp", "magnitude.py", ("--kind", "omp"), ranks=0),
    Stage("imp", "imp.py", ("--interval_steps", "40", "--lr", "2e-4")),
    Stage("tamt-mlm", "tamt.py", ("--objective", "mlm", *FAST)),
    Stage("tamt-kd", "tamt.py", ("--objective", "kd", *FAST)),
)


def downstream(root: Path, seeds: Sequence[int], tasks: Sequence[str] = ()) -> Stage:
    """The sweep over all masks that were found, with these fine-tuning seeds, on these built-in tasks or on all."""
    masks = [str(stage.run(root).folder) for stage in STAGES if stage.searches]
    options = ("--model", "builtin", "--masks", *masks, "--seeds", *map(str, seeds))
    options += ("--tasks", *tasks) if tasks else ()
    return Stage("downstream", "dispatch.py", options, ranks=0)


def main_job(root: Path, seeds: Sequence[int], tasks: Sequence[str] = ()) -> str:
    """Run what is not done yet under ``root``: the table of losses, of scores, and the line that opens TensorBoard.

    Raises:
        UserError: before anything is run, for an unknown task.
    """
    for task in tasks:
        if task not in BUILTIN_TASKS:
            raise UserError(f"--tasks {task!r} is not built in; type some of {', '.join(BUILTIN_TASKS)}")
    losses = table(run_stages(STAGES, root, SHARED))
    print(f"\n{losses}\n", flush=True)
    run_stage(downstream(root, seeds, tasks), root)
    return f"watch the searches with: tensorboard --logdir {shlex.quote(str(root))}"
