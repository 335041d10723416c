#!/usr/bin/env python
"""What surrounds the steps: corpus preparation, start to first step, evaluation, mask files, a plan's overhead.

    python benchmarks/parts.py                          # every part that results/parts.json does not have yet
    python benchmarks/parts.py --parts corpus masks     # two of them

Everything is of this machine's CPUs, or of its accelerator, and of as many threads as torch takes (OMP_NUM_THREADS).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from finemask_ds.config import TamtConfig
from finemask_ds.data.corpus import load_blocks
from finemask_ds.dispatch.executor import dispatch
from finemask_ds.dispatch.local import LocalExecutor
from finemask_ds.dispatch.plan import Cell, Plan
from finemask_ds.engine.loop import evaluate
from finemask_ds.engine.memory import forget_peak_memory, peak_memory_gib
from finemask_ds.engine.world import this_process
from finemask_ds.masks.files import load_mask, save_mask
from finemask_ds.masks.mask import Mask
from finemask_ds.models.load import quiet_transformers
from finemask_ds.recipes.stages import REPOSITORY
from finemask_ds.report.table import markdown
from finemask_ds.run import Run, read_json
from finemask_ds.search.dense import builtin_corpus, resolve_model
from finemask_ds.search.objectives import counts
from finemask_ds.search.setting import open_setting
from finemask_ds.silence import silent_output

sys.path.insert(0, str(REPOSITORY))
from benchmarks.common import Cells, bert_base_files, bert_base_shapes, seconds_of, spread
from benchmarks.methods import tamt_scores

Figures = dict[str, dict[str, Any]]


def corpus(arguments: argparse.Namespace, scratch: Path) -> Figures:
    """Text of two sizes to token blocks, each in a process of its own: its memory must not grow with the text."""
    cells: Figures = {}
    spawn = multiprocessing.get_context("spawn")
    for megabytes in arguments.megabytes:
        text = scratch / f"text-{megabytes}"
        write_much(text, megabytes)
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            cells[f"corpus-{megabytes}mb"] = process.submit(prepare_corpus, text, scratch / "blocks").result()
    return cells


def write_much(folder: Path, megabytes: int) -> None:
    """The built-in language's documents over and over, each time in another order, in train.txt; valid.txt as it is."""
    folder.mkdir()
    language = builtin_corpus()
    documents = (language / "train.txt").read_text().split("\n\n")
    with open(folder / "train.txt", "w") as stream:
        draw = random.Random(0)
        while stream.tell() < megabytes * 1e6:
            draw.shuffle(documents)
            for document in documents:
                stream.write(document.strip() + "\n\n")
                if stream.tell() >= megabytes * 1e6:
                    break
    (folder / "valid.txt").write_text((language / "valid.txt").read_text())


def prepare_corpus(text: Path, cache: Path) -> dict[str, Any]:
    """Tokenise and pack; run in a fresh process."""
    tokenizer = quiet_transformers().AutoTokenizer.from_pretrained(builtin_corpus())
    size, device = (text / "train.txt").stat().st_size / 1e6, torch.device("cpu")
    forget_peak_memory(device)
    before = peak_memory_gib(device)
    with silent_output():
        seconds = seconds_of(lambda: load_blocks(str(text), tokenizer, 128, cache=cache))
    peak = peak_memory_gib(device)
    return {
        "text_mb": size, "prepare_sec": seconds, "mb_per_sec": size / seconds, "peak_gib": peak,
        "added_gib": peak - before,
    }  # fmt: skip


def start(arguments: argparse.Namespace, scratch: Path) -> Figures:
    """From the start of launcher/tamt.py until its first step is logged; the built-in model is there already."""
    resolve_model("builtin", this_process())
    file = str(REPOSITORY / "configs/ds/zero2.json")
    cells: Figures = {}
    for name, options in {"start-plain": [], "start-deepspeed": ["--deepspeed", file]}.items():
        seconds = [first_step_sec(scratch / f"{name}-{number}", options) for number in range(arguments.repeats)]
        cells[name] = spread("first_step_sec", seconds)
    return cells


def first_step_sec(run: Path, options: list[str]) -> float:
    """Seconds until the first step of a search has its line in the log."""
    fixed = "--model builtin --data builtin --seq_len 64 --batch_size 16 --steps 2 --log_every 1 --dev_blocks 16"
    command = [sys.executable, str(REPOSITORY / "launcher/tamt.py"), *fixed.split(), "--run", str(run), *options]
    started = time.time()
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(ended.stderr)
    first = json.loads(Run(run).metrics.read_text().splitlines()[0])
    return first["time"] - started


