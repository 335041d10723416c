"""From an engine's trained values to masks: where a search selects, by learnt scores or by magnitudes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from finemask_ds.engine.base import Engine
from finemask_ds.engine.metrics import Recorder
from finemask_ds.masks.binarize import threshold
from finemask_ds.masks.select import Selection, num_kept, select, select_one
from finemask_ds.models.patch import masked_modules, read_mask
from finemask_ds.search.watch import MaskWatch, sample


def select_trained(
    engine: Engine,
    names: Mapping[str, str],
    sparsity: float,
    scope: str,
    *,
    score: Callable[[Tensor], Tensor] = lambda values: values,
    within: Mapping[str, Tensor] | None = None,
) -> dict[str, Selection]:
    """Exact selection over values that an engine trains.

    Args:
        engine: holds the values; in ZeRO-3 they are gathered matrix by matrix (all at once for the global scope).
        names: matrix's name in the model -> name of the engine's parameter whose values are ranked.
        sparsity: share to remove, in [0, 1).
        scope: ``local`` ranks inside each matrix, ``global`` over all.
        score: values -> scores (identity for learnt scores, magnitude for weights).
        within: bool per matrix; what is already pruned stays pruned.

    Returns:
        Matrix's name -> its selection, the same bits on every rank.
    """
    if scope == "global":
        with engine.gathered([engine.parameters[name] for name in names.values()]):
            scores = {matrix: score(engine.parameters[name].detach()) for matrix, name in names.items()}
            return select(scores, sparsity, scope, within=within)
    chosen = {}
    for matrix, (_, values) in zip(names, engine.read(names.values()), strict=True):
        chosen[matrix] = select_one(
            score(values),
            num_kept(values.numel(), sparsity),
            within=within[matrix] if within is not None else None,
        )
    return chosen


@dataclass
class ScoreMasks:
    """Keeps a model's masks true to its learnt scores while they train (TAMT Section 3.4.2)."""

    engine: Engine
    model: nn.Module
    sparsity: float
    scope: str
    threshold_every: int
    """Exact selection at multiples of this step; between them Eq. 3 with the last thresholds."""
    thresholds: dict[str, float] = field(default_factory=dict)
    """Matrix's name -> phi: kept where the score is at least phi."""

    def after_step(self, step: int) -> None:
        """Renew the masks from the scores that the optimizer has just moved."""
        if step % self.threshold_every == 0:
            self.select_exactly()
        else:
            self.binarize()

    def select_exactly(self) -> None:
        """M = the n - round(S n) largest scores; the thresholds follow."""
        chosen = select_trained(self.engine, self._names, self.sparsity, self.scope)
        modules = masked_modules(self.model)
        for name, selection in chosen.items():
            modules[name].mask.copy_(selection.mask)
            self.thresholds[name] = selection.threshold

    def binarize(self) -> None:
        """M = scores >= phi (Eq. 3), the thresholds as they are; the sparsity may drift."""
        modules = masked_modules(self.model)
        for (name, module), (_, scores) in zip(modules.items(), self.engine.read(self._names.values()), strict=True):
            module.mask.copy_(threshold(scores, self.thresholds[name]))

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


def scores_name(matrix: str) -> str:
    """Name of the scores of a matrix: ``...query.weight`` -> ``...query.scores``."""
    return matrix.removesuffix("weight") + "scores"
