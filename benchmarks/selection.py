#!/usr/bin/env python
"""Exact selection alone: per matrix and over all, against torch.kthvalue, up to 1e9 scores; and warm, after a step.

    python benchmarks/selection.py                   # on the accelerator if there is one
    python benchmarks/selection.py --most 1e7 --repeats 3

Scores are fp32, |N(0, 0.01)|: those of BERT-base's 73 matrices, and of matrices of a million scores each.
torch.kthvalue finds the thresholds of the same data (without making masks), up to 1e8 scores. Warm: the same 73
matrices again, after a step in which every score moved up or down by 1e-4 (some crossed the threshold), after one in
which all moved away from it, and after none. Medians with quartiles. Writes results/selection.json.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finemask_ds.engine.memory import keep_freed_memory
from finemask_ds.engine.world import this_process
from finemask_ds.masks.binarize import has_kernels
from finemask_ds.masks.select import SCOPES, num_kept, select
from finemask_ds.recipes.stages import REPOSITORY
from finemask_ds.report.table import markdown

sys.path.insert(0, str(REPOSITORY))
from benchmarks.common import Cells, bert_base_shapes, figure, seconds_of, spread

SPARSITY = 0.7
SIZES = {"10M": 10**7, "100M": 10**8, "1000M": 10**9}
MOST_KTHVALUE = 1.2e8
"""Scores; it copies them, and as many indices of 8 bytes."""
BYTES_A_SCORE = 10
"""Score, mask, W and W * M in 16 bit on a GPU, and what selection holds beside them."""
MOVED = 1e-4
"""--mask_lr of the short searches: what AdamW moves a score by in its first steps."""


def draw(shapes: Mapping[str, tuple[int, int]], device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores of these shapes, in one piece of memory and by name; the same each time."""
    sizes = [rows * columns for rows, columns in shapes.values()]
    flat = torch.empty(sum(sizes), device=device)
    generator = torch.Generator(device).manual_seed(0)
    flat.normal_(0.0, 0.01, generator=generator).abs_()
    parts = flat.split(sizes)
    return flat, {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def kthvalues(flat: Tensor, scores: Mapping[str, Tensor], scope: str) -> list[float]:
    """The largest score that goes, of each matrix or of all."""
    pieces = [flat] if scope == "global" else [values.flatten() for values in scores.values()]
    return [piece.kthvalue(piece.numel() - num_kept(piece.numel(), SPARSITY)).values.item() for piece in pieces]


def cold(shapes: Mapping[str, tuple[int, int]], scope: str, repeats: int, device: torch.device) -> dict[str, Any]:
    """Selection from nothing but scores (kernels: from a guess far off), kthvalue in turns with it."""
    flat, scores = draw(shapes, device)

    def select_anew() -> None:
        select(scores, SPARSITY, scope)

    if has_kernels(device):  # ``select`` itself is kthvalue there, and no search calls it.
        renew = kernels(scores, blank(scores), scope)

        def select_anew() -> None:
            renew(dict.fromkeys(scores, 1.0))

        select_anew()  # Compiles.
    own, theirs = [], []
    for _ in range(repeats):
        own.append(seconds_of(select_anew, device))
        if flat.numel() <= MOST_KTHVALUE:
            theirs.append(seconds_of(lambda: kthvalues(flat, scores, scope), device))
    cell = {"scores": flat.numel(), **spread("select_sec", own)}
    cell["per_1e9_scores_sec"] = cell["select_sec"] * 1e9 / flat.numel()
    if theirs:
        ratios = [mine / other for mine, other in zip(own, theirs, strict=True)]
        cell |= {**spread("kthvalue_sec", theirs), **spread("ratio_to_kthvalue", ratios)}
    return cell


def blank(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks that keep nothing yet."""
    return {name: torch.zeros_like(values, dtype=torch.bool) for name, values in scores.items()}


def kernels(
    scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], scope: str
) -> Callable[[Mapping[str, float]], dict[str, float]]:
    """Last thresholds -> new ones, by Triton's kernels, which write W * M in bf16 beside the masks, as in a search."""
    from finemask_ds.masks.device import DeviceSelection  # Needs Triton, which CPUs do not.
    from finemask_ds.masks.matrices import Matrix

    weights = {name: values.to(torch.bfloat16) for name, values in scores.items()}
    matrices = {
        name: Matrix(values, masks[name], weights[name], torch.zeros_like(weights[name]))
        for name, values in scores.items()
    }
    return DeviceSelection(matrices, SPARSITY, scope).renew


def renewal(scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], scope: str) -> Callable[[], None]:
    """What a search does after a step: a call that makes the masks exact again and knows the last thresholds."""
    thresholds = dict.fromkeys(scores, 0.01)
    if has_kernels(next(iter(scores.values())).device):
        renewed = kernels(scores, masks, scope)
        renewed(dict.fromkeys(scores, 1.0))  # Compiles, and is no threshold of theirs.
        return lambda: thresholds.update(renewed(thresholds))

    def renew() -> None:
        for name, selected in select(scores, SPARSITY, scope, near=thresholds).items():
            masks[name].copy_(selected.mask)
            thresholds[name] = selected.threshold

    return renew


def warm(shapes: Mapping[str, tuple[int, int]], scope: str, repeats: int, device: torch.device) -> dict[str, Any]:
    """Selection that knows the last thresholds: the first time, and when scores crossed, only moved, or did not."""
    flat, scores = draw(shapes, device)
    masks = blank(scores)
    renew = renewal(scores, masks, scope)

    def update() -> float:
        return seconds_of(renew, device)

    cell = {"scores": flat.numel(), "first_sec": update()}
    crossed, apart, unmoved = [], [], []
    for _ in range(repeats):
        flat += torch.empty_like(flat).bernoulli_().mul_(2 * MOVED).sub_(MOVED)
        crossed.append(update())
        for name, values in scores.items():
            values += torch.where(masks[name], MOVED, -MOVED)
        apart.append(update())
        unmoved.append(update())
    for name, selected in select(scores, SPARSITY, scope).items():
        if not torch.equal(masks[name], selected.mask):
            raise RuntimeError(f"the warm mask of {name} is not the exact one")
    return cell | spread("crossed_sec", crossed) | spread("apart_sec", apart) | spread("unmoved_sec", unmoved)


def free_bytes(device: torch.device) -> int:
    """Memory that is left for tensors on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def measure(cells: Cells, name: str, repeats: int, device: torch.device) -> None:
    """One cell, named ``cold-SIZE-SCOPE`` or ``warm-SIZE-SCOPE``."""
    start, size, scope = name.split("-")
    shapes = bert_base_shapes()
    if size in SIZES:
        shapes = {str(number): (1000, 1000) for number in range(SIZES[size] // 10**6)}
    number = sum(rows * columns for rows, columns in shapes.values())
    if number * BYTES_A_SCORE > free_bytes(device):
        print(f"{name}: left out, {number * BYTES_A_SCORE / 2**30:.0f} GiB are not free")
        return
    cell = (warm if start == "warm" else cold)(shapes, scope, repeats, device)
    cells.keep({name: {**cell, "repeats": repeats, "threads": torch.get_num_threads(), "device": device.type}})
    print(f"{name} done", flush=True)


def table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Cold cells and warm ones."""
    in_ms = (".1f", 1e-3)
    kinds = {
        "cold": {
            "select, ms": ("select_sec", *in_ms), "kthvalue, ms": ("kthvalue_sec", *in_ms),
            "ratio": ("ratio_to_kthvalue",), "s per 1e9": ("per_1e9_scores_sec",),
        },
        "warm": {f"{name}, ms": (f"{name}_sec", *in_ms) for name in ("first", "crossed", "apart", "unmoved")},
    }  # fmt: skip
    tables = []
    for kind, columns in kinds.items():
        found = {name: cell for name, cell in cells.items() if name.startswith(kind)}
        rows = [
            [name, f"{cell['scores']:,}", *(figure(cell, *column) for column in columns.values())]
            for name, cell in found.items()
        ]
        tables += [markdown(["", "scores", *columns], rows)] if rows else []
    return "\n\n".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=float, default=1e9, help="scores of the largest cell")
    parser.add_argument("--repeats", type=int, default=7, help="of each measurement")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "results/selection.json", help="keeps the cells")
    arguments = parser.parse_args()
    cells, device = Cells(arguments.out), this_process().device
    keep_freed_memory(device)  # As every search does.
    sizes = ["bert_base", *(size for size, number in SIZES.items() if number <= arguments.most)]
    names = [f"cold-{size}-{scope}" for size in sizes for scope in SCOPES]
    names += [f"warm-bert_base-{scope}" for scope in SCOPES]
    for name in names:
        if not cells.are_kept([name], device=device.type, repeats=arguments.repeats):
            measure(cells, name, arguments.repeats, device)
    print(table(cells.cells))


if __name__ == "__main__":
    main()
