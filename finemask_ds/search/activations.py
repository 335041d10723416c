"""Magnitudes weighed by what flows through: |w| times the norm of its input (Wanda, Sun et al. 2023, Section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from finemask_ds.masks.initialise import ranked
from finemask_ds.models.load import Pretrained
from finemask_ds.search.selection import evenly
from finemask_ds.search.setting import Setting

NUM_TOKENS = 16_384
"""Of the training text, on which the norms are taken."""


def activation_magnitudes(theta0: Pretrained, setting: Setting) -> dict[str, Tensor]:
    """|W_ij| * ||X_j|| for every matrix to prune, X_j the j-th input of theta_0's matrix over some of the text.

    An embedding is a linear map of one-hot vectors: row i's input has the norm sqrt(occurrences of token i), here plus
    one, so that a token that the sample lacks is still ranked by its magnitudes. The norms come from the first rank, so
    that all ranks have the same bits.

    Returns:
        Matrix's name -> fp32 of its shape, on the CPU.
    """
    norms = setting.world.on_first(lambda: input_norms(theta0, setting))
    return {name: weight.float().abs() * norms[name] for name, weight in theta0.targets.items()}


def activation_sizes(theta0: Pretrained, setting: Setting) -> dict[str, Tensor]:
    """``activation_magnitudes`` in units of the smallest of each matrix that ``evenly`` keeps.

    So the sizes of all matrices can be ranked together: the kept ones, and no others, have at least 1.
    """
    magnitudes = activation_magnitudes(theta0, setting)
    start = evenly(magnitudes, theta0.places, setting.search)
    return {name: ranked(magnitude, start[name], phi=1.0) for name, magnitude in magnitudes.items()}


def input_norms(theta0: Pretrained, setting: Setting) -> dict[str, Tensor]:
    """Matrix's name -> norms of its inputs, fp32 [1, columns], of an embedding [rows, 1]."""
    squares: dict[str, Tensor] = {}
    modules = {name: theta0.model.get_submodule(name.rpartition(".")[0]) for name in theta0.targets}
    handles = [module.register_forward_hook(_add_squares(squares, name)) for name, module in modules.items()]
    backbone = theta0.model.get_submodule(theta0.family.backbone).to(setting.world.device)
    was_training = backbone.training
    backbone.eval()
    blocks = torch.from_numpy(setting.corpus.train[: -(-NUM_TOKENS // setting.config.seq_len)].astype("int64"))
    with torch.no_grad():
        for part in blocks.split(8):
            backbone(input_ids=part.to(setting.world.device))
    backbone.to("cpu").train(was_training)
    for handle in handles:
        handle.remove()
    return {name: squares[name].sqrt().float().cpu() for name in theta0.targets}


def _add_squares(squares: dict[str, Tensor], name: str) -> Callable[..., None]:
    def add(module: nn.Module, inputs: tuple[Any, ...], _: object) -> None:
        found = inputs[0].detach()
        if isinstance(module, nn.Embedding):
            occurrences = torch.bincount(found.flatten(), minlength=module.num_embeddings)[:, None].double()
            squares[name] = squares.get(name, 1.0) + occurrences
        else:
            squares[name] = squares.get(name, 0.0) + found.flatten(0, -2).double().square().sum(0, keepdim=True)

    return add
