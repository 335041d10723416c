"""A mask under which every matrix still computes what it did: found on some of the text, matrix by matrix, untrained.

As in SparseGPT (Frantar & Alistarh 2023) each matrix is pruned against what theta_0's computes, on the inputs that the
matrices pruned before it leave; but theta_0's weights stay as they are, and the mask alone is searched, by swaps. What
a matrix adds to the residual stream also makes up for what that stream has lost.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finemask_ds.engine.memory import keep_freed_memory
from finemask_ds.masks.binarize import masked
from finemask_ds.masks.mask import Mask
from finemask_ds.masks.swap import Reconstruction
from finemask_ds.models.families import LAYER_ROLES, Place
from finemask_ds.models.load import Pretrained
from finemask_ds.search.activations import activation_sizes
from finemask_ds.search.setting import Setting
from finemask_ds.units import duration

NUM_TOKENS = 32_768
"""Of the training text, evenly spread blocks, on which outputs are compared."""
DAMPING = 0.01
"""Share of gram's mean diagonal that is added to it: what no token of the sample tells apart goes by magnitude."""
READS_AS = {"K": "Q", "V": "Q"}
"""Role -> role before it that reads the same."""
ADDED = {"AO": "Q", "FO": "FI"}
"""Role -> role whose input, the residual stream, its output is added to."""

T = TypeVar("T")


class Pair(NamedTuple, Generic[T]):
    """One of theta_0 and one of the pruned model."""

    dense: T
    pruned: T


