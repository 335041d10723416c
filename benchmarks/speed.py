#!/usr/bin/env python
"""What a step of each method costs, against dense training and against the usual way of mask training, in one run.

    python benchmarks/speed.py --shared ../shared            # every group that results/speed.json does not have yet
    python benchmarks/speed.py --groups builtin --steps 5    # one of them, five timed rounds

The methods of a setup are alive together, each in processes of its own, and take their steps in turns, so that whatever
slows the machine for a moment slows all of them. A ratio is the median, over the rounds, of a method's time by that of
``dense`` in the same round; quartiles stand in brackets.

dense       MLM training of all weights, the same engine and model, no mask
tamt-mlm    TAMT on MLM, masks selected exactly after every step
tamt-kd     TAMT on hidden-state distillation, likewise
imp         MLM training of all weights under the magnitude mask of the target sparsity
naive       TAMT-MLM the usual way, see naive.py
dense-local dense in the engine of fine-tuning
fixed-mask  the same with the pruned weights held at zero, against dense-local
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from finemask_ds.engine.world import this_process
from finemask_ds.recipes.stages import REPOSITORY
from finemask_ds.report.table import markdown
from finemask_ds.search.dense import builtin_corpus, resolve_model

sys.path.insert(0, str(REPOSITORY))
from benchmarks import methods
from benchmarks.common import Cells, Eta, bert_base_files, figure, spread
from benchmarks.methods import Setup
from tests.pool import RankPool

OUT = REPOSITORY / "results/speed.json"
WARM_UP_ROUNDS = 2
TIME_OUT_SEC = 1800.0
MASKED_SHARE = 0.15
"""Of the tokens, the ones that the MLM head sees."""

ZERO = (("dense", "tamt-mlm", "tamt-kd", "imp", "naive"),)
LOCAL = (("dense-local", "fixed-mask"),)
BY_TWO = (("dense", "tamt-mlm", "naive"), ("dense", "tamt-kd", "imp"))
"""At BERT-base's shapes a process holds 2 to 3 GB and 5 to 6 in a step, so that not all of them have room in 20 GB."""


def builtin(arguments: argparse.Namespace, scratch: Path) -> list[Setup]:
    """The full cross of ranks and stages on the built-in model, with the quickstart's batches."""
    model, text = resolve_model("builtin", this_process()), str(builtin_corpus())
    options = {"batch_size": 64, "seq_len": 64, "dropout": 0.0}
    places = [(1, None), *itertools.product((1, 2), (0, 1, 2, 3))]
    return [
        Setup("builtin", ranks, 1, stage, LOCAL if stage is None else ZERO, model, text, options, 1e-3, turn_steps=2)
        for ranks, stage in places
    ]


def encoder(arguments: argparse.Namespace, scratch: Path) -> list[Setup]:
    """A real encoder on real text, two ranks (14 GB together); fine-tuning as ever in one process."""
    model, text = arguments.shared / "models/all-MiniLM-L6-v2", arguments.shared / "data/wikitext-2"
    if not model.is_dir() or not text.is_dir():
        print(f"encoder: left out, there is no {model} or no {text}; type --shared FOLDER")
        return []
    # The checkpoint has no head and would be refused; none is trained here, as steps through a drawn one cost the same.
    options = {"batch_size": 8, "seq_len": 128, "dropout": 0.0, "head_steps": 1}
    zero = [Setup("encoder", 2, 1, stage, ZERO, str(model), str(text), options) for stage in (0, 1, 2, 3)]
    return [Setup("encoder", 1, 1, None, LOCAL, str(model), str(text), options), *zero]


def bert_base(arguments: argparse.Namespace, scratch: Path) -> list[Setup]:
    """BERT-base's shapes on CPUs, one rank of two threads."""
    model, text = bert_base_files(scratch)
    options = {"batch_size": 8, "seq_len": 128}
    return [
        Setup("bert-base", 1, 2, 2, BY_TWO, model, text, options, rests=True),
        Setup("bert-base", 1, 2, None, LOCAL, model, text, options, rests=True),
    ]


def gpu(arguments: argparse.Namespace, scratch: Path) -> list[Setup]:
    """BERT-base's shapes in the paper's batches on one accelerator, in bf16."""
    if not torch.cuda.is_available():
        print("gpu: left out, there is no accelerator")
        return []
    model, text = bert_base_files(scratch)
    options = {"batch_size": 16, "seq_len": 512}
    return [
        Setup("gpu", 1, 1, 2, ZERO, model, text, options, device="cuda", turn_steps=5),
        Setup("gpu", 1, 1, None, LOCAL, model, text, options, device="cuda", turn_steps=5),
    ]


GROUPS = {"builtin": builtin, "encoder": encoder, "bert-base": bert_base, "gpu": gpu}


def measure(setup: Setup, rounds: int, scratch: Path) -> dict[str, dict[str, Any]]:
    """The cells of a setup."""
    cells: dict[str, dict[str, Any]] = {}
    for flight in setup.flights:
        with contextlib.ExitStack() as stack:
            pools = {method: RankPool(setup.ranks, setup.device) for method in flight}
            for pool in pools.values():
                stack.callback(pool.close)
            sizes = prepare(setup, pools, scratch / "runs")
            rate = pools[flight[0]].run(methods.matmul_rate)[0] if setup.device == "cuda" else None
            seconds = take_turns(setup, pools, rounds)
            for method, pool in pools.items():
                if f"{setup.name}/{method}" not in cells:  # the dense of a second flight is there for its ratios
                    cell = figures(setup, method, seconds, sizes, rate)
                    cell |= {"peak_gib": max(pool.run(methods.peak_gib)), "rounds": rounds}
                    cells[f"{setup.name}/{method}"] = cell
    return cells


