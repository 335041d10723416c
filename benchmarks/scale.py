#!/usr/bin/env python
"""The tables and the figure of docs/scale.md: what a step takes, holds and sends, and the check of what it sends.

    python benchmarks/scale.py           # count what two and three real hosts send, then write the page's tables
    python benchmarks/scale.py --page    # only the tables, from results/scale.json

The check starts hosts of its own (network namespaces, so root is needed) and reads the counters of their network cards.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finemask_ds.recipes.stages import REPOSITORY
from finemask_ds.report.heatmap import save_png
from finemask_ds.report.style import panels, style
from finemask_ds.report.table import markdown
from finemask_ds.run import atomic_write, read_json

sys.path.insert(0, str(REPOSITORY))
from benchmarks.arithmetic import SHAPES, Cluster, Parameters, Shape, memory_bytes, wire_bytes
from benchmarks.common import Cells
from benchmarks.traffic import CELLS, count_on_hosts
from tests.cluster.hosts import Hosts

PAGE = REPOSITORY / "docs/scale.md"
FIGURE = REPOSITORY / "docs/scale.png"
OUT = REPOSITORY / "results/scale.json"
AT_THREE = ("tamt-zero0", "tamt-zero2", "tamt-zero3", "imp-zero2")
"""Cells that are also counted on three hosts, where a ring differs from a pair."""
RANKS = (1, 8, 64, 1024)
STAGES = (0, 2, 3)
SEQUENCES, SEQ_LEN = 16, 512
"""On each rank: the paper's whole batch, so that the global batch grows with the ranks."""

H200 = Cluster(
    flops_per_sec=0.4 * 989e12, selection_sec=44 / 4.8e12, bytes_per_sec=450e9, node_ranks=8,
    between_bytes_per_sec=50e9, collective_sec=20e-6,
)  # fmt: skip
"""Assumed, none was at hand: 40 % of the data sheet's dense bf16 rate, 44 bytes for each masked weight and step at 4.8
TB/s, NVLink between the eight GPUs of a node, 400 Gb/s for each from node to node, 20 us for a round of messages."""


def measured_here() -> Cluster:
    """A host with one core of this machine: from results/speed.json, selection.json and scale.json."""
    dense = read_json(REPOSITORY / "results/speed.json")["cells"]["bert-base-1r-zero2/dense"]
    selected = read_json(REPOSITORY / "results/selection.json")["cells"]["cold-bert_base-local"]
    links = read_json(OUT)["cells"]["2 hosts"]
    rate = SHAPES["BERT-base"].flops(8 * 128, 128) / dense["step_sec"] / dense["threads"]
    per_weight = dense["threads"] * selected["select_sec"] / selected["scores"]
    return Cluster(rate, per_weight, links["bytes_per_sec"], collective_sec=links["round_sec"])


def count() -> None:
    """Count on two and three hosts and keep what was found."""
    for number in (2, 3):
        chosen = [cell for cell in CELLS if number == 2 or cell.name in AT_THREE]
        with tempfile.TemporaryDirectory() as folder:
            hosts = Hosts.up(number, Path(folder) / "hosts")
            try:
                found = count_on_hosts(hosts, chosen, Path(folder) / "scratch")
            finally:
                hosts.down()
        Cells(OUT).keep({f"{number} hosts": found})


def checked(kept: Mapping[str, Any]) -> str:
    """Counted beside expected."""
    rows = []
    for number in (2, 3):
        for name, cell in kept[f"{number} hosts"]["cells"].items():
            ratio = cell["counted"] / cell["expected"]
            rows.append([name, str(number), f"{cell['counted'] / 1e6:.2f}", f"{cell['expected'] / 1e6:.2f}",
                         f"{100 * (ratio - 1):+.2f} %"])  # fmt: skip
    return markdown(["search", "hosts", "counted, MB a step", "expected", "difference"], rows)


def costs(kept: Mapping[str, Any]) -> str:
    """What a choice costs on the wire, beside ZeRO-2 with one micro-batch and sums in fp32, and in a rank's memory."""
    cells = kept["2 hosts"]["cells"]
    usual = cells["tamt-zero2"]["counted"]
    told = {
        "tamt-zero0": "ZeRO-0", "tamt-zero1": "ZeRO-1", "tamt-zero2": "ZeRO-2", "tamt-zero3": "ZeRO-3",
        "tamt-zero0-2x": "ZeRO-0, two micro-batches", "tamt-zero1-2x": "ZeRO-1, two micro-batches",
        "tamt-zero2-2x": "ZeRO-2, two micro-batches", "tamt-zero3-2x": "ZeRO-3, two micro-batches",
        "tamt-zero2-bf16": "ZeRO-2, sums in bf16", "tamt-zero0-bf16": "ZeRO-0, sums in bf16",
    }  # fmt: skip
    rows = []
    for name, words in told.items():
        held = [sum(memory_bytes(SHAPES["7B"], "tamt", cells[name]["stage"], n).values()) / 2**30 for n in (8, 64)]
        rows.append([words, f"{cells[name]['counted'] / usual:.2f}", *(f"{one:.0f}" for one in held)])
    return markdown(["TAMT with", "bytes sent / ZeRO-2's", "7B, GiB a rank of 8", "of 64"], rows)


