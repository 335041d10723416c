"""A mask under which every matrix still computes what it did: found on some of the text, matrix by matrix, untrained.

As in SparseGPT (Frantar & Alistarh 2023) each matrix is pruned against what theta_0's computes, on the inputs that the
matrices pruned before it leave; but theta_0's weights stay as they are, and the mask alone is searched, by swaps. What
a matrix adds to the residual stream also makes up for what that stream has lost.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finemask_ds.masks.initialise import ranked
from finemask_ds.masks.mask import Mask
from finemask_ds.masks.swap import Reconstruction
from finemask_ds.models.families import Place
from finemask_ds.models.load import Pretrained
from finemask_ds.search.activations import activation_magnitudes
from finemask_ds.search.magnitude import largest
from finemask_ds.search.setting import Setting
from finemask_ds.units import duration

NUM_TOKENS = 32_768
"""Of the training text, evenly spread blocks, on which outputs are compared."""
TOKENS_AT_ONCE = 4_096
DAMPING = 0.01
"""Share of gram's mean diagonal that is added to it: what no token of the sample tells apart goes by magnitude."""
READ_TOGETHER = (("Q", "K", "V"), ("AO",), ("FI",), ("FO",))
"""Roles in the order of the computation; those that read the same are searched at once."""
ADDED = {"AO": "Q", "FO": "FI"}
"""Role -> role whose input its output is added to."""

Pair = tuple[Tensor, Tensor]
"""Of theta_0 and of the pruned model, on the same tokens."""


def reconstruction_sizes(theta0: Pretrained, setting: Setting) -> dict[str, Tensor]:
    """How much each weight is missed by what its matrix computes; the kept ones, and no others, have at least 1.

    The search starts from the largest of |w| times the norm of its input (``activation_magnitudes``); so do, and stay,
    matrices outside the layers, as the embedding, whose outputs a mask errs by independently in every weight. It runs
    on the first rank, so that all ranks have the same bits.

    Returns:
        Matrix's name -> fp32 of its shape, on the CPU.
    """
    world, sizes = setting.world, activation_magnitudes(theta0, setting)
    start = largest(sizes, setting.search)
    found = {name: ranked(size, start[name], phi=1.0) for name, size in sizes.items()}
    if world.is_first:
        blocks = torch.from_numpy(setting.corpus.train.astype("int64"))
        wanted = min(len(blocks), -(-NUM_TOKENS // setting.config.seq_len))
        spread = torch.linspace(0, len(blocks) - 1, wanted).round().long()
        found |= reconstruct(theta0, blocks[spread], start, world.device, lambda line: print(line, flush=True))
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
        blocks: int64 [blocks, tokens] without padding.
        start: bool masks of all matrices to prune; each keeps as many weights as here.
        device: where to compute.
        tell: is given a line after each layer.

    Returns:
        Name of each matrix inside a layer -> its ``Reconstruction.sizes``, on the CPU.
    """
    family = theta0.family
    dense = copy.deepcopy(theta0.model.get_submodule(family.backbone)).to(device).eval()
    pruned = copy.deepcopy(dense)
    names = {place: name for name, place in theta0.places.items()}
    weights = {name: pruned.get_parameter(name.removeprefix(f"{family.backbone}.")) for name in theta0.places}
    for name, (_, layer) in theta0.places.items():
        if layer is None:
            weights[name].mul_(start[name].to(device))

    parts = blocks.to(device).split(max(1, TOKENS_AT_ONCE // blocks.shape[1]))
    pairs: list[Pair] = [
        (read(dense, part, [f"{family.layers}.0"])[0], read(pruned, part, [f"{family.layers}.0"])[0]) for part in parts
    ]
    layers: Any = [list(model.get_submodule(family.layers)) for model in (dense, pruned)]  # type: ignore[call-overload]
    sizes: dict[str, Tensor] = {}
    started = time.monotonic()
    for number, both in enumerate(zip(*layers, strict=True)):
        for roles in READ_TOGETHER:
            read_by = [family.within_layer(role) for role in (ADDED.get(roles[0]), roles[0]) if role]
            gram, between, lost = sums(both, pairs, read_by)
            damping = DAMPING * gram.diag().mean()
            gram.diagonal().add_(damping)
            between.diagonal().add_(damping)
            for role in roles:
                name = names[Place(role, number)]
                weight = weights[name]
                cross = weight @ between if lost is None else weight @ between + lost
                search = Reconstruction(weight, gram, cross, start[name].to(device))
                search.swap()
                sizes[name] = search.sizes().cpu()
                weights[name].mul_(search.mask)
        pairs = [(output(both[0], d), output(both[1], s)) for d, s in pairs]
        distance = sum(float((1 - F.cosine_similarity(d, s, dim=-1)).sum()) for d, s in pairs) / blocks.numel()
        left = (time.monotonic() - started) / (number + 1) * (len(layers[0]) - number - 1)
        tell(f"layer {number + 1}/{len(layers[0])}: 1 - cos {distance:.4f}  eta {duration(left)}")
    return sizes


def sums(
    layers: tuple[nn.Module, nn.Module], pairs: Sequence[Pair], modules: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums over tokens of products of what the last of ``modules`` reads in the dense layer, x, and the pruned one, x'.

    Returns:
        x' x'^T and x x'^T, fp32 [columns, columns]; and r x'^T [rows, columns], r what the residual stream that the
        module's output is added to, which the first of two modules reads, has lost; None where there is one module.
    """
    gram: Any = 0.0
    between: Any = 0.0
    lost: Any = 0.0
    for d, s in pairs:
        *stream, x = (found.flatten(0, -2) for found in read(layers[0], d, modules))
        *stream_pruned, x_pruned = (found.flatten(0, -2) for found in read(layers[1], s, modules))
        gram += x_pruned.T @ x_pruned
        between += x.T @ x_pruned
        if stream:
            lost += (stream[0] - stream_pruned[0]).T @ x_pruned
    return gram, between, lost if len(modules) > 1 else None


class _AllRead(Exception):  # noqa: N818
    """Ends a forward pass of which nothing more is wanted."""


def read(model: nn.Module, inputs: Tensor, modules: Sequence[str]) -> list[Tensor]:
    """What these modules inside ``model`` read where it reads ``inputs``; it computes no further than that."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen[name] = arguments[0]
            if len(seen) == len(modules):
                raise _AllRead

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in modules]
    try:
        model(inputs)
    except _AllRead:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [seen[name] for name in modules]


def output(layer: nn.Module, hidden: Tensor) -> Tensor:
    """A layer's hidden states; some versions of transformers put them in a tuple."""
    found = layer(hidden)
    return found[0] if isinstance(found, tuple) else found
