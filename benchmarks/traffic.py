#!/usr/bin/env python
"""Counts what the ranks of real hosts send in a step, beside the arithmetic; scale.py and the tests start it.

Each host reads the counter of its own network card, so that all bytes count: gradients, values, headers, heart beats.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM

from benchmarks.arithmetic import Parameters, wire_bytes
from benchmarks.common import seconds_of
from benchmarks.methods import HELD, Setup, prepare
from finemask_ds.engine.world import World
from finemask_ds.models.patch import masked_modules
from finemask_ds.recipes.stages import REPOSITORY
from finemask_ds.run import read_json, write_json
from tests.cluster.hosts import Hosts
from tests.toys import write_bert, write_text

STEPS = 4
"""Counted for each cell, after as many that are not."""
SEQUENCES = 12
"""Of a step, over all ranks: of 1, 2 or 3."""
SUM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
REDUCED_BYTES = 64 << 20
"""Of the sum that a rank's bandwidth is taken from."""


@dataclass(frozen=True)
class Cell:
    """One search whose bytes are counted."""

    method: str
    """``tamt`` or ``imp``."""
    stage: int
    accumulation: int = 1
    sum_dtype: str = "fp32"

    @property
    def name(self) -> str:
        """For instance ``tamt-zero2-2x-bf16``."""
        extra = [f"{self.accumulation}x"] if self.accumulation > 1 else []
        return "-".join(
            [self.method, f"zero{self.stage}", *extra, *([self.sum_dtype] if self.sum_dtype != "fp32" else [])]
        )


CELLS = [
    *(Cell("tamt", stage, accumulation) for accumulation in (1, 2) for stage in range(4)),
    *(Cell("imp", stage) for stage in range(4)),
    Cell("tamt", 0, sum_dtype="bf16"),
    Cell("tamt", 2, sum_dtype="bf16"),
]


def write_model(folder: Path, *, hidden: int = 384, layers: int = 3, vocabulary: int = 4000) -> Path:
    """A random BERT of a few million weights, small enough for a test and large enough that headers do not count."""
    write_bert(folder, layers=1)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=6,
        intermediate_size=4 * hidden, max_position_embeddings=64,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def count_on_hosts(hosts: Hosts, cells: Sequence[Cell], scratch: Path, *, timeout_sec: float = 600) -> dict[str, Any]:
    """Count the cells with one rank on each host.

    Args:
        hosts: as they are up.
        cells: what to count.
        scratch: an empty folder that all hosts see.
        timeout_sec: for all of it.

    Returns:
        ``bytes_per_sec`` of a rank in a large sum, ``round_sec`` of a tiny one, and ``cells``: name -> ``counted`` and
        ``expected`` bytes of a step over all ranks, ``terms`` of the latter, ``step_sec``.
    """
    model, text = write_model(scratch / "model"), write_text(scratch / "text")
    job, out = scratch / "job.json", scratch / "out.json"
    listed = [asdict(cell) for cell in cells]
    write_json(job, {"cells": listed, "model": model, "text": text, "scratch": scratch, "out": out})
    ranks = [
        hosts.start(
            name, [sys.executable, "-m", "benchmarks.traffic", str(job)], scratch / f"rank-{rank}.log",
            env={"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(len(hosts.names)),
                 "MASTER_ADDR": hosts.address(0), "MASTER_PORT": "29400"},
        )
        for rank, name in enumerate(hosts.names)
    ]  # fmt: skip
    deadline = time.monotonic() + timeout_sec
    codes = [process.wait(max(1.0, deadline - time.monotonic())) for process in ranks]
    if any(codes):
        raise RuntimeError("\n".join((scratch / f"rank-{rank}.log").read_text() for rank in range(len(ranks))))
    return read_json(out)


def sent_bytes() -> int:
    """What this host's network cards have sent since they were made."""
    cards = [line.replace(":", " ").split() for line in Path("/proc/self/net/dev").read_text().splitlines()[2:]]
    return sum(int(card[9]) for card in cards if card[0] != "lo")


def count(world: World, cell: Cell, job: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes that all ranks together send in a step, and what is expected of them."""
    folder = Path(job["scratch"]) / cell.name
    settings = read_json(REPOSITORY / f"configs/ds/zero{cell.stage}.json")
    if world.is_first:
        write_json(folder / "ds.json", {**settings, "communication_data_type": cell.sum_dtype})
    world.barrier()
    options = {
        "seq_len": 16, "batch_size": SEQUENCES, "dropout": 0.0, "deepspeed": str(folder / "ds.json"),
        "micro_batch_size": SEQUENCES // world.size // cell.accumulation,
    }  # fmt: skip
    setup = Setup("traffic", world.size, 1, cell.stage, (), job["model"], job["text"], options)
    HELD.clear()
    prepare(world, {"tamt": "tamt-mlm", "imp": "imp"}[cell.method], setup, str(folder / "run"))
    training = HELD[0]
    training.train(STEPS)
    world.barrier()
    before = sent_bytes()
    seconds = seconds_of(lambda: training.train(STEPS))
    world.barrier()
    sent = world.sum(torch.tensor(float(sent_bytes() - before), dtype=torch.float64)).item() / STEPS
    terms = wire_bytes(
        _parameters(training.engine.shapes, training.objective.model), cell.method, cell.stage, world.size,
        accumulation=cell.accumulation, sum_bytes=SUM_BYTES[cell.sum_dtype],
    )  # fmt: skip
    return {
        "counted": sent,
        "expected": sum(terms.values()),
        "terms": terms,
        "step_sec": seconds / STEPS,
        **asdict(cell),
    }


def _parameters(trained: Mapping[str, tuple[int, ...]], model: torch.nn.Module) -> Parameters:
    def size(parameter: Any) -> int:
        return int(getattr(parameter, "ds_numel", parameter.numel()))  # Stage 3 leaves nothing to see.

    frozen = [size(parameter) for parameter in model.parameters() if not parameter.requires_grad]
    masked = [module.mask.numel() for module in masked_modules(model).values()]
    sizes = [math.prod(shape) for shape in trained.values()]
    return Parameters.of_lists(sizes, frozen, sum(masked), len(masked))


def bytes_per_sec(world: World) -> float:
    """What a rank sends in a second while large tensors are summed; the best of five."""
    tensor = torch.zeros(REDUCED_BYTES // 4)
    best = min(seconds_of(lambda: world.sum(tensor)) for _ in range(5))
    return 2 * (world.size - 1) / world.size * REDUCED_BYTES / best


def round_sec(world: World) -> float:
    """What a sum of one number takes; the median of a hundred."""
    tensor = torch.zeros(1)
    return statistics.median(seconds_of(lambda: world.sum(tensor)) for _ in range(100))


def main(job: Mapping[str, Any]) -> None:
    """What each rank runs."""
    from finemask_ds.engine.zero import distributed

    with distributed() as world:
        links = {"bytes_per_sec": bytes_per_sec(world), "round_sec": round_sec(world)}
        cells: Iterable[Cell] = [Cell(**cell) for cell in job["cells"]]
        counted = {cell.name: count(world, cell, job) for cell in cells}
        if world.is_first:
            write_json(job["out"], {"ranks": world.size, **links, "cells": counted})


if __name__ == "__main__":
    main(read_json(sys.argv[1]))
