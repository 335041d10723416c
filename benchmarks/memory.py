#!/usr/bin/env python
"""Memory per rank at BERT-base's shapes, between steps and at the peak of a step, beside the arithmetic, term by term.

    python benchmarks/memory.py                    # every cell that results/memory.json does not have yet
    python benchmarks/memory.py --only tamt-2-fp32 # one of them

Weights are random (no download), 2 ranks on CPUs. "Between steps" is the resident set after a step, less what the
process held before it loaded the model; freed memory is given back to the system first. 16-bit products are some 500
times slower here than fp32, so those cells see few tokens; what is held between steps does not depend on that.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finemask_ds.config import ImpConfig, SearchConfig, TamtConfig
from finemask_ds.engine.loop import Span, train
from finemask_ds.engine.metrics import Recorder
from finemask_ds.engine.world import World
from finemask_ds.provenance import collect
from finemask_ds.recipes.stages import REPOSITORY
from finemask_ds.report.table import markdown
from finemask_ds.run import read_json, write_json
from finemask_ds.search import imp, tamt
from finemask_ds.search.objectives import Objective, counts
from finemask_ds.search.selection import ScoreMasks
from finemask_ds.search.setting import open_setting

sys.path.insert(0, str(REPOSITORY))
from tests.engine import jobs as toys
from tests.pool import RankPool
from tests.toys import write_bert_base, write_text

OUT = REPOSITORY / "results/memory.json"
RANKS = 2
DTYPES = {"fp32": None, "bf16": "bfloat16", "fp16": "float16"}
CELLS = [f"tamt-{stage}-{dtype}" for dtype in DTYPES for stage in (0, 1, 2, 3)] + ["imp-2-fp32", "imp-3-fp32"]
GIB = 2**30
LARGEST = 30_522 * 768
"""Elements of the embedding, the largest trained matrix, which a bucket holds (configs/ds/README.md)."""


def resident(mark: str = "VmRSS") -> int:
    """Bytes resident in this process now, or at their highest since ``forget_peak`` (VmHWM)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(mark))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(world: World, config: SearchConfig, stage: int) -> dict[str, Any]:
    """Bytes that this rank holds for the search between two steps, and at most while loading and in a step."""
    toys.run_steps(world, stage, Path(config.run).parent, micro=toys.BATCH // world.size)  # Loads all modules.
    before = resident()
    forget_peak()
    setting = open_setting(config, world, model=config.model, data=config.data)
    if isinstance(config, TamtConfig):
        theta0, start, groups = tamt.freeze(setting, config)
    else:
        assert isinstance(config, ImpConfig)
        theta0, start, groups = imp.start(setting, config)
    model = theta0.model
    sizes = {
        "frozen": sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad),
        "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "masked": start.num_weights(),
    }
    objective = Objective(model, "mlm")
    engine = setting.engine(objective, groups)
    masks = ScoreMasks(engine, model, config.sparsity, config.scope, 1, dict.fromkeys(start, 0.01))
    del theta0, start
    loading = resident("VmHWM") - before
    forget_peak()
    hooks = [masks.after_step] if isinstance(config, TamtConfig) else []
    train(engine, objective, setting.train_batches(), counts, Span(1, 2, decay=10), Recorder(), seed=0, hooks=hooks)
    return {
        "loading_peak": loading, "between_steps": resident() - before, "step_peak": resident("VmHWM") - before, **sizes,
    }  # fmt: skip


def predicted(
    stage: int, dtype: str, sizes: Mapping[str, int], ranks: int = RANKS, largest: int = LARGEST
) -> dict[str, float]:
    """Bytes that a rank must hold between two steps, by name.

    Args:
        stage: of ZeRO.
        dtype: what products are computed in, of ``DTYPES``.
        sizes: elements that are ``masked``, ``trained`` and ``frozen``.
        ranks: how many.
        largest: elements of the largest trained matrix, the embedding.
    """
    masked, trained, frozen = sizes["masked"], sizes["trained"], sizes["frozen"]
    width = 4 if dtype == "fp32" else 2
    whole = 1 if stage < 3 else 1 / ranks
    sharded = 1 / ranks if stage else 1
    return {
        "frozen weights": width * frozen * whole,
        "scores (IMP: weights)": 4 * trained * whole,
        "masks, a byte each": masked,
        "masters": 4 * trained * sharded if stage else 0,
        "moments": 8 * trained * sharded,
        # Freed at the end of a step, except for stage 3's own buffer.
        "gradients": 4 * trained * sharded if stage == 3 else 0,
        # Kept from step to step where a whole W is frozen, but of the embedding, of which few rows are read.
        "masked weights W * M": width * (masked - largest) if frozen and stage < 3 else 0,
        "reduction bucket": 4 * largest if stage else 0,
    }


def cell(pool: RankPool, name: str, scratch: Path, model: Path, text: Path) -> dict[str, Any]:
    """Measure one cell."""
    method, stage, dtype = name.split("-")
    file = scratch / f"{name}.json"
    settings: dict[str, Any] = {"zero_optimization": {"stage": int(stage), "overlap_comm": stage in "12"}}
    if DTYPES[dtype]:
        settings["torch_autocast"] = {"enabled": True, "dtype": DTYPES[dtype]}
    file.write_text(json.dumps(settings))
    shared = {
        "model": str(model), "data": str(text), "run": str(scratch / name), "deepspeed": str(file),
        "precision": "file", "seq_len": 8, "batch_size": RANKS,
    }  # fmt: skip
    config = TamtConfig(**shared, init="ranked", steps=10) if method == "tamt" else ImpConfig(**shared)
    measured = pool.run(measure, config, int(stage), timeout_sec=1800)[0]
    return {"measured": measured, "predicted": predicted(int(stage), dtype, measured)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CELLS, help="one cell, measured anew")
    parser.add_argument("--out", type=Path, default=OUT, help="file that keeps the cells")
    arguments = parser.parse_args()
    done = read_json(arguments.out)["cells"] if arguments.out.exists() else {}
    made = {**collect(), "command": " ".join(["python", *sys.argv])}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model, text = write_bert_base(scratch / "model"), write_text(scratch / "text")
        for name in [arguments.only] if arguments.only else [name for name in CELLS if name not in done]:
            pool = RankPool(RANKS)
            done[name] = {**cell(pool, name, scratch, model, text), "made": made}
            pool.close()
            write_json(arguments.out, {"ranks": RANKS, "cells": done})
            print(f"{name} done", flush=True)
    print(table(done))


def table(cells: dict[str, Any]) -> str:
    rows = []
    for name in CELLS:
        if name in cells:
            parts, measured = cells[name]["predicted"], cells[name]["measured"]
            expected, held = sum(parts.values()), measured["between_steps"]
            rows.append(
                [name, *(f"{size / GIB:.2f}" for size in parts.values()), f"{expected / GIB:.2f}", f"{held / GIB:.2f}",
                 f"{100 * (held / expected - 1):+.0f} %", f"{measured['step_peak'] / GIB:.2f}",
                 f"{measured['loading_peak'] / GIB:.2f}"]
            )  # fmt: skip
    terms = list(next(iter(cells.values()))["predicted"])
    return markdown(["cell", *terms, "sum", "between steps", "", "peak of a step", "peak of loading"], rows)


if __name__ == "__main__":
    main()
