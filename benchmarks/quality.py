#!/usr/bin/env python
"""Time to quality: dev losses against steps for the paper's masks and for faster ones, as a plan of cells.

    python benchmarks/quality.py --shared ../shared                  # what results/quality does not hold yet
    python benchmarks/quality.py --shared ../shared --only kd-70     # of one objective and sparsity
    python benchmarks/quality.py --shared ../shared --downstream     # and what the masks are worth on tasks
    python benchmarks/quality.py --table                             # the tables and the figure of what is done

Each cell is one whole search with its own full decay on all-MiniLM-L6-v2 and WikiText-2, 8 x 64 tokens a step, one
process on one core; as many run at once as there are cores. A second call goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

from finemask_ds.dispatch.plan import Plan, sweep
from finemask_ds.provenance import collect
from finemask_ds.recipes.stages import REPOSITORY
from finemask_ds.report.table import markdown
from finemask_ds.run import Run, read_json, write_json

sys.path.insert(0, str(REPOSITORY))
from benchmarks.common import Eta
from benchmarks.downstream import SMALL, complete, cut_data, options
from benchmarks.quality_figure import Curve, draw
from benchmarks.quality_plan import FINE_TUNED, KEPT, LONG, PAPER_LR, ROOT, Cell, plan

KEPT_SCORES = KEPT / "downstream"


def run(cell: Cell, shared: Path, core: int) -> None:
    """Search on one core and keep the figures, where none are kept yet."""
    ROOT.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(cell.launcher), *cell.options(shared)]
    with open(ROOT / f"{cell.name}.log", "a") as log:
        subprocess.run(
            ["taskset", "-c", str(core), *command], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log,
            check=True,
        )  # fmt: skip
    if cell.kept.exists():
        return
    lines = [json.loads(line) for line in Run(ROOT / cell.name).metrics.read_text().splitlines()]
    loss = f"dev/{cell.objective}_loss"
    result = read_json(Run(ROOT / cell.name).result)
    of_mask = () if cell.trains_weights else ("dev", "sparsity", "distance_from_omp")  # IMP finds one only afterwards
    write_json(cell.kept, {
        "made": {**collect(), "command": " ".join(["python", *command[1:]])},
        "curve": [[line["step"], line[loss]] for line in lines if loss in line],
        "step_sec": statistics.median(line["speed/step_sec"] for line in lines if "speed/step_sec" in line),
        "start_sec": next((line["speed/start_sec"] for line in lines if "speed/start_sec" in line), 0.0),  # not IMP's
        "seconds": result["seconds"], **{name: result[name] for name in of_mask},
    })  # fmt: skip


def run_all(missing: Sequence[Cell], shared: Path) -> None:
    """Run searches, a cell on each core."""
    cores: Queue[int] = Queue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    eta, done = Eta(sum(cell.steps for cell in missing)), 0

    def work(cell: Cell) -> Cell:
        core = cores.get()
        try:
            run(cell, shared, core)
        finally:
            cores.put(core)
        return cell

    with ThreadPoolExecutor(cores.qsize()) as threads:
        for cell in threads.map(work, missing):
            done += cell.steps
            kept = read_json(cell.kept)
            print(f"{cell.name}: {kept['curve'][-1][1]:.4f} in {kept['seconds']:.0f} s; {eta.after(done)}", flush=True)


def fine_tune(shared: Path) -> None:
    """Fine-tune the compared masks as benchmarks/downstream.py does; one that is not on this machine is found again.

    A kept score counts by the name of its search: found again on another machine, a mask may differ in a few bits.
    """
    scored = scores()
    missing = {cell: [task for task in SMALL if (cell.name, task) not in scored] for cell in FINE_TUNED}
    run_all([cell for cell, tasks in missing.items() if tasks and not Run(ROOT / cell.name).mask.exists()], shared)
    told = options(cut_data(shared / "data", ROOT / "data"), str(shared / "models/all-MiniLM-L6-v2"), 1e-4)
    cells = [
        one for cell, tasks in missing.items() for one in sweep([ROOT / cell.name], tasks, [1], with_full=False, **told)
    ]
    complete(Plan.write(ROOT / "downstream", cells), KEPT_SCORES)


def scores() -> dict[tuple[str, str], float]:
    """Name of a compared search and task -> dev score of its mask, as far as they are kept."""
    found = [read_json(path) for path in KEPT_SCORES.glob("*.json")]
    return {(Path(kept["mask"]).parent.name, kept["task"]): kept["score"] for kept in found}


def score_table() -> str:
    """Dev scores x 100 of the compared masks."""
    scored = scores()
    rows = [
        [cell.setting, str(cell.steps)]
        + [f"{100 * scored[cell.name, task]:.1f}" if (cell.name, task) in scored else "-" for task in SMALL]
        for cell in FINE_TUNED
    ]
    return markdown(["start, scope, mask rate", "steps", *SMALL], rows)


def results(cells: Sequence[Cell]) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """Group, setting and steps -> figures of its seeds."""
    found = defaultdict(list)
    for cell in dict.fromkeys(cells):
        if cell.kept.exists():
            found[cell.group, cell.setting, cell.steps].append(read_json(cell.kept))
    return dict(found)


def table(found: Mapping[tuple[str, str, int], list[dict[str, Any]]]) -> str:
    """Losses as a search logs them, which for MLM is with the head that trains along; beside them with theta_0's."""
    rows = []
    for (group, setting, steps), kept in sorted(found.items()):
        losses = [one["curve"][-1][1] for one in kept]
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        seconds = statistics.mean(_seconds(one, steps) for one in kept)
        has_mask = "dev" in kept[0]
        distance = f"{kept[0]['distance_from_omp']:.3f}" if has_mask else "-"
        is_mlm = has_mask and group.startswith("mlm")
        old_head = f"{statistics.mean(one['dev']['mlm_loss'] for one in kept):.4f}" if is_mlm else "-"
        rows.append([group, setting, str(steps), f"{statistics.mean(losses):.4f}{spread}", old_head, str(len(losses)),
                     f"{seconds:.0f}", distance])  # fmt: skip
    return markdown(
        ["", "start, scope, mask rate", "steps", "dev loss", "theta_0's head", "seeds", "seconds", "from OMP"], rows
    )


