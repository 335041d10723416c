"""What the facts of all ranks say when they are held against each other: each check a function of facts alone."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from finemask_ds.config.doctor import DoctorConfig
from finemask_ds.doctor.facts import Facts
from finemask_ds.doctor.finding import Finding
from finemask_ds.engine.world import World
from finemask_ds.errors import abbreviated

GIB = 2**30
LEAST_MEMORY_BYTES = 1 * GIB
"""Of each rank: less does not hold torch, DeepSpeed and BERT-base's scores."""
DISKS: Mapping[str, tuple[float, float, str]] = {
    "--run": (3.7 * GIB, 10 * GIB, "three checkpoints of bert-base take 3.7 GiB; free space or type another --run"),
    "FINEMASK_CACHE": (0.5 * GIB, 2 * GIB, "token blocks go there; free space or set FINEMASK_CACHE to another folder"),
    "temporary files": (0.1 * GIB, 1 * GIB, "free space there or set TMPDIR to another folder"),
    "shared memory": (0.05 * GIB, 0.25 * GIB, "give the container more, as docker run --shm-size 8g"),
}
"""What for -> free bytes below which a run fails (a third checkpoint is written before the first one goes), below which
it may later, and what to do."""


@dataclass(frozen=True)
class Cluster:
    """What a check may look at."""

    config: DoctorConfig
    world: World
    ranks: Sequence[Facts]
    """Of all ranks, in order."""

    @property
    def hosts(self) -> dict[str, list[Facts]]:
        """Host -> its ranks, in order."""
        found: dict[str, list[Facts]] = {}
        for facts in self.ranks:
            found.setdefault(facts.host, []).append(facts)
        return found


Check = Callable[[Cluster], Iterable[Finding]]
"""Collective ones talk to the other ranks; their findings count on the first rank."""


def check_ranks(cluster: Cluster) -> Iterator[Finding]:
    """As many ranks as asked for, and on which hosts."""
    asked, started = cluster.config.ranks, len(cluster.ranks)
    hosts = cluster.hosts
    where = ", ".join(f"{host} ({len(ranks)})" for host, ranks in hosts.items())
    found = f"{started} rank(s) on {len(hosts)} host(s): {where}"
    if asked and asked != started:
        todo = f"--ranks asks for {asked}: look at the launcher's --hostfile, --num_nodes and --num_gpus"
        yield Finding("bad", "ranks", found, todo)
    elif len({len(ranks) for ranks in hosts.values()}) > 1:
        yield Finding("note", "ranks", found, "the hosts differ in number of ranks; check slots= in the hostfile")
    else:
        yield Finding("ok", "ranks", found)


def check_versions(cluster: Cluster) -> Iterator[Finding]:
    """The same interpreter, packages and code on all hosts."""
    yield from compare_versions({host: ranks[0].versions for host, ranks in cluster.hosts.items()})


