"""A cell of fine-tuning as a report knows it: read from its result, or planned and not done."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finemask_ds.config import FinetuneConfig
from finemask_ds.dispatch.plan import Cell
from finemask_ds.errors import UserError
from finemask_ds.report.origins import MaskOrigin
from finemask_ds.run import Run, read_json

SETTINGS = ("steps", "batch_size", "lr", "warmup_steps", "seq_len", "eval_every", "mixed_precision", "dropout",
            "weight_decay", "max_grad_norm", "train_sha256", "data_sha256", "dev_rows")  # fmt: skip
"""What cells of one model, mask, task, number of samples and seed may differ in."""

_OF_THE_ROWS = ("train_sha256", "steps", "warmup_steps")
"""What depends on the training rows; of SQuAD the steps too, as paragraphs have more windows or fewer."""

_TOLD_LATER = ("dropout", "weight_decay", "max_grad_norm")
"""Knobs that are not in the results of older versions."""


@dataclass(frozen=True)
class CellResult:
    """One fine-tuning: what was asked and, where it is done, what came out."""

    id: str
    state: str
    """``done``, ``failed`` or ``missing``."""
    path: Path
    """Its result.json, there only if done."""
    task: str
    method: str
    model: str
    sparsity: float | None
    """What was aimed at, as a share of the masked matrices; 0 for the full model, None where no one knows yet."""
    mask: str | None
    mask_key: str
    """Equal for equal masks: fingerprint, hash of the file or its path; "" for the full model."""
    mask_seed: int | None
    search_steps: int | None
    seed: int
    num_samples: int
    """Training rows asked for; 0: all."""
    model_sha256: str | None = None
    """Of the backbone's weights."""
    mask_sha256: str | None = None
    """Of the mask's file."""
    metric: str = ""
    score: float | None = None
    """Best dev result, 1 = perfect."""
    last_score: float | None = None
    undefined: str | None = None
    """Why ``score`` is None though the cell is done."""
    best_step: int | None = None
    steps: int | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    last_metrics: Mapping[str, float | None] = field(default_factory=dict)
    mismatched: Mapping[str, float | None] = field(default_factory=dict)
    curve: tuple[Mapping[str, Any], ...] = ()
    measured_sparsity: float | None = None
    train_rows: int | None = None
    dev_rows: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    lr: float | None = None
    warmup_steps: int | None = None
    seq_len: int | None = None
    eval_every: int | None = None
    mixed_precision: str | None = None
    dropout: float | None = None
    """None: the checkpoint's own."""
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    untold: frozenset[str] = frozenset()
    """Settings that nothing tells any more: their None is no value."""
    train_sha256: str = ""
    data_sha256: str = ""
    """Of the dev rows."""
    seconds: float | None = None
    peak_memory_gib: float | None = None
    versions: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    """The traceback of the last failed attempt."""
    origin: MaskOrigin | None = None
    """The search that found the mask, where its result is still there."""

    @property
    def backbone(self) -> str:
        """Which theta_0 it is: its weights, whatever their name; the name where no one knows them."""
        return self.model_sha256 or self.model

    @property
    def done(self) -> bool:
        """Whether there is a result."""
        return self.state == "done"

    @property
    def value(self) -> float:
        """The score as it counts in means: an undefined one is 0."""
        return self.score if self.score is not None else 0.0


def last_error(folder: Path) -> str:
    """Traceback and error of a cell's last failed attempt, "" where none failed or it is to be tried again."""
    failures = sorted(folder.glob("attempt-*/failed.json"), key=lambda path: int(path.parent.name.split("-")[-1]))
    if not failures:
        return ""
    found = read_json(failures[-1])
    if found.get("excused"):
        return ""
    trace, error = str(found.get("traceback") or "").rstrip(), str(found.get("error") or "failed without a word")
    return trace if trace.endswith(error) else f"{trace}\n{error}".lstrip()


def planned_cell(root: Path, cell: Cell) -> CellResult:
    """A cell that has no result yet: failed if an attempt says so, else missing."""
    defaults, folder = FinetuneConfig.defaults(), root / "cells" / cell.id
    options = {**defaults, **cell.options}
    mask, error = options["mask"] or None, last_error(folder)
    return CellResult(
        id=cell.id, state="failed" if error else "missing", path=folder / "result.json", task=cell.task,
        method=cell.method, model=options["model"], sparsity=None if mask else 0.0, mask=mask,
        mask_sha256=cell.mask_sha256, mask_key=mask or "", mask_seed=None, search_steps=None, seed=options["seed"],
        num_samples=options["num_samples"], error=error,
    )  # fmt: skip


def finished_cell(path: Path, result: Mapping[str, Any]) -> CellResult:
    """A cell with a result; KeyError, TypeError or ValueError where the file is not one of a cell."""
    mask, measured = result.get("mask"), float(result["sparsity"])
    target = result.get("target_sparsity")
    key = result.get("mask_fingerprint") or result.get("mask_sha256") or mask or ""
    plain = ("last_score", "undefined", "best_step", "steps", "train_rows", "dev_rows", "epochs", "batch_size", "lr",
             "warmup_steps", "seq_len", "eval_every", "mixed_precision", "seconds", "peak_memory_gib", "mask_seed",
             "mask_sha256", "search_steps", "model_sha256")  # fmt: skip
    maps = ("metrics", "last_metrics", "mismatched", "versions")
    data = result.get("data_sha256") or {}
    data = data if isinstance(data, dict) else {"dev": data}
    score = result["score"]
    others: dict[str, Any] = {name: result.get(name) for name in plain}
    others |= {name: dict(result.get(name) or {}) for name in maps} | _told_later(path.parent, result)
    return CellResult(
        id=path.parent.name, state="done", path=path, task=str(result["task"]), metric=str(result["metric"]),
        method=str(result.get("method") or ("imported" if mask else "full")), model=str(result.get("model", "")),
        sparsity=(round(measured, 2) if target is None else float(target)) if key else 0.0,
        measured_sparsity=measured, mask=mask, mask_key=str(key), seed=int(result.get("seed", 1)),
        num_samples=int(result.get("num_samples") or 0), score=None if score is None else float(score),
        curve=tuple(result.get("curve") or ()),
        train_sha256=str(data.get("train", "")), data_sha256=str(data.get("dev", "")), **others,
    )  # fmt: skip


def _told_later(folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs that an older result lacks as the cell's config.json has them, ``untold`` where that is gone too."""
    told: Mapping[str, Any] = result
    if any(name not in result for name in _TOLD_LATER):
        for path in (Run(folder).config, *folder.glob("attempt-*/config.json")):
            with contextlib.suppress(OSError, UserError, TypeError):
                told = {**read_json(path), **told}
    untold = frozenset(name for name in _TOLD_LATER if name not in told)
    return {name: told.get(name) for name in _TOLD_LATER} | {"untold": untold}


def differing(cells: Sequence[CellResult]) -> tuple[str, ...]:
    """The settings in which finished cells of one number differ; what a cell does not tell is no other setting.

    Fewer training rows are drawn by the seed, so that what depends on them may differ between seeds.
    """
    done = [cell for cell in cells if cell.done]
    found = []
    for name in SETTINGS:
        values: dict[int, set[Any]] = {}
        for cell in (cell for cell in done if name not in cell.untold):
            group = cell.seed if name in _OF_THE_ROWS and cell.num_samples else 0
            values.setdefault(group, set()).add(getattr(cell, name))
        if any(len(one) > 1 for one in values.values()):
            found.append(name)
    return tuple(found)
