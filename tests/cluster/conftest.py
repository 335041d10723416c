"""Fixtures of the cluster tests: real hosts and a real Slurm on them, or the reason why there are none."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.networks import lacking
from tests.cluster.ranks import HostRankPool
from tests.cluster.ray_cluster import RayCluster
from tests.cluster.slurm import Slurm


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two hosts and a head."""
    if why := lacking("ip", "nsenter", "sshd", "ssh", "pdsh"):
        pytest.skip(why)
    hosts = Hosts.up(2, tmp_path_factory.mktemp("hosts"))
    yield hosts
    hosts.down()


@pytest.fixture(scope="session")
def slurm(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Slurm over the two hosts."""
    if why := lacking("munged", "slurmctld", "slurmd", "srun"):
        pytest.skip(why)
    slurm = Slurm.up(hosts, tmp_path_factory.mktemp("slurm"))
    yield slurm
    slurm.down()


@pytest.fixture(scope="session")
def host_ranks(hosts: Hosts) -> Iterator[HostRankPool]:
    """A rank on each of the two hosts."""
    pool = HostRankPool(hosts)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def ray_cluster(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Ray over the two hosts."""
    if find_spec("ray") is None:
        pytest.skip('Ray is missing (type: pip install -c constraints.txt -e ".[ray]")')
    cluster = RayCluster.up(hosts, tmp_path_factory.mktemp("r"))
    yield cluster
    cluster.down()


@pytest.fixture(autouse=True)
def _mended(request: pytest.FixtureRequest) -> None:
    """A test finds the hosts whole, whatever the one before did to them."""
    for name in ("hosts", "slurm", "ray_cluster"):
        if name in request.fixturenames:
            request.getfixturevalue(name).mend()
