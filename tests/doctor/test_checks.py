"""Findings from plain facts: what differs names the host, what is scarce names the place, and each says what to do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finemask_ds.config import DoctorConfig
from finemask_ds.doctor.checks import DISKS, FACT_CHECKS, GIB, Cluster, compare_versions
from finemask_ds.doctor.facts import Facts
from finemask_ds.doctor.finding import Finding, Report
from finemask_ds.engine.world import World

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "commit": "0123456789ab"}
ROOM = {what: (f"/{what}", 100 * GIB) for what in DISKS}
GPU = Facts(
    rank=0, host="node1", versions=VERSIONS, device="NVIDIA H200", device_id="a", free_bytes=139 * GIB,
    total_bytes=140 * GIB, fast=("fp16", "bf16"), disks=ROOM, memory_bytes=100 * GIB, listens=("10.0.0.1",),
)  # fmt: skip


def cluster(*ranks: Facts, **options: object) -> Cluster:
    """Two ranks on each of two hosts, or the ranks given."""
    known = ranks or tuple(
        replace(GPU, rank=rank, host=f"node{rank // 2 + 1}", device_id=str(rank)) for rank in range(4)
    )
    return Cluster(DoctorConfig(**options), World(), known)


def findings(seen: Cluster) -> list[Finding]:
    return [finding for check in FACT_CHECKS for finding in check(seen)]


def bad(seen: Cluster) -> list[str]:
    return [str(finding) for finding in findings(seen) if finding.level == "bad"]


def with_last(seen: Cluster, **changes: object) -> Cluster:
    """The cluster with other facts of its second host."""
    ranks = [replace(facts, **changes) if facts.host == "node2" else facts for facts in seen.ranks]
    return replace(seen, ranks=ranks)


def test_a_healthy_cluster_is_all_ok():
    seen = findings(cluster(ranks=4, model="builtin"))
    assert {finding.level for finding in seen} == {"ok"}
    assert str(seen[0]) == "ok    ranks: 4 rank(s) on 2 host(s): node1 (2), node2 (2)"
    assert "fast in bf16 and fp16" in str(next(f for f in seen if f.what == "devices"))


BAD = {
    "another torch": ({"versions": {**VERSIONS, "torch": "2.9.0"}}, "torch is 2.9.0 on node2, 2.13.0 on node1"),
    "no torch": ({"versions": {"python": "3.11.7", "commit": "0123456789ab"}}, "torch is missing on node2"),
    "another commit": ({"versions": {**VERSIONS, "commit": "fedcba987654"}}, "check out the same commit there"),
    "fewer devices": ({"device_id": "2"}, "node2 has 1 device(s) for 2 ranks; write slots=1"),
    "no memory": ({"memory_bytes": GIB}, "0.5 GiB free for each rank on node2"),
    "a full disk": ({"disks": {**ROOM, "--run": ("/big", GIB)}}, "1.0 GiB free in /big on node2; three checkpoints"),
    "no model": ({"failures": {"--model": "model 'x' could not be loaded"}}, "--model: on node2: model 'x' could not"),
    "another precision": ({"computes_in": "compute in fp32"}, "compute in bf16 but compute in fp32"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_on_one_host_is_one_line_that_names_it(case: str) -> None:
    changes, expected = BAD[case]
    seen = cluster()
    seen = replace(seen, ranks=[replace(facts, computes_in="compute in bf16") for facts in seen.ranks])
    (line,) = bad(with_last(seen, **changes))
    assert expected in line


NOTES = {
    "somebody else's programs": ({"free_bytes": 30 * GIB}, "30.0 GiB of 140.0 GiB free for rank 2", "nvidia-smi"),
    "another device": ({"device": "NVIDIA A100"}, "NVIDIA H200 and NVIDIA A100", "the slowest rank"),
    "little shared memory": ({"disks": {**ROOM, "shared memory": ("/shm", GIB // 16)}}, "in /shm", "--shm-size"),
    "a public address": ({"listens": ("8.8.8.8",)}, "listen on the public 8.8.8.8", "--master_addr"),
    "open to all": ({"listens": ("0.0.0.0",)}, "all networks of node2 can reach", "--master_addr"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTES)
def test_what_is_only_slower_or_risky_is_a_note(case: str) -> None:
    changes, found, todo = NOTES[case]
    seen = with_last(cluster(), **changes)
    assert bad(seen) == []
    (line,) = [str(finding) for finding in findings(seen) if finding.level == "note"]
    assert found in line
    assert todo in line


def test_ranks_are_compared_with_those_asked_for():
    (line,) = bad(cluster(ranks=8))
    assert line.startswith("bad   ranks: 4 rank(s) on 2 host(s): node1 (2), node2 (2); --ranks asks for 8")
    uneven = [replace(GPU, rank=0), replace(GPU, rank=1, device_id="b"), replace(GPU, rank=2, host="node2")]
    assert [finding.level for finding in findings(cluster(*uneven))].count("note") == 1


def test_versions_of_many_hosts_are_one_line_for_each_difference():
    hosts = {f"node{number}": dict(VERSIONS) for number in range(9)}
    for number in range(2, 9):
        hosts[f"node{number}"]["torch"] = "2.9.0"
    hosts["node1"]["python"] = "3.12.1"
    lines = [str(finding) for finding in compare_versions(hosts)]
    assert lines == [
        "bad   versions: python is 3.12.1 on node1, 3.11.7 on node0; install python 3.11.7 there",
        "bad   versions: torch is 2.9.0 on node2, node3, node4 and 4 more, 2.13.0 on node0; install torch 2.13.0 there",
    ]


def test_what_is_missing_everywhere_is_no_agreement():
    (finding,) = compare_versions({"node1": {"deepspeed": "missing"}})
    assert (finding.level, finding.todo) == ("bad", "install deepspeed")


def test_a_line_is_read_back_and_obeyed_by_no_terminal():
    finding = Finding("note", "disk", "2 GiB in /a: b\x1b[2J", "free space")
    assert "\x1b" not in str(finding)
    assert str(Finding.parse(f"node1: {finding}\n")) == str(finding)
    assert Finding.parse("node1: [INFO] ok so far: yes") is None


def test_the_exit_code_tells_whether_anything_is_bad(capsys):
    report = Report()
    report.add([Finding("ok", "a", "b"), Finding("note", "a", "b")])
    assert (report.exit_code, str(report)) == (0, "1 ok, 1 to note, 0 bad")
    report.add([Finding("bad", "a", "b", "c")])
    assert (report.exit_code, str(report)) == (1, "1 ok, 1 to note, 1 bad")
    assert capsys.readouterr().out.splitlines() == ["ok    a: b", "note  a: b", "bad   a: b; c"]
