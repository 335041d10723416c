"""From scores to masks: where a search selects, by what an engine trains, learnt scores or weights, or what it has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finemask_ds.config import SearchConfig
from finemask_ds.engine.base import Engine, Piece
from finemask_ds.engine.metrics import Recorder
from finemask_ds.engine.world import World
from finemask_ds.masks.binarize import has_kernels, threshold
from finemask_ds.masks.mask import Mask
from finemask_ds.masks.select import Selection, select
from finemask_ds.masks.sharded import Shards, pack, select_sharded, unpack
from finemask_ds.models.families import Place
from finemask_ds.models.masked import MaskedLinear, scores_name
from finemask_ds.models.patch import masked_modules, read_mask, write_mask
from finemask_ds.search.watch import MaskWatch, sample

if TYPE_CHECKING:
    from finemask_ds.masks.device import DeviceSelection


def largest(scores: Mapping[str, Tensor], config: SearchConfig) -> Mask:
    """The n - round(S n) largest scores of each matrix (or of all together)."""
    chosen = select(scores, config.sparsity, config.scope)
    return Mask({name: selection.mask for name, selection in chosen.items()})


EMBEDDING_DENSITY = 0.7
"""Density of an embedding at the start of a global search, as a share of all weights' density (results/README.md)."""


def evenly(sizes: Mapping[str, Tensor], places: Mapping[str, Place], config: SearchConfig) -> Mask:
    """The largest sizes of each matrix, where those of one say nothing of those of another.

    ``local`` keeps the same share of each. ``global`` starts from a split that training then moves: the same share of
    each but of an embedding, most of whose rows are of rare tokens: it keeps ``EMBEDDING_DENSITY`` of the share of all,
    as far as the others have room for the rest.
    """
    if config.scope == "local":
        return largest(sizes, config)
    embeddings = {name: size for name, size in sizes.items() if places[name].role == "Emb"}
    others = {name: size for name, size in sizes.items() if name not in embeddings}
    num_embedded, num_others = (sum(size.numel() for size in part.values()) for part in (embeddings, others))
    density = of_embeddings = 1 - config.sparsity
    kept = density * (num_embedded + num_others)
    of_others = min(1.0, (kept - EMBEDDING_DENSITY * density * num_embedded) / max(num_others, 1))
    if embeddings and others:
        of_embeddings = (kept - of_others * num_others) / num_embedded
    chosen = select(embeddings, 1 - of_embeddings, "local") | select(others, 1 - of_others, "local")
    return Mask({name: chosen[name].mask for name in sizes})


def select_trained(
    engine: Engine,
    names: Mapping[str, str],
    sparsity: float,
    scope: str,
    *,
    score: Callable[[Tensor], Tensor] = lambda values: values,
    within: Mapping[str, Tensor] | None = None,
    near: Mapping[str, float] | None = None,
) -> dict[str, Selection]:
    """Exact selection over values that an engine trains.

    Args:
        engine: holds the values; in ZeRO-3 each rank counts on its own pieces, and only masks travel.
        names: matrix's name in the model -> name of the engine's parameter whose values are ranked.
        sparsity: share to remove, in [0, 1).
        scope: ``local`` ranks inside each matrix, ``global`` over all.
        score: values -> scores (identity for learnt scores, magnitude for weights).
        within: bool per matrix; what is already pruned stays pruned.
        near: thresholds of a step ago, which save work where they still hold; see ``select``.

    Returns:
        Matrix's name -> its selection, the same bits on every rank.
    """
    if not engine.is_partitioned:
        values = engine.parameters
        scores = {matrix: score(values[name].detach()) for matrix, name in names.items()}
        return select(scores, sparsity, scope, within=within, near=near)
    world, pieces = engine.world, held_pieces(engine, names)
    shapes = {matrix: engine.shapes[name] for matrix, name in names.items()}
    kept = select_sharded(
        {matrix: score(piece.of(piece.leaf)).to(world.device) for matrix, piece in pieces.items()},
        {matrix: math.prod(shape) for matrix, shape in shapes.items()},
        sparsity, scope, Shards(world.rank, world.size, world.sum),
        within=None if within is None else {
            matrix: within[matrix].flatten()[piece.start : piece.stop].to(world.device)
            for matrix, piece in pieces.items()
        },
        near=near,
    )  # fmt: skip
    masks = whole_masks({matrix: mask for matrix, (mask, _) in kept.items()}, shapes, world)
    return {matrix: Selection(masks[matrix], threshold) for matrix, (_, threshold) in kept.items()}


def held_pieces(engine: Engine, names: Mapping[str, str]) -> dict[str, Piece]:
    """In ZeRO-3, where a rank updates one piece of each value: matrix -> this rank's piece."""
    piece_of = {piece.name: piece for piece in engine.pieces}
    return {matrix: piece_of[name] for matrix, name in names.items()}


