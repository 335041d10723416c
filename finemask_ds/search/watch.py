"""What a mask does while it is searched for: sparsity, flips and distance, by role and by layer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy
import torch

from finemask_ds.engine.metrics import Recorder
from finemask_ds.masks.mask import Mask, ones

SAMPLE = 16_384
"""Scores of each matrix that go into a histogram."""

Draw = Callable[[numpy.ndarray, Sequence[str], Sequence[str]], numpy.ndarray]


@dataclass
class _Counts:
    """Weights of a group: all, kept now, changed since the last look, kept now and/or at the start."""

    total: int = 0
    kept: int = 0
    flipped: int = 0
    common: int = 0
    united: int = 0

    def add(self, other: _Counts) -> None:
        self.total += other.total
        self.kept += other.kept
        self.flipped += other.flipped
        self.common += other.common
        self.united += other.united

    @property
    def distance(self) -> float:
        """Mask distance 1 - |A and B| / |A or B| (TAMT, Section 4.2.5); of two empty masks 0."""
        return 1 - self.common / self.united if self.united else 0.0


class MaskWatch:
    """Compares each observed mask with the one before it and with the start.

    `places` gives the role ("Q", "K", ...) and layer (None outside the layers) of each matrix, `start` its
    first mask, bool. `previous` is the mask observed last, before the first look the start; None where a
    resumed run does not know it, so that its first look tells no flips.
    `draw(grid, rows, columns)` turns the distances, float [layers, roles] with NaN where there is no matrix,
    into uint8 [height, width, 3]; without it no heat map is recorded. Keeps two masks, a bit per weight.
    """

    def __init__(
        self,
        places: Mapping[str, tuple[str, int | None]],
        start: Mapping[str, torch.Tensor],
        previous: Mapping[str, torch.Tensor] | None,
        draw: Draw | None = None,
    ) -> None:
        self._places = {name: places[name] for name in start}
        self._start = _packed(start, start)
        self._previous = None if previous is None else _packed(previous, start)
        self._draw = draw

    def observe(
        self,
        recorder: Recorder,
        mask: Mapping[str, torch.Tensor],
        *,
        scores: Mapping[str, torch.Tensor] | None = None,
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        """Record mask/sparsity, mask/flips and mask/distance of each role, each layer and the total.

        Flips are the share of weights that changed since the last call, be it before the run was resumed. With a
        drawing function also the image mask/distance_map; with scores, histograms mask/margin/<role> of score
        minus threshold (of its matrix, 0 where none is given) over a sample. Does nothing on ranks whose recorder
        does not write: call it anywhere.
        """
        if not recorder.writes:
            return
        now = _packed(mask, self._start)
        previous, self._previous = self._previous, now
        counts = {name: self._count(name, now, previous or now) for name in self._start}
        for group, sums in self._groups(counts).items():
            recorder.record_last(f"mask/sparsity/{group}", 1 - sums.kept / sums.total)
            if previous is not None:
                recorder.record_last(f"mask/flips/{group}", sums.flipped / sums.total)
            recorder.record_last(f"mask/distance/{group}", sums.distance)
        if self._draw is not None:
            recorder.image("mask/distance_map", self._draw(*distance_grid(self._places, counts)))
        if scores is not None:
            for role, margins in self._margins(scores, thresholds or {}).items():
                recorder.histogram(f"mask/margin/{role}", margins)

    def _count(self, name: str, now: Mask, before: Mask) -> _Counts:
        if now.shapes[name] != self._start.shapes[name]:
            raise ValueError(f"{name}: mask of shape {now.shapes[name]}, at the start {self._start.shapes[name]}")
        bits, previous, start = (mask.bits(name) for mask in (now, before, self._start))
        return _Counts(now.num_weights(name), ones(bits), ones(bits ^ previous), ones(bits & start), ones(bits | start))

    def _groups(self, counts: Mapping[str, _Counts]) -> dict[str, _Counts]:
        groups: dict[str, _Counts] = defaultdict(_Counts)
        for name, (role, layer) in self._places.items():
            for group in (role, "total", *([] if layer is None else [f"layer_{layer:02d}"])):
                groups[group].add(counts[name])
        return groups

    def _margins(self, scores: Mapping[str, torch.Tensor], thresholds: Mapping[str, float]) -> dict[str, torch.Tensor]:
        margins: dict[str, list[torch.Tensor]] = defaultdict(list)
        for name, (role, _) in self._places.items():
            margins[role].append(sample(scores[name].detach()) - thresholds.get(name, 0.0))
        return {role: torch.cat(parts) for role, parts in margins.items()}


def _packed(mask: Mapping[str, torch.Tensor], names: Iterable[str]) -> Mask:
    return mask if isinstance(mask, Mask) else Mask({name: mask[name] for name in names})


def sample(values: torch.Tensor, size: int = SAMPLE) -> torch.Tensor:
    """Return at most `size` values at equal distances in the flattened tensor, always the same ones."""
    stride = max(1, math.ceil(values.numel() / size))
    # A stride that shares a factor with the row length would look at a few columns only.
    while values.dim() > 1 and stride > 1 and math.gcd(stride, values.shape[-1]) > 1:
        stride += 1
    return values.reshape(-1)[::stride]


def distance_grid(
    places: Mapping[str, tuple[str, int | None]], counts: Mapping[str, _Counts]
) -> tuple[numpy.ndarray, list[str], list[str]]:
    """Return the distances as float [layers, roles], NaN where there is no matrix, and both axes' labels.

    Matrices outside the layers (embedding, pooler) share a first row, "-".
    """
    roles = list(dict.fromkeys(role for role, _ in places.values()))
    layers = sorted({layer for _, layer in places.values()}, key=lambda layer: -1 if layer is None else layer)
    grid = numpy.full((len(layers), len(roles)), numpy.nan)
    for name, (role, layer) in places.items():
        grid[layers.index(layer), roles.index(role)] = counts[name].distance
    return grid, ["-" if layer is None else str(layer) for layer in layers], roles
