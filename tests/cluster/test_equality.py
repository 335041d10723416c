"""2 hosts x 1 rank find the masks of 1 host x 2 ranks, bit for bit; one rank's are told apart by counted scores only."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

import pytest
from torch import Tensor

from finemask_ds.config import SearchConfig
from finemask_ds.engine.guard import describe_ranks
from finemask_ds.masks.files import load_mask
from finemask_ds.masks.mask import Mask
from finemask_ds.run import Run
from tests.cluster.ranks import HostRankPool
from tests.pool import RankPool
from tests.search import jobs

pytestmark = pytest.mark.slow


def masks_of(config: SearchConfig) -> dict[str, Mask]:
    """Every mask of a run: on the way and the last."""
    run = Run(Path(config.run))
    return {path.name: load_mask(path) for path in [*run.masks_on_the_way(), run.mask]}


def largest_difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_a_pool_on_hosts_has_its_ranks_there(host_ranks: HostRankPool) -> None:
    told = host_ranks.run(describe_ranks)
    assert told == ["2 rank(s) on 2 host(s): node1 (1), node2 (1)"] * 2
    assert socket.gethostname() not in ("node1", "node2")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("method", ["tamt", "imp"])
def test_hosts_change_no_bit(
    host_ranks: HostRankPool, two_ranks: RankPool, toy_bert: Path, toy_text: Path, tmp_path: Path, method: str,
    stage: int,
) -> None:  # fmt: skip
    apart, together, alone = (
        jobs.either(method, tmp_path / name, toy_bert, toy_text, number)
        for name, number in (("apart", stage), ("together", stage), ("alone", None))
    )
    results = [jobs.find(config, pool) for config, pool in ((apart, host_ranks), (together, two_ranks), (alone, None))]
    assert results[0]["dev"] == results[1]["dev"]
    values = [jobs.last_values(config) for config in (apart, together, alone)]
    assert jobs.same(values[0], values[1])
    masks = [masks_of(config) for config in (apart, together, alone)]
    assert len(masks[0]) > 2
    assert masks[0] == masks[1]