def predictions(cluster: Cluster, method: str, *, sequences: int, seq_len: int, backend: str, dtype: str) -> str:
    """A row for each model and number of ranks; stages side by side."""
    rows = []
    for name, shape in SHAPES.items():
        for ranks in RANKS:
            steps, held, sent = [], [], []
            for stage in STAGES:
                parts = step_parts(cluster, shape, method, stage, ranks, sequences, seq_len, backend, dtype)
                steps.append(sum(parts.values()))
                held.append(sum(memory_bytes(shape, method, stage, ranks, dtype).values()) / 2**30)
                wire = wire_bytes(Parameters.of_shape(shape, method), method, stage, ranks, backend=backend,
                                  frozen_bytes=4 if dtype == "fp32" else 2)  # fmt: skip
                sent.append(sum(wire.values()) / ranks / 1e9)
            rows.append([name, f"{ranks:,}", *(_figures(values) for values in (steps, held, sent))])
    return markdown(["model", "ranks", "step, s", "held, GiB a rank", "sent, GB a rank and step"], rows)


def step_parts(
    cluster: Cluster, shape: Shape, method: str, stage: int, ranks: int, sequences: int, seq_len: int, backend: str,
    dtype: str,
) -> dict[str, float]:  # fmt: skip
    """Seconds of a step by part."""
    width = 4 if dtype == "fp32" else 2
    return cluster.step_sec(
        shape, method, stage, ranks, tokens=sequences * seq_len, seq_len=seq_len, backend=backend, width=width
    )


def _figures(values: list[float]) -> str:
    return " / ".join(f"{value:.3g}" for value in values)


def draw() -> None:
    """Seconds of a TAMT step against ranks, a panel for each model, a line for each stage."""
    looks = {0: ("#0072B2", "o", "-"), 2: ("#D55E00", "s", (0, (6, 2))), 3: ("#009E73", "^", (0, (2, 1.5)))}
    ranks = [2**power for power in range(11)]
    with style():
        figure, grid = panels(2, 2, 2.4)
        for panel, (name, shape) in zip([axes for row in grid for axes in row], SHAPES.items(), strict=True):
            for stage, (colour, marker, line) in looks.items():
                seconds = [
                    sum(step_parts(H200, shape, "tamt", stage, n, SEQUENCES, SEQ_LEN, "nccl", "bf16").values())
                    for n in ranks
                ]
                panel.plot(ranks, seconds, color=colour, marker=marker, linestyle=line, markersize=4,
                           label=f"ZeRO-{stage}")  # fmt: skip
            alone = step_parts(H200, shape, "tamt", 0, 1, SEQUENCES, SEQ_LEN, "nccl", "bf16")["computing"]
            panel.axhline(alone, color="#7F7F7F", linewidth=1, linestyle=":", label="computing alone")
            panel.set(title=name, xlabel="ranks (8 to a node)", ylabel="step (s)", xscale="log", ylim=(0, None))
            panel.set_xticks([1, 8, 64, 1024], ["1", "8", "64", "1,024"])
            panel.minorticks_off()
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, handlelength=3,
                      title="arithmetic with an H200's data sheet, not measured")  # fmt: skip
        save_png(figure, FIGURE)


def write_page() -> None:
    """Put the tables between their marks; the words around them are written by hand."""
    kept = read_json(OUT)["cells"]
    here = measured_here()
    paper = {"sequences": SEQUENCES, "seq_len": SEQ_LEN}
    tables = {
        "check": checked(kept),
        "costs": costs(kept),
        "tamt on H200": predictions(H200, "tamt", backend="nccl", dtype="bf16", **paper),
        "imp on H200": predictions(H200, "imp", backend="nccl", dtype="bf16", **paper),
        "tamt here": predictions(here, "tamt", sequences=8, seq_len=128, backend="gloo", dtype="fp32"),
        "constants": markdown(["constant", "here, measured", "H200, assumed"], [
            ["computing, FLOP/s a rank", f"{here.flops_per_sec:.3g}", f"{H200.flops_per_sec:.3g}"],
            ["masks, s for each masked weight and step", f"{here.selection_sec:.2g}", f"{H200.selection_sec:.2g}"],
            ["sending, bytes/s a rank", f"{here.bytes_per_sec:.3g}",
             f"{H200.bytes_per_sec:.3g} in a node, {H200.between_bytes_per_sec:.3g} between"],
            ["a round of messages, s", f"{here.collective_sec:.2g}", f"{H200.collective_sec:.2g}"],
        ]),
    }  # fmt: skip
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables.items():
        marks = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(marks, lambda match, t=table: f"{match[1]}\n{t}\n\n{match[2]}", text, flags=re.S)
        assert found == 1, name
    with atomic_write(PAGE) as stream:
        stream.write(text)
    draw()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="count nothing, write the tables and the figure")
    if not parser.parse_args().page:
        count()
    write_page()
    print(checked(read_json(OUT)["cells"]))


if __name__ == "__main__":
    main()
