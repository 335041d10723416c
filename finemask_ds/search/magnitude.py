"""Masks without training: oneshot magnitude pruning (OMP), random subnetworks (TAMT Section 3.2), reconstruction.

OMP keeps, inside each matrix (or over all), the weights of theta_0 with the largest magnitudes; the random baseline
keeps as many at random; reconstruction as many of which every matrix misses the others least (see there). All are exact
and determined by theta_0, the sparsity and the seed, the last by the text too.
"""

from __future__ import annotations

from finemask_ds.config import MagnitudeConfig, SearchConfig
from finemask_ds.engine.stopwatch import Stopwatch
from finemask_ds.masks.mask import Mask
from finemask_ds.masks.select import magnitudes
from finemask_ds.models.load import Pretrained
from finemask_ds.search.outcome import Outcome
from finemask_ds.search.reconstruction import reconstruction_sizes
from finemask_ds.search.selection import largest
from finemask_ds.search.setting import Setting


def find_mask(setting: Setting) -> Outcome:
    """OMP, random or reconstruction."""
    config, stopwatch = setting.config, Stopwatch(ranks=setting.world.size)
    assert isinstance(config, MagnitudeConfig)
    theta0 = setting.theta0()
    if config.kind == "omp":
        mask = omp_mask(theta0, config)
    elif config.kind == "random":
        mask = random_mask(theta0, config)
    else:
        mask = largest(reconstruction_sizes(theta0, setting), config)
    return Outcome(mask, steps=0, seconds=stopwatch.seconds, rank_seconds=stopwatch.rank_seconds)


def omp_mask(theta0: Pretrained, config: SearchConfig) -> Mask:
    """M^OMP: the n - round(S n) largest magnitudes of each matrix of theta_0 (or of all together)."""
    return largest(magnitudes(theta0.targets), config)


def random_mask(theta0: Pretrained, config: SearchConfig) -> Mask:
    """As many weights as OMP keeps, drawn by the seed."""
    return Mask.random(theta0.shapes, config.sparsity, config.seed, scope=config.scope)
