"""The collective checks on two real ranks, which pass for two hosts."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from torch import Tensor

from finemask_ds.config import DoctorConfig
from finemask_ds.doctor.checks import Check, Cluster
from finemask_ds.doctor.facts import look_around
from finemask_ds.doctor.together import check_all_reduce, check_clocks, check_folders
from finemask_ds.engine.world import World
from tests.pool import RankPool


@dataclass(frozen=True)
class Wrong(World):
    """Ranks of which the second has a bad bit in its memory."""

    def sum(self, tensor: Tensor) -> Tensor:
        total = super().sum(tensor)
        if self.rank == 1:
            total[-1] += 1
        return total


def said(
    world: World, check: Check, run: Path, kind: type[World] = World, cache: str = "", jump_sec: float = 0.0
) -> list[str]:
    """What a check finds when every rank has another host's name; the first rank's lines count."""
    os.environ["FINEMASK_CACHE"] = cache.format(rank=world.rank)
    world = kind(world.rank, world.size, world.device)
    facts = replace(look_around(DoctorConfig(run=str(run)), world), host=f"node{world.rank + 1}")
    facts = replace(facts, wall_minus_monotonic_sec=facts.wall_minus_monotonic_sec - jump_sec * world.rank)
    seen = Cluster(DoctorConfig(run=str(run)), world, world.gather(facts))
    return [str(finding) for finding in check(seen)]


@pytest.mark.slow
def test_a_sum_is_measured_and_is_right(two_ranks: RankPool, tmp_path: Path) -> None:
    (line,) = two_ranks.run(said, check_all_reduce, tmp_path)[0]
    assert line.startswith("ok    all-reduce: right on all ranks, latency ")


def test_a_rank_that_sums_wrongly_is_named(two_ranks: RankPool, tmp_path: Path) -> None:
    (line,) = two_ranks.run(said, check_all_reduce, tmp_path, Wrong)[0]
    assert line.startswith("bad   all-reduce: a wrong sum on rank 1 on node2; ")


@pytest.mark.slow
def test_folders_are_shared_or_each_hosts_own(two_ranks: RankPool, tmp_path: Path) -> None:
    for name in ("one", "rank0", "rank1"):
        (tmp_path / name).mkdir()
    lines = two_ranks.run(said, check_folders, tmp_path / "new", World, str(tmp_path / "one"))[0]
    assert lines == [
        f"ok    --run: {tmp_path} shared by 2 hosts",
        f"ok    cache: {tmp_path / 'one'} shared by 2 hosts: text and models are prepared once",
    ]
    lines = two_ranks.run(said, check_folders, tmp_path, World, f"{tmp_path}/rank{{rank}}")[0]
    assert (
        lines[1] == f"ok    cache: {tmp_path / 'rank0'} is each host's own: text and models are prepared once on each"
    )
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["one", "rank0", "rank1"], "nothing is left behind"


def test_a_folder_that_one_host_cannot_write_is_bad(two_ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "rank0").mkdir()
    lines = two_ranks.run(said, check_folders, Path("/sys/finemask"), World, str(tmp_path / "rank0"))[0]
    assert lines[0].startswith("bad   --run: /sys cannot be written on node1 (")
    assert "; type a --run on a file system that all hosts share" in lines[0]


def test_a_clock_that_jumps_is_noticed(two_ranks: RankPool, tmp_path: Path) -> None:
    (line,) = two_ranks.run(said, check_clocks, tmp_path)[0]
    assert line.startswith("ok    clocks: of all hosts within ")
    (line,) = two_ranks.run(said, check_clocks, tmp_path, World, "", 3.0)[0]
    assert line.startswith("note  clocks: the wall clock of node2 has jumped just now; ")
