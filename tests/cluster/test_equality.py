"""2 hosts x 1 rank find the masks of 1 host x 2 ranks, bit for bit; from one rank's only counted scores differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from finemask_ds.config import SearchConfig
from finemask_ds.engine.base import Engine
from finemask_ds.engine.guard import describe_ranks
from finemask_ds.engine.world import World
from finemask_ds.masks.files import load_mask
from finemask_ds.masks.mask import Mask
from finemask_ds.models.masked import scores_name
from finemask_ds.run import Run
from finemask_ds.search import imp
from finemask_ds.session import search
from tests.cluster.ranks import HostRankPool
from tests.pool import RankPool
from tests.search import jobs

pytestmark = pytest.mark.slow

Scores = dict[str, np.ndarray]
"""Matrix -> what the last selection ranked."""


def found_with_scores(world: World, config: SearchConfig) -> tuple[dict[str, Any], Scores]:
    """A search's result, and TAMT's last scores or the magnitudes before IMP's last pruning."""
    trained: Scores = {}
    prune = imp.prune

    def pruned(engine: Engine, mask: Mask, *more: Any) -> Mask:
        trained.update({name: value.cpu().abs().numpy().copy() for name, value in engine.read(mask)})
        return prune(engine, mask, *more)

    with mock.patch.object(imp, "prune", pruned):
        result = search(config, world)
    if not trained:
        values = jobs.last_values(config)
        trained = {name: values[scores_name(name)].numpy() for name in last_mask(config)}
    return result, trained


def last_mask(config: SearchConfig) -> Mask:
    return load_mask(Run(Path(config.run)).mask)


def all_masks(config: SearchConfig) -> dict[str, Mask]:
    run = Run(Path(config.run))
    return {path.name: load_mask(path) for path in [*run.masks_on_the_way(), run.mask]}


def equal(first: Scores, second: Scores) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def otherwise(first: Mask, scores: Scores, second: Mask, theirs: Scores) -> tuple[int, int]:
    """How many weights fell otherwise, and how many could: see the test."""
    flipped = could = 0
    for name in first:
        apart = np.abs(scores[name] - theirs[name]).max()
        threshold = scores[name][first[name].numpy()].min()
        near = np.abs(scores[name] - threshold) <= 2 * apart
        differing = first[name].numpy() != second[name].numpy()
        assert not (differing & ~near).any(), name
        flipped, could = flipped + int(differing.sum()), could + int(near.sum())
    return flipped, could


def test_a_pool_on_hosts_has_its_ranks_there(host_ranks: HostRankPool) -> None:
    assert host_ranks.run(describe_ranks) == ["2 rank(s) on 2 host(s): node1 (1), node2 (1)"] * 2


@pytest.fixture(scope="module", params=["tamt", "imp"])
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def alone(method: str, toy_bert: Path, toy_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Mask, Scores]:
    """What one plain process finds."""
    config = jobs.either(method, tmp_path_factory.mktemp("alone"), toy_bert, toy_text)
    _, scores = found_with_scores(World(), config)
    return last_mask(config), scores


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_hosts_change_no_bit_and_one_rank_differs_at_the_threshold_only(
    host_ranks: HostRankPool, two_ranks: RankPool, toy_bert: Path, toy_text: Path, tmp_path: Path, method: str,
    alone: tuple[Mask, Scores], stage: int,
) -> None:  # fmt: skip
    """Scores that differ by at most d move a threshold by at most d: only what is within 2 d of it may fall otherwise.

    One process adds up a batch in another order than two ranks do, so that its scores differ in their last bits.
    """
    apart, together = (
        jobs.either(method, tmp_path / name, toy_bert, toy_text, stage) for name in ("apart", "together")
    )
    on_hosts, on_one = host_ranks.run(found_with_scores, apart), two_ranks.run(found_with_scores, together)
    assert on_hosts[0][0]["dev"] == on_one[0][0]["dev"]
    assert equal(on_hosts[0][1], on_one[0][1])
    assert all_masks(apart) == all_masks(together)
    mask, scores = alone
    flipped, could = otherwise(mask, scores, last_mask(apart), on_hosts[0][1])
    print(f"{method}, stage {stage}: {flipped} weights fell otherwise than with one rank, {could} could")
    assert flipped <= could < 0.01 * sum(map(mask.num_weights, mask))
