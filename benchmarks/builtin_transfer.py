#!/usr/bin/env python
"""What pre-training is worth on the built-in tasks: the built-in encoder against one of random weights, as cells.

    python benchmarks/builtin_transfer.py

Writes results/builtin_transfer.json and prints the table for results/README.md; a second call reuses its cells.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from finemask_ds.config import PretrainConfig
from finemask_ds.data import builtin
from finemask_ds.data.tasks import BUILTIN_TASKS, TASKS
from finemask_ds.dispatch.executor import dispatch
from finemask_ds.dispatch.local import LocalExecutor
from finemask_ds.dispatch.plan import Plan, sweep
from finemask_ds.models.load import save_folder
from finemask_ds.provenance import collect
from finemask_ds.recipes.stages import REPOSITORY
from finemask_ds.report.table import markdown
from finemask_ds.run import read_json, write_json
from finemask_ds.session import pretrain


def random_encoder(pretrained: str, folder: Path) -> Path:
    """The same configuration and initial position embeddings, nothing learnt."""
    if not folder.exists():
        torch.manual_seed(0)
        model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(pretrained))
        with torch.no_grad():
            positions = torch.from_numpy(builtin.initial_positions())
            model.base_model.embeddings.position_embeddings.weight.copy_(positions)
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_folder(model, AutoTokenizer.from_pretrained(pretrained), folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--root", type=Path, default=Path("runs/builtin_transfer"))
    arguments = parser.parse_args()
    pretrained = pretrain(PretrainConfig())
    encoders = {"pretrained": pretrained, "random": str(random_encoder(pretrained, arguments.root / "random"))}
    scores: dict[str, dict[str, list[float]]] = {name: {} for name in encoders}
    for name, folder in encoders.items():
        cells = sweep([], BUILTIN_TASKS, arguments.seeds, model=folder)
        plan = Plan.write(arguments.root / name, cells)
        dispatch(plan, LocalExecutor())
        for cell in plan.cells:
            scores[name].setdefault(cell.task, []).append(read_json(plan.folder(cell) / "result.json")["score"] or 0.0)
    rows = []
    for task in BUILTIN_TASKS:
        ours, theirs = (scores[name][task] for name in encoders)
        shown = (" ".join(f"{100 * score:.1f}" for score in values) for values in (ours, theirs))
        rows.append([task, TASKS[task].metric, *shown, f"{100 * (fmean(ours) - fmean(theirs)):.1f}"])
    made = {**collect(), "command": " ".join(["python", *sys.argv])}
    write_json(REPOSITORY / "results/builtin_transfer.json", {"made": made, "seeds": arguments.seeds, "scores": scores})
    print(markdown(["task", "metric", "pre-trained", "random", "margin"], rows))


if __name__ == "__main__":
    main()
