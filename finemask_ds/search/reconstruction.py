"""A mask under which every matrix still computes what it did: found on some of the text, matrix by matrix, untrained.

As in SparseGPT (Frantar & Alistarh 2023) each matrix is pruned against what theta_0's computes, on the inputs that the
matrices pruned before it leave; but theta_0's weights stay as they are, and the mask alone is searched, by swaps. What
a matrix adds to the residual stream also makes up for what that stream has lost.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finemask_ds.masks.initialise import ranked
from finemask_ds.masks.mask import Mask
from finemask_ds.masks.swap import Reconstruction
from finemask_ds.models.families import Place
from finemask_ds.models.load import Pretrained
from finemask_ds.search.activations import activation_magnitudes
from finemask_ds.search.selection import largest
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

T = TypeVar("T")


class Pair(NamedTuple, Generic[T]):
    """One of theta_0 and one of the pruned model."""

    dense: T
    pruned: T


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

    first = [f"{family.layers}.0"]
    parts = blocks.to(device).split(max(1, TOKENS_AT_ONCE // blocks.shape[1]))
    hidden = [Pair(read(dense, part, first)[0], read(pruned, part, first)[0]) for part in parts]
    lists = (cast(nn.ModuleList, model.get_submodule(family.layers)) for model in (dense, pruned))
    stack = [Pair(*layers) for layers in zip(*lists, strict=True)]
    sizes: dict[str, Tensor] = {}
    started = time.monotonic()
    for number, layers in enumerate(stack):
        for roles in READ_TOGETHER:
            read_by = [family.within_layer(role) for role in (ADDED.get(roles[0]), roles[0]) if role]
            gram, between, lost = sums(layers, hidden, read_by)
            damping = DAMPING * gram.diag().mean()
            gram.diagonal().add_(damping)
            between.diagonal().add_(damping)
            for role in roles:
                name = names[Place(role, number)]
                weight = weights[name]
                search = Reconstruction(weight, gram, weight @ between + lost, start[name].to(device))
                search.swap()
                sizes[name] = search.sizes().cpu()
                weight.mul_(search.mask)
        hidden = [Pair(output(layers.dense, one.dense), output(layers.pruned, one.pruned)) for one in hidden]
        tell(_progress(number + 1, len(stack), hidden, started))
    return sizes


def _progress(done: int, num_layers: int, hidden: Sequence[Pair[Tensor]], started: float) -> str:
    """How far the outputs of the last layer done are from theta_0's (Eq. 6 of this layer), and the time left."""
    distances = torch.cat([(1 - F.cosine_similarity(*one, dim=-1)).flatten() for one in hidden])
    left = (time.monotonic() - started) / done * (num_layers - done)
    return f"layer {done}/{num_layers}: 1 - cos {float(distances.mean()):.4f}  eta {duration(left)}"


def sums(layers: Pair[nn.Module], hidden: Sequence[Pair[Tensor]], modules: Sequence[str]) -> tuple[Tensor, ...]:
    """Sums over tokens of products of what the last of ``modules`` reads, x in the dense layer, x' in the pruned one.

    Returns:
        x' x'^T and x x'^T, fp32 [columns, columns]; and r x'^T [rows, columns], r what the stream that the module's
        output is added to has lost, which the first of two modules reads; 0 where there is one module.
    """
    gram, between, lost = (torch.zeros((), device=hidden[0].dense.device) for _ in range(3))
    for one in hidden:
        *stream, x = _tokens(read(layers.dense, one.dense, modules))
        *pruned_stream, pruned_x = _tokens(read(layers.pruned, one.pruned, modules))
        gram = gram + pruned_x.T @ pruned_x
        between = between + x.T @ pruned_x
        if stream:
            lost = lost + (stream[0] - pruned_stream[0]).T @ pruned_x
    return gram, between, lost


def _tokens(read: Sequence[Tensor]) -> list[Tensor]:
    """[blocks, tokens, columns] -> [blocks * tokens, columns]."""
    return [one.flatten(0, -2) for one in read]


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
