#!/usr/bin/env python
"""TAMT and IMP on one accelerator in fp32, bf16 and fp16: speed, memory, loss scale and dev losses, side by side.

    python benchmarks/gpu.py --model ../shared/models/all-MiniLM-L6-v2 --data ../shared/data/wikitext-2 --head_steps 500

Without --model: BERT-base's shapes with random weights and a few made-up sentences, which tells speed and memory only.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from finemask_ds.config import ImpConfig, SearchConfig, TamtConfig
from finemask_ds.engine.memory import forget_peak_memory
from finemask_ds.engine.zero import distributed
from finemask_ds.provenance import collect
from finemask_ds.recipes.stages import REPOSITORY
from finemask_ds.report.table import markdown
from finemask_ds.run import Run, write_json
from finemask_ds.session import search

sys.path.insert(0, str(REPOSITORY))
from tests.toys import write_bert_base, write_text

PRECISIONS = {"fp32": "", "bf16": "zero2.json", "fp16": "zero2_fp16.json"}


def configs(arguments: argparse.Namespace, folder: Path) -> dict[str, SearchConfig]:
    """The searches, one DeepSpeed file each."""
    plain = folder / "fp32.json"
    plain.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    model, text = arguments.model, arguments.data
    if not model:
        model, text = str(write_bert_base(folder / "model")), str(write_text(folder / "text", lines=5000))
    shared: dict[str, Any] = {
        "model": model, "data": text, "seq_len": arguments.seq_len, "batch_size": 16, "dev_blocks": 64,
        "eval_every": 0, "save_every": 0, "head_steps": arguments.head_steps,
    }  # fmt: skip
    searches: dict[str, SearchConfig] = {
        "tamt-mlm": TamtConfig(**shared, init="ranked", mask_lr=1e-4, steps=arguments.steps),
        "tamt-kd": TamtConfig(**shared, objective="kd", init="ranked", mask_lr=1e-4, steps=arguments.steps),
        "imp": ImpConfig(**shared, interval_steps=arguments.steps // 7),
    }
    return {
        f"{name} {precision}": replace(
            config,
            run=str(folder / f"{name}-{precision}"),
            deepspeed=str(REPOSITORY / "configs/ds" / file if file else plain),
        )
        for name, config in searches.items()
        for precision, file in PRECISIONS.items()
    }


def figures(config: SearchConfig, result: dict[str, Any]) -> dict[str, Any]:
    """What a run's log and result say."""
    lines = [json.loads(line) for line in Run(Path(config.run)).metrics.read_text().splitlines()]
    lines = [line for line in lines if "speed/tokens_per_sec" in line]  # IMP's last one is of its mask alone.
    steady = lines[len(lines) // 2 :]
    last = lines[-1]
    return {
        "tokens_per_sec": sum(line["speed/tokens_per_sec"] for line in steady) / len(steady),
        "peak_gib": last["memory/peak_gib"], "loss_scale": last.get("scale/loss_scale"),
        "skipped_steps": last.get("scale/skipped_steps"), "dev": result["dev"], "sparsity": result["sparsity"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="folder of a pre-trained encoder")
    parser.add_argument("--data", default="", help="folder of text")
    parser.add_argument("--head_steps", type=int, default=0, help="for an encoder without an MLM head")
    parser.add_argument("--steps", type=int, default=210, help="optimizer steps of each search")
    parser.add_argument("--seq_len", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "results/gpu.json", help="file of the figures")
    arguments = parser.parse_args()
    made = {**collect(), "command": " ".join(["python", *sys.argv])}
    cells: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, distributed() as world:
        for name, config in configs(arguments, Path(folder)).items():
            gc.collect()
            torch.cuda.empty_cache()
            forget_peak_memory(world.device)
            cells[name] = figures(config, search(config, world))
            write_json(arguments.out, {"made": made, "cells": cells})
    rows = [
        [name, f"{cell['tokens_per_sec']:,.0f}", f"{cell['peak_gib']:.2f}", f"{cell['loss_scale'] or 0:g}",
         f"{cell['skipped_steps'] or 0:g}",
         *("-" if value is None else f"{value:.4f}" for value in cell["dev"].values())]
        for name, cell in cells.items()
    ]  # fmt: skip
    print(markdown(["", "tokens/s", "peak GiB", "loss scale", "skipped", "MLM loss", "accuracy", "KD loss"], rows))


if __name__ == "__main__":
    main()