def whole_masks(pieces: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], world: World) -> dict[str, Tensor]:
    """Every rank's pieces of the masks put together on every rank; a bit per weight travels, once.

    Args:
        pieces: name -> bool [n], rank r's elements r * ceil(weights / ranks) and on of the flat matrix.
        shapes: name -> shape of the matrix.
        world: the ranks.
    """
    lengths = {name: -(-math.prod(shape) // world.size) for name, shape in shapes.items()}
    packed = {name: pack(piece, -(-lengths[name] // 8)) for name, piece in pieces.items()}
    gathered = world.gather_bytes(torch.cat(list(packed.values())))
    masks = {}
    columns = gathered.split([part.numel() for part in packed.values()], dim=1)
    for (name, shape), part in zip(shapes.items(), columns, strict=True):
        flat = unpack(part)[:, : lengths[name]].flatten()
        masks[name] = flat[: math.prod(shape)].view(shape)
    return masks


@dataclass
class ScoreMasks:
    """Keeps a model's masks true to its learnt scores while they train (TAMT Section 3.4.2)."""

    engine: Engine
    model: nn.Module
    sparsity: float
    scope: str
    threshold_every: int
    """Exact selection at multiples of this step; between them Eq. 3 with the last thresholds."""
    thresholds: dict[str, float]
    """Matrix's name -> phi: kept where the score is at least phi; infinite where nothing is kept."""

    def __post_init__(self) -> None:
        for module in masked_modules(self.model).values():
            # Of an embedding only some rows are read; stage 3 has W whole inside a module's own forward only.
            module.keeps_product = isinstance(module, MaskedLinear) and not self.engine.is_partitioned

    def after_step(self, step: int) -> None:
        """Renew the masks from the scores that the optimizer has just moved."""
        if step % self.threshold_every == 0:
            self.select_exactly()
        else:
            self.binarize()

    def select_exactly(self) -> None:
        """M = the n - round(S n) largest scores; the thresholds follow."""
        if self.threshold_every == 1 and not self.engine.is_partitioned and has_kernels(self.engine.world.device):
            self.thresholds = self._on_device.renew(self.thresholds)
            return
        # Between exact selections Eq. 3 wants the smallest kept scores themselves, not thresholds that still hold.
        near = self.thresholds if self.threshold_every == 1 else None
        chosen = select_trained(self.engine, self._names, self.sparsity, self.scope, near=near)
        write_mask(self.model, {name: selection.mask for name, selection in chosen.items()})
        self.thresholds = {name: selection.threshold for name, selection in chosen.items()}

    def exact(self) -> dict[str, Tensor]:
        """The exact selection, also between two of them: masks that are kept have the target's sparsity."""
        if self.threshold_every == 1:
            return read_mask(self.model)
        chosen = select_trained(self.engine, self._names, self.sparsity, self.scope)
        return {name: selection.mask for name, selection in chosen.items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to hold beside the scores; JSON has no infinity."""
        return {"thresholds": {name: phi if math.isfinite(phi) else None for name, phi in self.thresholds.items()}}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Renew the masks from scores that a checkpoint of ``state`` has brought."""
        self.thresholds = {name: math.inf if phi is None else phi for name, phi in state["thresholds"].items()}
        self.after_step(state["step"])

    @cached_property
    def _on_device(self) -> DeviceSelection:
        from finemask_ds.masks.device import DeviceSelection  # Needs Triton, which CPUs do not.
        from finemask_ds.masks.matrices import Matrix

        matrices = {
            name: Matrix(module.scores, module.mask, module.weight, module.product())
            for name, module in masked_modules(self.model).items()
            if module.scores is not None
        }
        return DeviceSelection(matrices, self.sparsity, self.scope)

    def binarize(self) -> None:
        """M = scores >= phi (Eq. 3), the thresholds as they are; the sparsity may drift."""
        engine, names = self.engine, self._names
        if engine.is_partitioned:
            kept = {
                name: threshold(piece.of(piece.leaf), self.thresholds[name]).to(engine.world.device)
                for name, piece in held_pieces(engine, names).items()
            }
            masks = whole_masks(kept, {name: engine.shapes[scores] for name, scores in names.items()}, engine.world)
        else:
            masks = {
                name: threshold(engine.parameters[scores].detach(), self.thresholds[name])
                for name, scores in names.items()
            }
        write_mask(self.model, masks)

    def show(self, watch: MaskWatch, recorder: Recorder) -> None:
        """Record sparsity, flips, distance and a sample of the scores against their thresholds; on all ranks."""
        scores = {
            name: sample(values).clone()
            for name, (_, values) in zip(self._names, self.engine.read(self._names.values()), strict=True)
        }
        watch.observe(recorder, read_mask(self.model), scores=scores, thresholds=self.thresholds)

    @property
    def _names(self) -> dict[str, str]:
        return {name: scores_name(name) for name in masked_modules(self.model)}
