"""The hosts that the cluster tests stand on: faults are real, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, pid_namespace
from tests.cluster.networks import PACKAGES, bridge, ip, lacking, wait_until
from tests.cluster.slurm import Slurm
from tests.conftest import REPOSITORY


def hostname(hosts: Hosts, of: str) -> str:
    """What ``of`` calls itself when node1 asks over ssh, or what ssh complains of."""
    told = hosts.run("node1", ["ssh", of, "hostname"])
    return (told.stdout or told.stderr).strip()


@pytest.mark.slow
def test_hosts_reach_each_other_by_name(hosts: Hosts) -> None:
    assert [hostname(hosts, of) for of in (*hosts.names, "head")] == ["node1", "node2", "head"]
    told = hosts.run("head", ["pdsh", "-w", ",".join(hosts.names), "hostname"])
    assert sorted(told.stdout.splitlines()) == ["node1: node1", "node2: node2"]


def test_power_off_ends_every_process_of_one_host_only(hosts: Hosts, tmp_path: Path) -> None:
    there, here = (hosts.start(name, ["sleep", "1000"], tmp_path / name) for name in ("node2", "node1"))
    wait_until(lambda: len(hosts.pids("node2")) > 1, 10, "sleep runs")
    pids = hosts.pids("node2")
    hosts.power_off("node2")
    assert not any(map(pid_namespace, pids))
    assert there.wait(10) != 0
    assert here.poll() is None
    assert "Connection refused" in hostname(hosts, "node2")
    hosts.power_on("node2")
    assert hostname(hosts, "node2") == "node2"
    os.killpg(here.pid, signal.SIGKILL)
    here.wait(10)


@pytest.mark.slow
def test_a_cut_cable_stops_the_traffic_and_no_process(hosts: Hosts, tmp_path: Path) -> None:
    process = hosts.start("node2", ["sleep", "1000"], tmp_path / "log")
    before = hosts.traffic_bytes("node2")
    assert hostname(hosts, "node2") == "node2"
    hosts.cut("node2")
    assert (between := hosts.traffic_bytes("node2")) > before
    assert "timed out" in hostname(hosts, "node2")
    assert hosts.traffic_bytes("node2") == between
    assert process.poll() is None
    hosts.heal("node2")
    assert hostname(hosts, "node2") == "node2"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


@pytest.mark.slow
def test_hosts_of_a_killed_process_are_removed_by_the_next(hosts: Hosts, tmp_path: Path) -> None:
    """And those of a living one are not, beside which they stand."""
    script = (
        "import os, sys, pathlib; from tests.cluster.hosts import Hosts\n"
        "hosts = Hosts.up(1, pathlib.Path(sys.argv[1])); print(hosts.number, *hosts.pids('node1'), flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "killed")]
    told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    number, *pids = (int(word) for word in told.stdout.split())
    assert pids
    assert all(map(pid_namespace, pids))
    other = Hosts.up(1, tmp_path / "next")
    try:
        assert not any(map(pid_namespace, pids))
        assert other.number != hosts.number
        assert hostname(other, "node1") == hostname(hosts, "node1") == "node1"
    finally:
        other.down()
    for gone in {number, other.number}:
        assert f"fm{gone}-" not in ip("netns", "list")
        assert not Path("/sys/class/net", bridge(gone)).exists()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.cluster.networks.SUPER_PATH", "/nowhere")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "iproute2 pdsh are missing (type: make cluster-packages)" in lacking("ip", "pdsh")
    installed = (REPOSITORY / "tests" / "cluster" / "packages.sh").read_text()
    assert all(package in installed for package in PACKAGES.values())
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "need root" in lacking("ip")


def test_slurm_runs_on_both_hosts_and_takes_back_one_that_was_off(slurm: Slurm) -> None:
    told = slurm.run(["srun", "-N", "2", "--gres=gpu:1", "sh", "-c", "echo $(hostname) $CUDA_VISIBLE_DEVICES"])
    assert sorted(told.stdout.splitlines()) == ["node1 0", "node2 0"], told.stderr
    slurm.hosts.power_off("node2")
    slurm.hosts.mend()
    slurm.mend()
    told = slurm.run(["srun", "-w", "node2", "hostname"])
    assert told.stdout == "node2\n", told.stderr
