"""The main job on the built-in language: every method at 70 %, through the deepspeed launcher, in one table."""

from __future__ import annotations

from pathlib import Path

from finemask_ds.recipes.stages import Stage, run_stages, table

SHARED = (
    *("--model", "builtin", "--data", "builtin", "--sparsity", "0.7", "--seq_len", "64", "--batch_size", "64"),
    *("--dropout", "0", "--log_every", "50", "--watch_every", "50", "--eval_every", "0"),
    *("--save_every", "100"),
)
"""Options of every search; no dropout, since nothing is read often enough to be learnt by heart."""

RANKED = ("--init", "ranked", "--mask_lr", "1e-3", "--steps", "200")
"""The masks' start and rate for few steps; the paper's are the defaults of launcher/tamt.py."""

STAGES = (
    Stage("pretrain", "pretrain.py"),
    Stage("random", "magnitude.py", ("--kind", "random"), ranks=0),
    Stage("omp", "magnitude.py", ("--kind", "omp"), ranks=0),
    Stage("imp", "imp.py", ("--interval_steps", "40", "--lr", "2e-4")),
    Stage("tamt-mlm", "tamt.py", ("--objective", "mlm", *RANKED)),
    Stage("tamt-kd", "tamt.py", ("--objective", "kd", *RANKED)),
)


def main_job(root: Path) -> str:
    """Run what is not done yet under ``root``; the table, and the line that opens TensorBoard."""
    return f"{table(run_stages(STAGES, root, SHARED))}\n\nwatch the searches with: tensorboard --logdir {root}"
