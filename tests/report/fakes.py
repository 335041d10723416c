"""Results as searches, plans and fine-tunings leave them, drawn from a seed: plausible, with known holes."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from finemask_ds.masks.files import save_mask
from finemask_ds.masks.mask import Mask

SHAPES = {"encoder.layer.0.query.weight": (24, 32), "encoder.layer.1.query.weight": (24, 32)}
QUALITY = {"full": 1.0, "tamt-mlm+kd": 0.9, "tamt-mlm": 0.88, "tamt-kd": 0.86, "imp": 0.75, "omp": 0.55, "random": 0.2}
METRICS = {
    "cola": ("matthews", "accuracy"), "sst2": ("accuracy",), "mrpc": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"), "squad": ("f1", "exact_match"), "mnli": ("accuracy",),
}  # fmt: skip
HOLES = {("tamt-kd", "mrpc", 2, 3): "missing", ("imp", "squad", 1, 1): "failed", ("random", "stsb", 1, 1): "undefined",
         **{("omp", "squad", 1, seed): "missing" for seed in (1, 2, 3)}}  # fmt: skip
"""(method, task, mask seed, seed) at 0.7 -> what became of the cell."""


@dataclass
class Fakes:
    """Writes under one folder."""

    root: Path
    seed: int = 0
    planned: list[dict] = field(default_factory=list)

    def __post_init__(self):
        self.random = numpy.random.default_rng(self.seed)

    def search(self, method, sparsity, seed, steps=200, snapshots=(), **settings):
        """A finished search; the paths of its masks by number of steps."""
        name = f"{method}-{100 * sparsity:g}-{seed}" + (f"-{steps}" if method == "imp" else "")
        folder = self.root / "searches" / name.replace(" ", "_")[:60]
        omp = Mask.random(SHAPES, sparsity, seed=1000)
        steps = 0 if method in ("omp", "random") else steps
        shots, paths = [], {}
        for step in (*snapshots, steps):
            mask = omp if method == "omp" else Mask.random(SHAPES, sparsity, seed=zlib.crc32(name.encode()) + step)
            path = folder / ("mask.safetensors" if step == steps else f"masks/step-{step}.safetensors")
            provenance = {"method": method, "seed": seed, "steps": step, "target_sparsity": sparsity}
            save_mask(path, mask.with_provenance(provenance))
            gain = QUALITY.get(method, 0.5) * (1 if not steps else 0.6 + 0.4 * step / steps)
            dev = {"mlm_loss": 6 - 4 * gain + self.random.normal(0, 0.05), "mlm_accuracy": 0.5,
                   "kd_loss": 0.6 - 0.5 * gain + self.random.normal(0, 0.01)}  # fmt: skip
            shot = {"steps": step, "seconds": 0.13 * step, "sparsity": mask.sparsity(),
                    "distance_from_omp": mask.distance(omp) * (step / steps if steps else 1), "dev": dev}  # fmt: skip
            shots.append({"mask": str(path.relative_to(folder)), **shot})
            paths[step] = path
        final = {"method": method, "model": "builtin", "data": "builtin", "target_sparsity": sparsity, "ranks": 2,
                 **shots.pop(), "dev_dense": dev, "dev_trained_head": None}  # fmt: skip
        del final["mask"]
        write(folder / "result.json", {**final, **({"snapshots": shots} if shots else {})})
        write(folder / "config.json", {
            "config_version": 1, "method": method, "model": "builtin", "seed": seed, "sparsity": sparsity,
            "steps": steps, "run": str(folder), **settings,
        })  # fmt: skip
        write(folder / "provenance.json", PROVENANCE)
        return paths

    def cell(self, task, mask=None, *, method="full", sparsity=0.0, mask_seed=None, steps=None, seed=1, num_samples=0,
             state="done", score=None, **changes):  # fmt: skip
        """A cell of the plan in one of its states; its folder."""
        digest = hashlib.sha256(repr((task, str(mask), seed, num_samples, changes)).encode()).hexdigest()[:8]
        name = f"{task}-{method}-seed{seed}-{digest}"
        name = re.sub(r"[^\w.+-]+", "-", name)
        folder = self.root / "cells" / name
        sha256 = hashlib.sha256(mask.read_bytes()).hexdigest() if mask else None
        options = {"task": task, "seed": seed, "model": "builtin", **({"mask": str(mask)} if mask else {}),
                   **({"num_samples": num_samples} if num_samples else {})}  # fmt: skip
        self.planned.append(
            {"id": name, "method": method, "mask_sha256": sha256, "mask_bits": sha256, "options": options}
        )
        if state == "missing":
            return folder
        if state == "failed":
            error = "MemoryError: <script>alert(1)</script> full"
            trace = f'Traceback (most recent call last):\n  File "train.py"\n{error}\n'
            write(folder / "attempt-1" / "failed.json", {"error": error, "traceback": trace})
            return folder
        rows = num_samples or {"cola": 8551, "sst2": 20000, "mrpc": 3668, "stsb": 5749}.get(task, 10000)
        if score is None:
            late = 1 if not steps else 0.7 + 0.3 * steps / 200
            gain = (
                QUALITY.get(method, 0.5) * late * (1 - 0.5 * max(sparsity - 0.5, 0)) * (0.5 + 0.5 * rows / 20000) ** 0.2
            )
            score = float(numpy.clip(0.15 + 0.75 * gain + self.random.normal(0, 0.012), 0, 1))
        if state == "undefined":
            score = None
        names = METRICS.get(task, ("accuracy",))
        metrics = dict.fromkeys(names, score) | dict.fromkeys(names[1:], score and score * 1.04)
        dev = {step: {names[0]: (score or 0) * (1 - 0.5 * 0.8 ** (step / 20))} for step in range(50, 350, 50)}
        curve = [{"step": s, "epoch": s / 115, "train_loss": 0.6, "metrics": m} for s, m in dev.items()]
        result = {
            "kind": "finetune", "task": task, "metric": names[0], "score": score,
            "last_score": score and score * 0.99, "best_step": 250, "steps": 300,
            "undefined": "constant predictions" if score is None else None, "metrics": metrics,
            "last_metrics": metrics, "curve": curve, "mismatched": {"accuracy": score} if task == "mnli" else None,
            "model": "builtin", "model_sha256": "aa", "mask": str(mask) if mask else None, "mask_sha256": sha256,
            "mask_fingerprint": f"f{sha256}" if mask else None, "method": method, "mask_seed": mask_seed,
            "search_steps": steps, "target_sparsity": sparsity if mask else None, "sparsity": sparsity, "seed": seed,
            "num_samples": num_samples, "train_rows": rows, "dev_rows": 408, "data": "glue",
            "data_sha256": {"train": "bb", "dev": "cc"}, "epochs": 3, "batch_size": 32, "lr": 2e-5, "seq_len": 128,
            "seconds": 12.3, "peak_memory_gib": 0.9, "versions": {"torch": "2.9.0"}, **changes,
        }  # fmt: skip
        write(folder / "result.json", result)
        write(folder / "attempt-1" / "provenance.json", PROVENANCE)
        return folder

    def plan(self):
        """Write plan.json."""
        write(self.root / "plan.json", {"plan_version": 1, "retries": 2, "stale_sec": 60.0, "cells": self.planned})


PROVENANCE = {
    "started": "2026-01-02T03:04:05+00:00", "command": "python launcher/finetune.py",
    "versions": {"python": "3.11.9", "torch": "2.9.0"}, "code": {"commit": "0123456789abcdef", "dirty": False},
    "hardware": {"cpu": "A CPU & more", "cores": 2, "memory_gib": 8.0, "gpus": []},
}  # fmt: skip


def write(path, value):
    """Plain JSON; the fakes need no atomic writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def rich(root, seed=0, *, methods=tuple(QUALITY)[1:], tasks=("cola", "sst2", "stsb", "mrpc", "squad"),
         sparsities=(0.5, 0.7, 0.9), sizes=(1000, 2000, 5000)):  # fmt: skip
    """Methods x tasks x three masks x three seeds x sparsities, snapshots, budgets, scarcity, holes."""
    fakes, seeds = Fakes(root, seed), (1, 2, 3)
    for task in tasks:
        for number in seeds:
            fakes.cell(task, seed=number)
            if task in ("cola", "sst2"):
                for samples in sizes:
                    fakes.cell(task, seed=number, num_samples=samples)
    for sparsity in sparsities:
        for method in methods:
            for mask_seed in (1,) if method == "omp" else (1, 2, 3):
                shots = (50, 100, 150) if method.startswith("tamt") and sparsity == 0.7 else ()
                searches = [fakes.search(method, sparsity, mask_seed, snapshots=shots)]
                if method == "imp" and sparsity == 0.7:
                    searches += [fakes.search(method, sparsity, mask_seed, steps) for steps in (100, 150)]
                for steps, path in (item for paths in searches for item in paths.items()):
                    last = steps in (0, 200)
                    for task in tasks:
                        for number in seeds if last else (1,):
                            hole = HOLES.get((method, task, mask_seed, number)) if sparsity == 0.7 and last else None
                            made = {"method": method, "sparsity": sparsity, "mask_seed": mask_seed, "steps": steps}
                            fakes.cell(task, path, **made, seed=number, state=hole or "done")
                            if task in ("cola", "sst2") and sparsity == 0.7 and last:
                                for samples in sizes:
                                    fakes.cell(task, path, **made, seed=number, num_samples=samples)
    fakes.plan()
    return fakes


def small(root):
    """One sparsity, one mask a method, one seed, two tasks."""
    fakes = Fakes(root)
    for task in ("mrpc", "cola"):
        fakes.cell(task)
        for method in ("tamt-kd", "omp"):
            (steps, path), *_ = fakes.search(method, 0.7, 1).items()
            fakes.cell(task, path, method=method, sparsity=0.7, mask_seed=1, steps=steps)
    fakes.plan()
    return fakes


def long_names(root):
    """45 cells of methods with long names."""
    fakes, methods = Fakes(root), ("imported mask of somebody else's thesis", "<script>alert('x')</script>", "tamt-mlm")
    for method in methods:
        for mask_seed in (1, 2, 3):
            (steps, path), *_ = fakes.search(method.replace("/", ""), 0.65, mask_seed).items()
            for task in METRICS:
                if task != "mnli":
                    fakes.cell(task, path, method=method, sparsity=0.65, mask_seed=mask_seed, steps=steps)
    fakes.plan()
    return fakes
