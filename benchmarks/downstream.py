#!/usr/bin/env python
"""The downstream proof on real data: full, TAMT-KD, OMP and random at 70 % on five tasks, as one plan of cells.

    python benchmarks/downstream.py --shared ../shared

Makes the masks under runs/downstream, fine-tunes what results/downstream does not hold yet, copies each result there
and writes the report. A second call, on this machine or another, goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from finemask_ds.dispatch.executor import dispatch
from finemask_ds.dispatch.local import LocalExecutor
from finemask_ds.dispatch.plan import Cell, Plan, sweep
from finemask_ds.recipes.stages import REPOSITORY, Stage, run_stages
from finemask_ds.report.write import write_report
from finemask_ds.run import read_json, write_json

ROOT = Path("runs/downstream")
KEPT = REPOSITORY / "results/downstream/cells"
STAGES = (
    Stage("tamt-kd", "tamt.py", ("--objective", "kd", "--init", "ranked", "--mask_lr", "1e-4", "--steps", "300")),
    Stage("omp", "magnitude.py", ("--kind", "omp"), ranks=0),
    Stage("random", "magnitude.py", ("--kind", "random"), ranks=0),
)
NUM_QUESTIONS = 1000
SMALL = ("cola", "mrpc", "stsb")
"""Tasks that are fine-tuned on whole."""


def plan_of(data: Path, model: str, rate: float) -> list[Cell]:
    """The first seed of everything first, so that a plan that is cut short compares all methods already."""
    masks = [ROOT / stage.name / "mask.safetensors" for stage in STAGES]
    shared = options(data, model, rate)
    return [
        *sweep(masks, SMALL, [1], **shared),
        *sweep(masks, ["sst2"], [1], [2000], **shared),
        *sweep(masks, ["squad"], [1], [NUM_QUESTIONS], **shared),
        *sweep(masks, SMALL, [2, 3], **shared),
    ]


def options(data: Path, model: str, rate: float) -> dict[str, Any]:
    """What all cells have in common."""
    return {"model": model, "data": str(data), "lr": rate or None, "micro_batch_size": 16}


def cut_data(shared: Path, root: Path) -> Path:
    """GLUE as it is, SQuAD with the first 1,000 dev questions."""
    if not (root / "glue").exists():  # which comes last
        (root / "squad").mkdir(parents=True, exist_ok=True)
        shutil.copy(shared / "squad/train-subset.json", root / "squad/train-v1.1.json")
        told = read_json(shared / "squad/dev-v1.1.json")
        left = NUM_QUESTIONS
        for article in told["data"]:
            for paragraph in article["paragraphs"]:
                paragraph["qas"] = paragraph["qas"][:left]
                left -= len(paragraph["qas"])
        write_json(root / "squad/dev-v1.1.json", told)
        (root / "glue").symlink_to((shared / "glue").resolve())
    return root


def exchange(plan: Plan, folder: Path) -> None:
    """Results that are kept in the folder count as done; what is done is kept there."""
    for cell in plan.cells:
        kept, own = folder / f"{cell.id}.json", plan.folder(cell) / "result.json"
        if kept.exists() and not own.exists():
            write_json(own, read_json(kept))
        elif own.exists() and not kept.exists():
            write_json(kept, read_json(own))


def complete(plan: Plan, folder: Path) -> None:
    """Fine-tune what the folder does not hold yet, and keep it there."""
    exchange(plan, folder)
    try:
        dispatch(plan, LocalExecutor())
    finally:
        exchange(plan, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and models/")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak rate of every task; 0: those of TAMT Table 1")
    arguments = parser.parse_args()
    shared = arguments.shared.resolve()  # Cells are told by the model's path.
    model = str(shared / "models/all-MiniLM-L6-v2")
    searched = (
        *("--model", model, "--data", str(shared / "data/wikitext-2"), "--sparsity", "0.7"),
        *("--seq_len", "128", "--batch_size", "8", "--dropout", "0", "--dev_blocks", "200", "--eval_batch_size", "8"),
        *("--log_every", "25", "--eval_every", "100", "--save_every", "100"),
    )
    run_stages(STAGES, ROOT, searched)
    cells = plan_of(cut_data(shared / "data", ROOT / "data"), model, arguments.lr)
    plan = Plan.write(ROOT / f"plan-{arguments.lr:g}", cells)
    try:
        complete(plan, KEPT)
    finally:
        page, left_out = write_report([plan.root, *(ROOT / stage.name for stage in STAGES)], None)
        print(*left_out, page, sep="\n")


if __name__ == "__main__":
    main()
