#!/usr/bin/env python
"""Which ZeRO stage, precision and number of ranks ran and found what one plain fp32 process finds: TAMT and IMP.

    python benchmarks/armour.py

Every cell is a whole search of a toy model by real ranks (gloo, CPU; 16 bit as asked for, on tiny shapes). It passes
where the sparsity is exact and, in fp32, the mask differs from the plain one's in less than 1 weight in 1,000 and the
dev loss by less than 1e-4; in 16 bit, where the dev loss differs by less than 5 %. Writes results/armour.json.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from finemask_ds.engine.progress import Console
from finemask_ds.masks.files import load_mask
from finemask_ds.provenance import collect
from finemask_ds.recipes.stages import REPOSITORY
from finemask_ds.report.table import markdown
from finemask_ds.run import Run, write_json
from finemask_ds.session import search

sys.path.insert(0, str(REPOSITORY))
from tests.pool import RankPool, RanksFailedError
from tests.search import jobs
from tests.toys import write_bert, write_text

RANKS = (1, 2, 3)
STAGES = ("0", "1", "2", "3", "2 offload", "3 offload")
DTYPES = {"fp32": None, "bf16": "bfloat16", "fp16": "float16"}
METHODS = ("tamt", "imp")


def settings_of(stage: str, dtype: str) -> dict[str, Any]:
    """The DeepSpeed file of a cell; a low first scale, so that no batch is skipped and all see the same data."""
    zero: dict[str, Any] = {"stage": int(stage[0])}
    if "offload" in stage:
        zero["offload_optimizer"] = {"device": "cpu"}
    settings: dict[str, Any] = {"zero_optimization": zero, "fp16": {"enabled": False, "initial_scale_power": 4}}
    if DTYPES[dtype]:
        settings["torch_autocast"] = {"enabled": True, "dtype": DTYPES[dtype]}
    return settings


class Cells:
    """Runs cells in one folder, against the plain runs that it makes first."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model, self.text = write_bert(folder / "model"), write_text(folder / "text")
        self.plain = {
            method: (self.config(method, "plain"), search(self.config(method, "plain"))) for method in METHODS
        }

    def config(self, method: str, name: str) -> Any:
        make = jobs.tamt if method == "tamt" else jobs.imp_config
        return make(self.folder / f"{method} {name}", self.model, self.text, batch_size=12)

    def run(self, pool: RankPool, method: str, stage: str, dtype: str) -> dict[str, Any]:
        """One search; how far it is from the plain one, and whether that passes."""
        name = f"{stage} {dtype} {pool.size}"
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(settings_of(stage, dtype)))
        config = replace(self.config(method, name), deepspeed=str(file), precision="file")
        plain_config, plain = self.plain[method]
        cell: dict[str, Any] = {"method": method, "stage": stage, "precision": dtype, "ranks": pool.size}
        try:
            result = jobs.find(config, pool)
        except RanksFailedError as error:
            return {**cell, "passed": False, "error": str(error).splitlines()[-1]}
        masks = [load_mask(Run(Path(one.run)).mask) for one in (config, plain_config)]
        distance = masks[0].distance(masks[1])
        loss = abs(result["dev"]["mlm_loss"] / plain["dev"]["mlm_loss"] - 1)
        exact = result["sparsity"] == plain["sparsity"]
        passed = exact and (loss < 1e-4 and distance < 1e-3 if dtype == "fp32" else loss < 0.05)
        return {**cell, "passed": passed, "mask_distance": distance, "loss_difference": loss}


def table(cells: list[dict[str, Any]]) -> str:
    """Stage by precision and ranks: passed, and the larger loss difference of the two methods."""
    columns = [(dtype, ranks) for dtype in DTYPES for ranks in RANKS]
    rows = []
    for stage in STAGES:
        row = [f"ZeRO-{stage}"]
        for dtype, ranks in columns:
            here = [c for c in cells if (c["stage"], c["precision"], c["ranks"]) == (stage, dtype, ranks)]
            worst = max((c.get("loss_difference", 1.0) for c in here), default=1.0)
            row.append(f"{worst:.0e}" if here and all(c["passed"] for c in here) else "FAILED")
        rows.append(row)
    return markdown(["", *(f"{dtype} {ranks}" for dtype, ranks in columns)], rows)


def main() -> None:
    made = {**collect(), "command": " ".join(["python", *sys.argv])}
    cells: list[dict[str, Any]] = []
    todo = [
        (ranks, stage, dtype, method) for ranks in RANKS for stage in STAGES for dtype in DTYPES for method in METHODS
    ]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FINEMASK_CACHE"] = f"{folder}/cache"
        plan, progress = Cells(Path(folder)), Console(total_steps=len(todo))
        for ranks in RANKS:
            pool = RankPool(ranks)
            for of_ranks, stage, dtype, method in todo:
                if of_ranks == ranks:
                    cells.append(plan.run(pool, method, stage, dtype))
                    progress.write(len(cells), {"passed": float(sum(cell["passed"] for cell in cells))})
            pool.close()
    write_json(REPOSITORY / "results/armour.json", {"made": made, "cells": cells})
    print(table(cells))
    for cell in cells:
        if not cell["passed"]:
            print(cell)


if __name__ == "__main__":
    main()
