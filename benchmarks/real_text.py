#!/usr/bin/env python
"""Every method on a real pre-trained encoder and real text: dev losses at 70 % sparsity, 2 ranks, ZeRO-2.

    python benchmarks/real_text.py --model ../shared/models/all-MiniLM-L6-v2 --data ../shared/data/wikitext-2

Writes results/real_text.json and prints the table for results/README.md. A second call goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from finemask_ds.provenance import collect
from finemask_ds.recipes.stages import REPOSITORY, Stage, run_stages, table
from finemask_ds.run import write_json

RANKED = ("--init", "ranked", "--mask_lr", "1e-4")


def stages(head_steps: int) -> tuple[Stage, ...]:
    head = ("--head_steps", str(head_steps))
    return (
        Stage("tamt-kd-100", "tamt.py", ("--objective", "kd", *RANKED, "--steps", "100", *head)),
        Stage("random", "magnitude.py", ("--kind", "random", *head), ranks=0),
        Stage("omp", "magnitude.py", ("--kind", "omp", *head), ranks=0),
        Stage("imp", "imp.py", ("--interval_steps", "25", *head)),
        Stage("tamt-mlm-150", "tamt.py", ("--objective", "mlm", *RANKED, "--steps", "150", *head)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--head_steps", type=int, default=400)
    parser.add_argument("--root", type=Path, default=Path("runs/real_text"))
    arguments = parser.parse_args()
    shared = (
        *("--model", arguments.model, "--data", arguments.data, "--sparsity", "0.7", "--seq_len", "128"),
        *("--batch_size", "8", "--dropout", "0", "--dev_blocks", "200", "--eval_batch_size", "8"),
        *("--log_every", "25", "--eval_every", "50", "--save_every", "50"),
    )
    results = run_stages(stages(arguments.head_steps), arguments.root, shared)
    made = {**collect(), "command": " ".join(["python", *sys.argv])}
    write_json(REPOSITORY / "results/real_text.json", {"made": made, "options": shared, "results": results})
    print(table(results, as_markdown=True))


if __name__ == "__main__":
    main()
