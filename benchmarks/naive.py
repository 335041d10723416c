"""Mask training the usual way, written plainly: the baseline ``naive`` of speed.py.

It is how the public code of Piggyback (Mallya et al. 2018), movement pruning (Sanh et al. 2020) and TAMT's authors
goes about it: each module binarises its scores in every forward, by a clone and two assignments through bool indices,
and multiplies, letting autograd keep both factors; thresholds come from ``torch.kthvalue``, here of every matrix after
every step, so that the masks are as exact as ours; AdamW updates one tensor after another; the allocator is as torch
finds it. It trains the scores of TAMT-MLM inside our engines, so that all else is equal.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finemask_ds.engine.base import Engine
from finemask_ds.masks.select import num_kept


class StraightThrough(torch.autograd.Function):
    """1 where a score is above the threshold, else 0; the gradient goes straight to the scores."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, threshold: float) -> Tensor:
        mask = scores.clone()
        mask[scores > threshold] = 1.0
        mask[scores <= threshold] = 0.0
        return mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class NaiveMasked(nn.Module):
    """A linear map or an embedding whose weight is masked anew in each forward."""

    def __init__(self, module: nn.Linear | nn.Embedding, scores: Tensor):
        super().__init__()
        self.weight, self.bias = module.weight, getattr(module, "bias", None)
        self.padding_idx = getattr(module, "padding_idx", None)
        self.is_embedding = isinstance(module, nn.Embedding)
        self.scores = nn.Parameter(scores.clone())
        self.threshold = 0.0

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * StraightThrough.apply(self.scores, self.threshold)
        if self.is_embedding:
            return F.embedding(x, weight, self.padding_idx)
        return F.linear(x, weight, self.bias)


def attach(model: nn.Module, scores: dict[str, Tensor]) -> dict[str, NaiveMasked]:
    """Replace the modules of these weights, in place; weight's name -> its module."""
    modules = {}
    for name, values in scores.items():
        path, _, leaf = name.removesuffix(".weight").rpartition(".")
        parent = model.get_submodule(path)
        modules[name] = NaiveMasked(getattr(parent, leaf), values)
        setattr(parent, leaf, modules[name])
    return modules


class Thresholds:
    """Sets every module's threshold so that it keeps what the sparsity asks for."""

    def __init__(self, engine: Engine, modules: dict[str, NaiveMasked], sparsity: float):
        self.engine, self.modules, self.sparsity = engine, modules, sparsity
        self.after_step(0)

    def after_step(self, step: int) -> None:
        """The largest score that goes, matrix by matrix."""
        for module in self.modules.values():
            with self.engine.gathered([module.scores]):
                scores = module.scores.detach()
                num_pruned = scores.numel() - num_kept(scores.numel(), self.sparsity)
                module.threshold = scores.flatten().kthvalue(num_pruned).values.item()


def unfuse(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """A hook before every optimizer step of the process (``register_optimizer_step_pre_hook``): tensor after tensor."""
    for group in optimizer.param_groups:
        group["fused"] = group["foreach"] = False
