#!/usr/bin/env python
"""What bounds a step of TAMT-MLM on a CPU: its matrix products alone; and what torch.compile makes of its layers.

    python benchmarks/bounds.py

BERT-base's shapes, 8 x 128 tokens, fp32, two threads. A step cannot be shorter than its products: those of each matrix
forward and for the gradients of input and weight (the tied decoder's weight is frozen), and attention's. Compiled
layers take turns with eager ones, forward and backward of the same model. Medians. Writes results/bounds.json.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from finemask_ds.config import TamtConfig
from finemask_ds.engine.memory import keep_freed_memory
from finemask_ds.masks.initialise import ranked
from finemask_ds.models.load import load_pretrained
from finemask_ds.models.masked import MaskedLinear
from finemask_ds.models.patch import attach, masked_modules
from finemask_ds.provenance import collect
from finemask_ds.recipes.stages import REPOSITORY
from finemask_ds.run import write_json
from finemask_ds.search.magnitude import omp_mask
from finemask_ds.search.objectives import IGNORED, Objective

sys.path.insert(0, str(REPOSITORY))
from benchmarks.common import bert_base_files, bert_base_shapes, seconds_of

SEQUENCES, LENGTH, HEADS, HEAD_SIZE, LAYERS = 8, 128, 12, 64, 12
EVERY = 7
"""Each so-manieth token is predicted: 15 %."""
ROUNDS, WARM_UP = 10, 3
THREADS = 2


def product_sec(left: Tensor, right: Tensor) -> float:
    """Seconds of a matrix product."""
    return statistics.median([seconds_of(lambda: left @ right) for _ in range(WARM_UP + ROUNDS)][WARM_UP:])


def products_sec() -> dict[str, float]:
    """Seconds of a step's matrix products by what they are for."""
    tokens = SEQUENCES * LENGTH
    vocabulary, hidden = bert_base_shapes()["embedding"]
    layers = Counter(shape for name, shape in bert_base_shapes().items() if name != "embedding")
    head = tokens // EVERY
    linear = [(shape, number, tokens, True) for shape, number in layers.items()]
    linear += [((hidden, hidden), 1, head, True), ((vocabulary, hidden), 1, head, False)]
    seconds = dict.fromkeys(("forward", "gradients of inputs", "gradients of weights", "attention"), 0.0)
    for (outputs, inputs), number, rows, is_trained in linear:
        x, weight, gradient = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
        seconds["forward"] += number * product_sec(x, weight.t())
        seconds["gradients of inputs"] += number * product_sec(gradient, weight)
        if is_trained:
            seconds["gradients of weights"] += number * product_sec(gradient.t(), x)
    queries = torch.randn(SEQUENCES * HEADS, LENGTH, HEAD_SIZE)
    keys = queries.transpose(1, 2)
    # Forward Q K^T and A V; backward the gradients of A, and of V, Q and K.
    seconds["attention"] = LAYERS * (2 * product_sec(queries, keys) + 4 * product_sec(queries @ keys, queries))
    return seconds


def compiled_sec(folder: Path) -> dict[str, float]:
    """Seconds of forward and backward with eager and with compiled layers, and of the first compiled step."""
    theta0 = load_pretrained(bert_base_files(folder)[0])
    config = TamtConfig()
    mask = omp_mask(theta0, config)
    scores = {name: ranked(weight, mask[name], config.phi) for name, weight in theta0.targets.items()}
    theta0.model.requires_grad_(False)
    attach(theta0.model, mask, scores)
    for module in masked_modules(theta0.model).values():
        module.keeps_product = isinstance(module, MaskedLinear)
    objective = Objective(theta0.model.train(), "mlm")
    tokens = torch.randint(len(theta0.tokenizer), (SEQUENCES, LENGTH))
    labels = torch.full_like(tokens, IGNORED)
    labels[:, ::EVERY] = tokens[:, ::EVERY]
    layers = theta0.model.get_submodule(theta0.family.backbone).encoder.layer
    forwards = {
        "eager": [layer.forward for layer in layers],
        "compiled": [torch.compile(layer.forward, dynamic=False) for layer in layers],
    }

    def step_sec(kind: str) -> float:
        for layer, forward in zip(layers, forwards[kind], strict=True):
            layer.forward = forward
        objective.zero_grad()
        return seconds_of(lambda: objective({"input_ids": tokens, "labels": labels})["mlm_loss"].backward())

    seconds = {"first compiled": step_sec("compiled")}
    taken: dict[str, list[float]] = {kind: [] for kind in forwards}
    for _ in range(WARM_UP + ROUNDS):
        for kind, times in taken.items():
            times.append(step_sec(kind))
    return seconds | {kind: statistics.median(times[WARM_UP:]) for kind, times in taken.items()}


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    keep_freed_memory(torch.device("cpu"))
    products = products_sec()
    for kind, seconds in products.items():
        print(f"{kind}: {seconds:.3f} s")
    print(f"matrix products of a step: {sum(products.values()):.3f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        compiled = compiled_sec(Path(folder))
    for kind, seconds in compiled.items():
        print(f"forward and backward, {kind}: {seconds:.3f} s")
    made = {**collect(), "command": " ".join(["python", *sys.argv])}
    write_json(REPOSITORY / "results/bounds.json", {"made": made, "products_sec": products, "compiled_sec": compiled})


if __name__ == "__main__":
    main()
