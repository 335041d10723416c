#!/usr/bin/env python
"""What watching costs: norms by role, histograms, flips and heat map at every log line, as a share of the steps.

    python benchmarks/watching.py

TAMT at BERT-base's shapes with random weights, 2 ranks, ZeRO-2, 1 x 128 tokens per rank, so that steps are short and
the share large: one run looks every 4 steps, one only at the end. Writes results/watching.json.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from finemask_ds.config import TamtConfig
from finemask_ds.provenance import collect
from finemask_ds.recipes.stages import REPOSITORY, Stage, run_stages
from finemask_ds.run import read_json, write_json

sys.path.insert(0, str(REPOSITORY))
from tests.toys import write_bert_base, write_text

STEPS, OFTEN = 40, 4
OPTIONS = ("--objective", "mlm", "--init", "ranked", "--steps", str(STEPS))
STAGES = [
    Stage(f"every-{every}", "tamt.py", (*OPTIONS, "--log_every", str(every), "--watch_every", str(every)), ranks=2)
    for every in (STEPS, OFTEN)
]


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, text = write_bert_base(folder / "model"), write_text(folder / "text", lines=2000)
        shared = [
            "--model", str(model), "--data", str(text), "--seq_len", "128", "--batch_size", "2", "--dev_blocks", "2",
            "--eval_every", "0", "--save_every", "0", "--agree_every", "0",
        ]  # fmt: skip
        run_stages(STAGES, folder / "runs", shared)
        seldom, often = (read_json(stage.run(folder / "runs").result)["seconds"] for stage in STAGES)
    looks = STEPS // OFTEN - 1
    a_look, a_step = (often - seldom) / looks, seldom / STEPS
    share = a_look / (TamtConfig.watch_every * a_step)
    figures = {
        "seconds_of_a_look": a_look,
        "seconds_of_a_step": a_step,
        "watch_every": TamtConfig.watch_every,
        "share": share,
    }
    made = {**collect(), "command": " ".join(["python", *sys.argv])}
    write_json(REPOSITORY / "results/watching.json", {"made": made, **figures})
    print(
        f"a step {a_step:.2f} s, a look {a_look:.2f} s: {100 * share:.2f} % at --watch_every {TamtConfig.watch_every}"
    )


if __name__ == "__main__":
    main()