def compare_versions(hosts: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    """Compare what the hosts have installed with what the first has.

    Args:
        hosts: host -> name -> version.
    """
    first, *others = hosts
    differing = False
    for name in dict.fromkeys(name for versions in hosts.values() for name in versions):
        expected = hosts[first].get(name, "missing")
        others_have: dict[str, list[str]] = {}
        for host in others:
            others_have.setdefault(hosts[host].get(name, "missing"), []).append(host)
        others_have.pop(expected, None)
        for version, where in others_have.items():
            differing = True
            found = f"{name} is {version} on {abbreviated(where)}, {expected} on {first}"
            same = "check out the same commit" if name == "commit" else f"install {name} {expected}"
            yield Finding("bad", "versions", found, f"{same} there")
    told = ", ".join(f"{name} {version}" for name, version in hosts[first].items())
    missing = [name for name, version in hosts[first].items() if version == "missing"]
    if missing:
        yield Finding("bad", "versions", told, f"install {' '.join(missing)}")
    elif not differing:
        yield Finding("ok", "versions", told)


def check_devices(cluster: Cluster) -> Iterator[Finding]:
    """An accelerator for each rank, free, of one kind; and what it is fast in."""
    for host, ranks in cluster.hosts.items():
        number = len(devices := {rank.device_id for rank in ranks if rank.device_id})
        if devices and number < len(ranks):
            found = f"{host} has {number} device(s) for {len(ranks)} ranks"
            yield Finding("bad", "devices", found, f"write slots={number} for it in the hostfile")
        busy = [rank for rank in ranks if rank.device_id and rank.free_bytes < 0.9 * rank.total_bytes]
        if busy:
            shown = f"{_gib(busy[0].free_bytes)} of {_gib(busy[0].total_bytes)} free for rank {busy[0].rank}"
            yield Finding("note", "devices", f"{shown} on {host}", "look for its other users with nvidia-smi")
    kinds = Counter(facts.device for facts in cluster.ranks)
    if len(kinds) > 1:
        yield Finding("note", "devices", " and ".join(kinds), "the slowest rank sets the pace of all")
    told = ", ".join(f"{count} x {device}" for device, count in kinds.items())
    least = min(facts.free_bytes for facts in cluster.ranks)
    fast = set.intersection(*(set(facts.fast) for facts in cluster.ranks))
    arithmetic = f"fast in {' and '.join(sorted(fast))}" if fast else "16-bit files will be computed in fp32"
    yield Finding("ok", "devices", f"{told}, at least {_gib(least)} free, {arithmetic}")
    computed = {facts.computes_in for facts in cluster.ranks} - {""}
    if len(computed) > 1:
        yield Finding("bad", "precision", " but ".join(sorted(computed)), "use hosts of one kind")
    elif computed:
        yield Finding("ok", "precision", computed.pop())


def check_memory(cluster: Cluster) -> Iterator[Finding]:
    """Memory of each host beside its ranks."""
    shares = {host: ranks[0].memory_bytes / len(ranks) for host, ranks in cluster.hosts.items()}
    for host, share in shares.items():
        if share < LEAST_MEMORY_BYTES:
            todo = "end other programs there or write fewer slots in the hostfile"
            yield Finding("bad", "memory", f"{_gib(share)} free for each rank on {host}", todo)
    if (least := min(shares.values())) >= LEAST_MEMORY_BYTES:
        yield Finding("ok", "memory", f"at least {_gib(least)} free for each rank")


def check_disks(cluster: Cluster) -> Iterator[Finding]:
    """Free space where a run writes."""
    fine = []
    for what, (least, better, todo) in DISKS.items():
        found = {host: ranks[0].disks[what] for host, ranks in cluster.hosts.items() if what in ranks[0].disks}
        short = {host: place for host, place in found.items() if place[1] < better}
        for host, (folder, free) in short.items():
            yield Finding("bad" if free < least else "note", "disk", f"{_gib(free)} free in {folder} on {host}", todo)
        if found and not short:
            folder, free = min(found.values(), key=lambda place: place[1])
            fine.append(f"{_gib(free)} in {folder}")
    if fine:
        yield Finding("ok", "disk", f"at least {', '.join(dict.fromkeys(fine))} free")


def check_inputs(cluster: Cluster) -> Iterator[Finding]:
    """Model, text and DeepSpeed file on every host."""
    for option in ("--model", "--data", "--deepspeed"):
        asked = getattr(cluster.config, option.removeprefix("--"))
        without = {facts.host: facts.failures[option] for facts in cluster.ranks if option in facts.failures}
        if without:
            yield Finding("bad", option, f"on {abbreviated(list(without))}: {next(iter(without.values()))}")
        elif asked:
            yield Finding("ok", option, f"{asked} is found on every host")


def check_addresses(cluster: Cluster) -> Iterator[Finding]:
    """Who can reach the sockets that the ranks listen on."""
    open_to_all = [facts for facts in cluster.ranks if {"0.0.0.0", "::"} & set(facts.listens)]
    listens = list(dict.fromkeys(address for facts in cluster.ranks for address in facts.listens))
    if open_to_all:
        where = abbreviated(list(dict.fromkeys(facts.host for facts in open_to_all)))
        todo = (
            "start with deepspeed or srun (torchrun's own store knows no better) and give the first host's address in "
            "the cluster, as in --master_addr 10.0.0.1, not a name that means 127.0.1.1 there"
        )
        yield Finding("note", "addresses", f"all networks of {where} can reach the ranks' store", todo)
    elif public := [address for address in listens if ipaddress.ip_address(address.partition("%")[0]).is_global]:
        todo = "give the launcher a --master_addr of the cluster's own network, or see that a firewall keeps others out"
        yield Finding("note", "addresses", f"the ranks listen on the public {abbreviated(public)}", todo)
    elif listens:
        yield Finding("ok", "addresses", f"the ranks listen on {abbreviated(listens)} only")


def _gib(number: float) -> str:
    return f"{number / GIB:.1f} GiB"


FACT_CHECKS: tuple[Check, ...] = (
    check_ranks, check_versions, check_devices, check_memory, check_disks, check_inputs, check_addresses,
)  # fmt: skip