def prepare(setup: Setup, pools: Mapping[str, RankPool], folder: Path) -> dict[str, int]:
    """Start all processes, which takes longest, at once; the model's sizes."""

    def one(method: str) -> dict[str, int]:
        run = str(folder / f"{setup.name}-{method}")
        return pools[method].run(methods.prepare, method, setup, run, timeout_sec=TIME_OUT_SEC)[0]

    with ThreadPoolExecutor() as threads:
        sizes, *_ = threads.map(one, pools)
    return sizes


def take_turns(setup: Setup, pools: Mapping[str, RankPool], rounds: int) -> dict[str, list[float]]:
    """Method -> seconds of a step in each timed round."""
    seconds: dict[str, list[float]] = {method: [] for method in pools}
    eta, order = Eta(WARM_UP_ROUNDS + rounds), list(pools)
    for number in range(1, WARM_UP_ROUNDS + rounds + 1):
        for method in order:
            # A step ends when its slowest rank is done.
            taken = max(pools[method].run(methods.take_turn, setup, timeout_sec=TIME_OUT_SEC))
            seconds[method].append(taken)
        if number == WARM_UP_ROUNDS:
            for pool in pools.values():
                pool.run(methods.forget_peak)
        steps = "  ".join(f"{method} {times[-1]:.3f}" for method, times in seconds.items())
        print(f"{setup.name}  round {eta.after(number)}  step, s: {steps}", flush=True)
        order = [*order[1:], order[0]]  # Nobody always follows the same neighbour.
    return {method: times[WARM_UP_ROUNDS:] for method, times in seconds.items()}


def figures(
    setup: Setup, method: str, seconds: Mapping[str, Sequence[float]], sizes: Mapping[str, int], rate: float | None
) -> dict[str, Any]:
    """What the times of a flight say of one method."""
    own, num_tokens = seconds[method], setup.options["batch_size"] * setup.options["seq_len"]
    cell: dict[str, Any] = {
        "threads": setup.threads,
        **spread("step_sec", own),
        **spread("tokens_per_sec", [num_tokens / one for one in own]),
    }
    dense = next(iter(seconds))
    by_dense = _ratios(own, seconds[dense])
    if method != dense:
        cell["dense_step_sec"] = statistics.median(seconds[dense])  # of the same flight, which may be a second one
    if method == "naive":
        cell |= spread("times_dense", by_dense)  # no "ratio", whose rise compare.py would take for our loss
    elif method != dense:
        cell |= spread("ratio_to_dense", by_dense)
    if method == "tamt-mlm":
        cell |= spread("ratio_to_naive", _ratios(own, seconds["naive"]))
    if rate is not None:
        flops = model_flops(setup, method, sizes)
        cell |= {"matmul_flop_per_sec": rate, "matmul_share": flops / statistics.median(own) / rate}
    return cell


def _ratios(own: Sequence[float], others: Sequence[float]) -> list[float]:
    return [mine / theirs for mine, theirs in zip(own, others, strict=True)]


def model_flops(setup: Setup, method: str, sizes: Mapping[str, int]) -> float:
    """FLOPs of the matrix products of a step, forward and twice as many backward; nothing recomputed, no mask.

    With B sequences of T tokens, L layers, H hidden, I inner, V vocabulary:
    3 * B T * (L * (8 H^2 + 4 H I + 4 T H) + 0.15 * (2 H^2 + 2 H V)); KD has no head but the teacher's forward: 4 / 3.
    """
    tokens, length = setup.options["batch_size"] * setup.options["seq_len"], setup.options["seq_len"]
    hidden, inner = sizes["hidden"], sizes["inner"]
    layers = sizes["layers"] * (8 * hidden**2 + 4 * hidden * inner + 4 * length * hidden)
    head = MASKED_SHARE * (2 * hidden**2 + 2 * hidden * sizes["vocabulary"])
    return tokens * (4 * layers if method == "tamt-kd" else 3 * (layers + head))


def table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """All cells; the share of the matmul rate where one was measured."""
    with_share = any("matmul_share" in cell for cell in cells.values())
    rows = []
    for name, cell in cells.items():
        dense = "times_dense" if "times_dense" in cell else "ratio_to_dense"
        row = [name, figure(cell, "step_sec", ".1f", 1e-3), f"{cell['tokens_per_sec']:,.0f}", f"{cell['peak_gib']:.2f}"]
        row += [figure(cell, dense), figure(cell, "ratio_to_naive")]
        rows.append([*row, figure(cell, "matmul_share")] if with_share else row)
    header = ["", "step, ms", "tokens/s", "peak GiB", "x dense", "x naive", *(["of matmul rate"] if with_share else [])]
    return markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="default: all")
    parser.add_argument("--steps", type=int, default=20, help="timed rounds of each setup")
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared", help="real models and data")
    parser.add_argument("--out", type=Path, default=OUT, help="file that keeps the cells")
    arguments = parser.parse_args()
    cells = Cells(arguments.out)
    with tempfile.TemporaryDirectory() as folder:
        for group in arguments.groups:
            for setup in GROUPS[group](arguments, Path(folder)):
                names = {f"{setup.name}/{method}" for flight in setup.flights for method in flight}
                if not cells.are_kept(names, rounds=arguments.steps):
                    cells.keep(measure(setup, arguments.steps, Path(folder)))
    print(table(cells.cells))


if __name__ == "__main__":
    main()
