"""Oneshot magnitude pruning (OMP) and random subnetworks (TAMT Section 3.2).

OMP keeps, inside each matrix (or over all), the weights of theta_0 with the largest magnitudes; the random baseline
keeps as many at random. Both are exact, need no training and are determined by theta_0, the sparsity and the seed.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from finemask_ds.config import MagnitudeConfig, SearchConfig
from finemask_ds.masks.mask import Mask
from finemask_ds.masks.select import magnitudes, select
from finemask_ds.models.load import Pretrained
from finemask_ds.search.outcome import Outcome
from finemask_ds.search.setting import Setting, Stopwatch


def find_mask(setting: Setting) -> Outcome:
    """OMP or random."""
    config, stopwatch = setting.config, Stopwatch()
    assert isinstance(config, MagnitudeConfig)
    theta0 = setting.theta0()
    mask = omp_mask(theta0, config) if config.kind == "omp" else random_mask(theta0, config)
    return Outcome(mask, steps=0, seconds=stopwatch.seconds)


def omp_mask(theta0: Pretrained, config: SearchConfig) -> Mask:
    """M^OMP: the n - round(S n) largest magnitudes of each matrix of theta_0 (or of all together)."""
    return largest(magnitudes(theta0.targets), config)


def largest(scores: Mapping[str, Tensor], config: SearchConfig) -> Mask:
    """The n - round(S n) largest scores of each matrix (or of all together)."""
    chosen = select(scores, config.sparsity, config.scope)
    return Mask({name: selection.mask for name, selection in chosen.items()})


def random_mask(theta0: Pretrained, config: SearchConfig) -> Mask:
    """As many weights as OMP keeps, drawn by the seed."""
    return Mask.random(theta0.shapes, config.sparsity, config.seed, scope=config.scope)