def evaluation(arguments: argparse.Namespace, scratch: Path) -> Figures:
    """Dev losses of a masked model: the built-in one on all of its dev text, BERT-base's shapes on a little."""
    bert_base, text = bert_base_files(scratch)
    builtin = resolve_model("builtin", this_process())
    settings: dict[str, dict[str, Any]] = {
        "builtin": {"model": builtin, "data": str(builtin_corpus()), "seq_len": 64, "batch_size": 64},
        "bert_base": {"model": bert_base, "data": text, "seq_len": 128, "batch_size": 8, "dev_blocks": 32},
    }
    cells: Figures = {}
    for model, shared in settings.items():
        for objective in ("mlm", "kd"):
            name = f"evaluation-{model}-{objective}"
            config = TamtConfig(objective=objective, init="ranked", run=str(scratch / name), **shared)
            cells[name] = spread("tokens_per_sec", evaluate_often(config, arguments.repeats))
    return cells


def evaluate_often(config: TamtConfig, repeats: int) -> list[float]:
    """Tokens per second of each evaluation but the first, as a search does it now and then."""
    with silent_output():
        setting = open_setting(config, this_process(), model=config.model, data=config.data)
        engine, *_ = tamt_scores(setting)
    dev = setting.dev_batches()
    num_tokens = sum(batch["input_ids"].numel() for batch in dev)

    def once() -> None:
        with engine.evaluation():
            evaluate(engine.forward, setting.world, dev, counts)

    once()
    return [num_tokens / seconds_of(once, setting.world.device) for _ in range(repeats)]


def masks(arguments: argparse.Namespace, scratch: Path) -> Figures:
    """A mask of BERT-base to its file and back, all of it verified."""
    mask, file = Mask.random(bert_base_shapes(), 0.7, seed=1), scratch / "mask.safetensors"
    saved = [seconds_of(lambda: save_mask(file, mask)) for _ in range(arguments.repeats)]
    loaded = [seconds_of(lambda: load_mask(file)) for _ in range(arguments.repeats)]
    size = {"file_mb": file.stat().st_size / 1e6}
    return {"mask-file": {**size, **spread("save_sec", saved), **spread("load_sec", loaded)}}


def plan(arguments: argparse.Namespace, scratch: Path) -> Figures:
    """What a plan of tiny cells takes beyond the seconds in their results, for one worker.

    ``plan-nothing``: cells that do nothing, so that it is dispatch alone. ``plan-tiny``: a step on 16 rows of a
    built-in task, so that it is also loading the model, the rows and the features, and writing the result.
    """
    resolve_model("builtin", this_process())
    options = {"model": "builtin", "task": "sentiment", "num_samples": 16, "batch_size": 16, "steps": 1}
    tiny = [Cell.of({**options, "seed": seed}) for seed in range(1, arguments.cells + 1)]
    nothing = [Cell(f"cell-{number}", {"task": "sentiment", "seed": 1}) for number in range(10 * arguments.cells)]
    fake = (sys.executable, str(REPOSITORY / "tests/dispatch/fake_worker.py"))
    return {
        "plan-nothing": overhead(nothing, scratch / "nothing", fake),
        "plan-tiny": overhead(tiny, scratch / "tiny", None),
    }


def overhead(cells: list[Cell], root: Path, command: tuple[str, ...] | None) -> dict[str, Any]:
    """Seconds for a worker's start and for each cell, from a plan of one cell and one of all."""

    def beyond(root: Path, chosen: list[Cell]) -> float:
        made = Plan.write(root, chosen)
        with silent_output():
            seconds = seconds_of(lambda: dispatch(made, LocalExecutor(1, command), measure=False, poll_sec=0.05))
        return seconds - sum(read_json(made.folder(cell) / "result.json")["seconds"] for cell in chosen)

    first, all_of_them = beyond(root / "one", cells[:1]), beyond(root / "all", cells)
    each = (all_of_them - first) / (len(cells) - 1)
    return {"cells": len(cells), "overhead_per_cell_sec": each, "start_sec": first - each}


PARTS = {"corpus": corpus, "start": start, "evaluation": evaluation, "masks": masks, "plan": plan}


def table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each figure."""
    rows = []
    for name, cell in cells.items():
        for key, value in cell.items():
            if isinstance(value, float) and not key.endswith(("_q1", "_q3")):
                between = f"{cell[f'{key}_q1']:,.3f}-{cell[f'{key}_q3']:,.3f}" if f"{key}_q1" in cell else ""
                rows.append([name, key, f"{value:,.3f}", between])
    return markdown(["part", "figure", "median", "quartiles"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--megabytes", nargs="+", type=int, default=[25, 100], help="text to prepare")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement that is repeated")
    parser.add_argument("--cells", type=int, default=8, help="cells of the plan")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "results/parts.json", help="file that keeps the cells")
    arguments = parser.parse_args()
    cells = Cells(arguments.out)
    options = {name: getattr(arguments, name) for name in ("megabytes", "repeats", "cells")}
    for part in arguments.parts:
        before = [name for name, cell in cells.cells.items() if cell["part"] == part]
        if before and cells.are_kept(before, options=options):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[part](arguments, Path(folder))
        for name in before:
            del cells.cells[name]
        about = {"part": part, "options": options, "threads": torch.get_num_threads()}
        cells.keep({name: {**about, **figures} for name, figures in found.items()})
        print(f"{part} done", flush=True)
    print(table(cells.cells))


if __name__ == "__main__":
    main()
