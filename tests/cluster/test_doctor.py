"""`finemask doctor` on real hosts: whole, cut off, and wrong in what only ranks can see."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from finemask_ds.doctor.finding import Finding
from tests.cluster.hosts import Hosts
from tests.pool import free_port

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")

pytestmark = pytest.mark.slow


def doctor(hosts: Hosts, *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "finemask_ds", "doctor", "--hostfile", str(hosts.hostfile), *map(str, options)]
    return hosts.run("head", command, timeout=120)


def findings(output: str) -> list[Finding]:
    return [finding for line in output.splitlines() if (finding := Finding.parse(line))]


def bad(output: str) -> list[str]:
    return [str(finding) for finding in findings(output) if finding.level == "bad"]


def test_a_healthy_cluster(hosts: Hosts, tmp_path: Path) -> None:
    """With a --run that a shell would obey, which reaches the ranks through the launcher as it is."""
    run = tmp_path / "a b; touch $(echo c) %h"
    run.mkdir()
    told = doctor(hosts, "--ranks", 2, "--run", run, "--data", "builtin")
    assert told.returncode == 0, told.stdout + told.stderr
    seen = {finding.what: finding for finding in findings(told.stdout)}
    assert "bad" not in {finding.level for finding in seen.values()}
    assert seen["ssh"].found == "node1, node2 answer(s) without a password"
    assert seen["ranks"].found == "2 rank(s) on 2 host(s): node1 (1), node2 (1)"
    assert seen["all-reduce"].found.startswith("right on all ranks")
    assert seen["--run"].found == f"{run} shared by 2 hosts"
    assert seen["addresses"].found == f"the ranks listen on {hosts.address(0)}, {hosts.address(1)} only"
    assert seen["clocks"].found.startswith("of all hosts within")
    assert list(run.iterdir()) == []


def test_a_host_that_is_cut_off_is_named_before_anything_starts(hosts: Hosts) -> None:
    hosts.cut("node2")
    told = doctor(hosts, "--ranks", 3)
    assert told.returncode == 1
    slots, silent = bad(told.stdout)
    assert slots.endswith("has 2 host(s) with 2 slot(s); --ranks asks for 3: change slots= or --ranks")
    assert silent.startswith("bad   ssh: node2 ")
    assert "all-reduce" not in told.stdout


@pytest.mark.skipif(not FAKETIME.exists(), reason="needs the package libfaketime")
def test_what_only_ranks_can_see(hosts: Hosts, tmp_path: Path) -> None:
    """A run folder of node2's own, its clock an hour ahead, a rank less than asked for; started without a launcher."""
    run = tmp_path / "run"
    run.mkdir()
    assert hosts.run("node2", ["mount", "-t", "tmpfs", "none", str(run)]).returncode == 0
    command = [sys.executable, "launcher/doctor.py", "--ranks", "3", "--run", str(run), "--time_out_sec", "60"]
    launched = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": hosts.address(0), "MASTER_PORT": str(free_port())}
    ahead = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": "+1h"}
    try:
        other = hosts.start("node2", command, tmp_path / "log", env={**launched, **ahead, "RANK": "1"})
        told = hosts.run("node1", command, timeout=90, env={**launched, "RANK": "0"})
        assert other.wait(30) == 1, "every rank exits alike"
    finally:
        hosts.run("node2", ["umount", str(run)])
    assert told.returncode == 1, told.stdout + told.stderr
    ranks, folder, clock = bad(told.stdout)
    assert "--ranks asks for 3" in ranks
    assert folder.startswith(f"bad   --run: node2 and node1 have each a {run} of its own; ")
    assert clock.startswith(("bad   clocks: node2 is 3600 s ahead of node1", "bad   clocks: node2 is 3599 s ahead"))
    assert findings((tmp_path / "log").read_text()) == [], "the first rank speaks for all"
