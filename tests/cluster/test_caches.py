"""Two ranks on each of two hosts: caches are made once per host, or once in all where shared; a run must be shared."""

from __future__ import annotations

import functools
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from finemask_ds.config import PretrainConfig, SearchConfig
from finemask_ds.data import once
from finemask_ds.data.corpus import load_blocks
from finemask_ds.engine.shared import check_shared, hosts_without
from finemask_ds.engine.world import World
from finemask_ds.models.load import load_pretrained
from finemask_ds.search.dense import builtin_model
from finemask_ds.session import search
from tests.cluster.hosts import Hosts
from tests.cluster.ranks import HostRankPool
from tests.search import jobs
from tests.toys import write_headless

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def four(hosts: Hosts) -> Iterator[HostRankPool]:
    pool = HostRankPool(hosts, per_host=2)
    yield pool
    pool.close()


@pytest.fixture
def private(hosts: Hosts, tmp_path: Path) -> Iterator[Path]:
    """A folder of one path and, on each host, of its own content."""
    folder = tmp_path / "private"
    folder.mkdir()
    for name in hosts.names:
        assert hosts.run(name, ["mount", "-t", "tmpfs", "none", str(folder)]).returncode == 0
    yield folder
    for name in hosts.names:
        hosts.run(name, ["umount", "-l", str(folder)])


def built(world: World, cache: Path, model: Path, text: Path) -> tuple[str, int]:
    """This rank's host, and how many folders this rank has built for a text."""
    with mock.patch.object(once, "_build", wraps=once._build) as build:
        load_blocks(str(text), load_pretrained(str(model)).tokenizer, 16, cache=cache)
    return socket.gethostname(), build.call_count


def test_blocks_are_built_once_on_each_host_or_once_in_all(
    four: HostRankPool, private: Path, tmp_path: Path, toy_bert: Path, toy_text: Path
) -> None:
    for cache, expected in ((private, [1, 1]), (tmp_path / "shared", [1])):
        told = four.run(built, cache, toy_bert, toy_text)
        assert sorted(count for _, count in told if count) == expected
        assert len({host for host, count in told if count}) == len(expected)
        assert [count for _, count in four.run(built, cache, toy_bert, toy_text)] == [0] * 4


def in_cache(world: World, cache: Path, action: Any, *arguments: Any) -> Any:
    """An action with a cache of its own, and less patience than a slow file system needs."""
    impatient = functools.partial(hosts_without, patience_sec=1.0)
    with (
        mock.patch.dict(os.environ, FINEMASK_CACHE=str(cache)),
        mock.patch("finemask_ds.search.dense.hosts_without", impatient),
    ):
        return action(world, *arguments)


def of_builtin(world: World, config: PretrainConfig, lose_on: str = "") -> tuple[str, bool]:
    """The digest of the built-in model on this rank, and whether its training left checkpoints."""
    folder = builtin_model(config, world)
    if lose_on == socket.gethostname():
        shutil.rmtree(folder, ignore_errors=True)
    world.barrier()
    folder = builtin_model(config, world)
    return load_pretrained(str(folder)).digest(), any(Path(f"{folder}.run").glob("checkpoints/step-*"))


def test_the_built_in_model_is_trained_once_and_handed_to_every_host(
    four: HostRankPool, private: Path, tmp_path: Path
) -> None:
    """And handed again to a host that has lost it; only in a shared cache does its training leave checkpoints."""
    config = PretrainConfig(steps=2, warmup_steps=1, batch_size=8, deepspeed=jobs.stage_file(2), save_every=1)
    apart = four.run(in_cache, private, of_builtin, config, "node2")
    together = four.run(in_cache, tmp_path / "shared", of_builtin, config)
    assert len(set(apart)) == len(set(together)) == 1
    assert apart[0] == (together[0][0], False)
    assert together[0][1]


def dev_of(world: World, config: SearchConfig) -> dict[str, float]:
    return search(config, world)["dev"]


def test_a_head_is_trained_once_and_known_on_every_host(
    four: HostRankPool, private: Path, tmp_path: Path, toy_bert: Path, toy_text: Path
) -> None:
    """A second search finds it in the first host's cache."""
    headless = write_headless(tmp_path / "headless", toy_bert)
    apart, again, together = (
        jobs.tamt(tmp_path / name, headless, toy_text, 2, steps=3, head_steps=3)
        for name in ("apart", "again", "together")
    )
    found = four.run(in_cache, private, dev_of, apart)
    assert found == four.run(in_cache, private, dev_of, again)
    assert found == four.run(in_cache, tmp_path / "shared", dev_of, together)


def refused(world: World, config: SearchConfig) -> str:
    impatient = functools.partial(check_shared, patience_sec=1.0)
    with mock.patch("finemask_ds.search.setting.check_shared", impatient):
        return jobs.failed(world, config)


def test_a_run_directory_that_a_host_does_not_see_is_refused(
    four: HostRankPool, private: Path, toy_bert: Path, toy_text: Path
) -> None:
    told = four.run(refused, jobs.tamt(private / "run", toy_bert, toy_text, 2))
    assert len(set(told)) == 1
    assert told[0].startswith(f"node2 does not see the run directory {private}/run of rank 0 on node1; type --run DIR")
