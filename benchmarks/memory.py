#!/usr/bin/env python
"""Peak memory per rank at BERT-base's shapes beside the arithmetic that predicts it: two TAMT steps, a short IMP rung.

    python benchmarks/memory.py

Weights are random (no download); 2 ranks, ZeRO-2 and ZeRO-3, fp32 on CPUs. Writes results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from finemask_ds.models.load import load_pretrained
from finemask_ds.provenance import collect
from finemask_ds.recipes.stages import REPOSITORY, Stage, run_stages
from finemask_ds.report.table import markdown
from finemask_ds.run import write_json

sys.path.insert(0, str(REPOSITORY))
from tests.toys import write_bert_base, write_text

RANKS = 2
STAGES = (
    Stage("tamt", "tamt.py", ("--objective", "mlm", "--init", "ranked", "--steps", "2"), ranks=RANKS),
    Stage("imp", "imp.py", ("--interval_steps", "2", "--sparsity", "0.2"), ranks=RANKS),
)
SHARED = ("--seq_len", "64", "--batch_size", "2", "--log_every", "1", "--eval_every", "0", "--save_every", "0")


def predicted_gib(method: str, stage: int, masked: int, total: int, bucket: int) -> dict[str, float]:
    """What a rank must hold in fp32 at the end of a backward pass, by name, in GiB.

    masked: weights under a mask; total: weights of the model; bucket: elements of a reduction bucket.
    """
    trained = masked if method == "tamt" else total
    shard = 1 / RANKS
    frozen = (total if stage < 3 else total * shard) if method == "tamt" else 0
    values = trained if stage < 3 else trained * shard
    parts = {
        "frozen weights": 4 * frozen,
        "trained values (scores or weights)": 4 * values,
        "masked weights W * M of the graph": 4 * masked,
        "masks, a byte each": masked,
        "gradients, sharded": 4 * trained * shard,
        "masters and moments, sharded": 12 * trained * shard,
        "reduction buckets, two in flight": 2 * 4 * min(bucket, trained),
    }
    return {name: size / 2**30 for name, size in parts.items()}


def process_gib() -> float:
    """Resident memory of a rank before it loads anything."""
    code = (
        "import finemask_ds.session, finemask_ds.engine.zero as z, torch; z._import_deepspeed(); "
        "from finemask_ds.search.setting import peak_memory_gib as p; print(p(torch.device('cpu')))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(told.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    rows, records = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, text = write_bert_base(folder / "model"), write_text(folder / "text")
        pretrained = load_pretrained(str(model))
        masked = sum(weight.numel() for weight in pretrained.targets.values())
        total = sum(parameter.numel() for parameter in pretrained.model.parameters())
        process = process_gib()
        for zero in (2, 3):
            bucket = json.loads((REPOSITORY / f"configs/ds/zero{zero}.json").read_text())["zero_optimization"]
            stages = [replace(stage, zero=zero) for stage in STAGES]
            run_stages(stages, folder / f"zero{zero}", ["--model", str(model), "--data", str(text), *SHARED])
            for stage in stages:
                lines = stage.run(folder / f"zero{zero}").metrics.read_text().splitlines()
                measured = json.loads(lines[-1])["memory/peak_gib"]
                parts = {"python, torch, deepspeed": process} | predicted_gib(
                    stage.name, zero, masked, total, bucket["reduce_bucket_size"]
                )
                records.append({"method": stage.name, "zero": zero, "peak_gib": measured, "predicted_gib": parts})
                rows.append([f"{stage.name} ZeRO-{zero}", f"{sum(parts.values()):.2f}", f"{measured:.2f}"])
    made = {**collect(), "command": " ".join(["python", *sys.argv])}
    write_json(REPOSITORY / "results/memory.json", {"made": made, "ranks": RANKS, "rows": records})
    print(markdown(["method", "predicted GiB", "peak GiB, rank 0"], rows))


if __name__ == "__main__":
    main()