def reconstruction_sizes(theta0: Pretrained, setting: Setting) -> dict[str, Tensor]:
    """How much each weight is missed by what its matrix computes; the kept ones, and no others, have at least 1.

    The search starts from the largest of |w| times the norm of its input (``activation_sizes``); so do, and stay,
    matrices outside the layers, as the embedding, whose outputs a mask errs by independently in every weight. It runs
    on the first rank, so that all ranks have the same bits.

    Returns:
        Matrix's name -> fp32 of its shape, on the CPU.
    """
    world, found = setting.world, activation_sizes(theta0, setting)
    start = Mask({name: size >= 1 for name, size in found.items()})
    if world.is_first:
        blocks = setting.corpus.train  # Of which few are read.
        wanted = min(len(blocks), -(-NUM_TOKENS // setting.config.seq_len))
        spread = torch.linspace(0, len(blocks) - 1, wanted).round().long()
        chosen = torch.from_numpy(blocks[spread.numpy()].astype("int64"))

        def tell(line: str) -> None:
            print(line, flush=True)
            world.barrier()

        found |= reconstruct(theta0, chosen, start, world.device, tell)
    else:
        # So that none waits longer than a layer takes; see --time_out_sec.
        for _ in {place.layer for place in theta0.places.values()} - {None}:
            world.barrier()
    return {name: world.from_first(size) for name, size in found.items()}


@torch.no_grad()
def reconstruct(
    theta0: Pretrained,
    blocks: Tensor,
    start: Mask,
    device: torch.device,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Tensor]:
    """Search the masks of all layers' matrices, one after another.

    Args:
        theta0: the dense model, which is left as it is.
        blocks: int64 [blocks, tokens] without padding; all of them go through a layer at once.
        start: bool masks of all matrices to prune; each keeps as many weights as here.
        device: where to compute.
        tell: is given a line after each layer.

    Returns:
        Name of each matrix inside a layer -> its ``Reconstruction.sizes``, on the CPU.
    """
    keep_freed_memory(device)
    family, names = theta0.family, {place: name for name, place in theta0.places.items()}
    dense = copy.deepcopy(theta0.model).to(device).eval()
    pruned = copy.deepcopy(dense)
    for place, name in names.items():
        if place.layer is None:
            weight = pruned.get_parameter(name)
            weight.copy_(masked(weight, start[name].to(device)))

    models = Pair(dense, pruned)
    embeddings = family.embedding.rpartition(".")[0]
    hidden = Pair(*(model.get_submodule(embeddings)(blocks.to(device)) for model in models))
    lists = (cast(nn.ModuleList, model.get_submodule(f"{family.backbone}.{family.layers}")) for model in models)
    stack = [Pair(*layers) for layers in zip(*lists, strict=True)]
    paths = {role: family.within_layer(role) for role in LAYER_ROLES}
    sizes: dict[str, Tensor] = {}
    started = time.monotonic()
    for number, layers in enumerate(stack):
        of_layer = {role: names[Place(role, number)] for role in LAYER_ROLES}
        hidden, found = prune_layer(
            layers, paths, hidden, {role: start[name].to(device) for role, name in of_layer.items()}
        )
        sizes |= {of_layer[role]: size.cpu() for role, size in found.items()}
        tell(_progress(number + 1, len(stack), hidden, started))
    return sizes


def _progress(done: int, num_layers: int, hidden: Pair[Tensor], started: float) -> str:
    """How far the outputs of the last layer done are from theta_0's (Eq. 6 of this layer), and the time left."""
    distance = 1 - F.cosine_similarity(*hidden, dim=-1).mean()
    left = (time.monotonic() - started) / done * (num_layers - done)
    return f"layer {done}/{num_layers}: 1 - cos {float(distance):.4f}  eta {duration(left)}"


def prune_layer(
    layers: Pair[nn.Module],
    paths: Mapping[str, str],
    hidden: Pair[Tensor],
    start: Mapping[str, Tensor],
) -> tuple[Pair[Tensor], dict[str, Tensor]]:
    """Prune a layer's matrices in the course of its forward pass: each one when its inputs come to it.

    Args:
        layers: the weights of the pruned one are multiplied by the masks found.
        paths: role -> path of its linear map inside a layer.
        hidden: what the layers read, fp32 [blocks, tokens, columns].
        start: role -> bool mask [rows, columns].

    Returns:
        What the layers give, as ``hidden``; role -> ``Reconstruction.sizes``.
    """
    search = LayerSearch(start)
    with ExitStack() as hooks:
        for role, path in paths.items():
            matrices = Pair(*(layer.get_submodule(path) for layer in layers))
            hooks.enter_context(matrices.dense.register_forward_hook(partial(search.observe, role)))
            hooks.enter_context(matrices.pruned.register_forward_pre_hook(partial(search.prune, role)))
        return Pair(*map(output, layers, hidden)), search.sizes


@dataclass
class LayerSearch:
    """What is known of a layer while its inputs pass through it, by role; theta_0's layer comes first."""

    start: Mapping[str, Tensor]
    """bool [rows, columns]."""
    gave: dict[str, Tensor] = field(default_factory=dict)
    """What theta_0's matrix gives, [tokens, rows], until the pruned one's turn."""
    read: dict[str, Tensor] = field(default_factory=dict)
    """What theta_0's residual stream is before an output is added to it, [tokens, columns]."""
    lost: dict[str, Tensor] = field(default_factory=dict)
    """The same less the pruned model's."""
    grams: dict[str, tuple[Tensor, float]] = field(default_factory=dict)
    """See ``damped_gram``."""
    sizes: dict[str, Tensor] = field(default_factory=dict)
    """Found so far."""

    def observe(self, role: str, _: nn.Module, arguments: tuple[Any, ...], given: Tensor) -> None:
        """Note what theta_0's matrix reads and gives."""
        self.gave[role] = given.flatten(0, -2)
        if role in ADDED.values():
            self.read[role] = arguments[0].flatten(0, -2)

    def prune(self, role: str, module: nn.Linear, arguments: tuple[Any, ...]) -> None:
        """Search the mask of a matrix that is about to read its inputs, and multiply it in."""
        x = arguments[0].flatten(0, -2)
        if role in self.read:
            self.lost[role] = self.read.pop(role) - x
        wanted = self.gave.pop(role) - module.bias
        if role in ADDED:
            wanted += self.lost[ADDED[role]]
        if role not in READS_AS:
            self.grams[role] = damped_gram(x)
        gram, damping = self.grams[READS_AS.get(role, role)]
        cross = (wanted.T @ x).add_(module.weight, alpha=damping)
        search = Reconstruction(module.weight, gram, cross, self.start[role])
        search.swap()
        self.sizes[role] = search.sizes()
        module.weight.copy_(masked(module.weight, search.mask))


def damped_gram(x: Tensor) -> tuple[Tensor, float]:
    """The sum over tokens of x x^T, of [tokens, columns], and what its diagonal is raised by."""
    gram = x.T @ x
    damping = float(DAMPING * gram.diag().mean())
    gram.diagonal().add_(damping)
    return gram, damping


def output(layer: nn.Module, hidden: Tensor) -> Tensor:
    """A layer's hidden states; some versions of transformers put them in a tuple."""
    found = layer(hidden)
    return found[0] if isinstance(found, tuple) else found