def _seconds(kept: Mapping[str, Any], steps: int) -> float:
    """Of the start and so many steps, evaluations apart; the first files were kept without the start's.

    What a step takes after the optimizer's part of it is in files of commits from 651622f on only.
    """
    return kept.get("start_sec", 0.0) + kept["step_sec"] * steps


def curves(found: Mapping[tuple[str, str, int], list[dict[str, Any]]]) -> dict[str, list[Curve]]:
    """What the figure shows of masks, by group."""
    groups = defaultdict(list)
    for (group, setting, steps), kept in sorted(found.items()):
        if "dev" not in kept[0]:
            continue
        is_papers = setting == f"binary {PAPER_LR[group.split('-')[0]]:g}"
        for one in kept:
            at, losses = zip(*one["curve"], strict=True)
            seconds = [_seconds(one, step) for step in at]
            groups[group].append(Curve(setting, is_papers, steps == LONG, at, seconds, losses))
    return dict(groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, help="folder with data/ and models/")
    parser.add_argument("--only", default="", help="objective and sparsity, as kd-70")
    parser.add_argument("--downstream", action="store_true", help="fine-tune the compared masks, search no others")
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    cells = [cell for cell in dict.fromkeys(plan()) if arguments.only in ("", cell.group)]
    if not arguments.table:
        if arguments.shared is None:
            parser.error("type --shared FOLDER, or --table for what is done")
        shared = arguments.shared.resolve()
        if arguments.downstream:
            fine_tune(shared)
        else:
            run_all([cell for cell in cells if not cell.kept.exists()], shared)
    found = results(cells)
    print(table(found), score_table(), sep="\n\n")
    if found:
        draw(curves(found), REPOSITORY / "results/quality.png")


if __name__ == "__main__":
    main()
