"""What only shows when the ranks do something together: sum, write to a folder that others read, compare clocks."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from finemask_ds.doctor.checks import Check, Cluster
from finemask_ds.doctor.finding import Finding
from finemask_ds.engine.shared import hosts_without
from finemask_ds.engine.world import World
from finemask_ds.errors import abbreviated
from finemask_ds.run import cache_dir, existing

REPEATS = 5
LATENCY_REPEATS = 20
LARGEST_BYTES = 256 * 2**20
"""Of a measured all-reduce; less where this would take longer than `ONE_SEC`."""
ONE_SEC = 0.5
BERT_BASE_BYTES = 4 * 108_375_552
"""Gradients of the scores of every matrix that TAMT prunes in BERT-base, fp32: what each step reduces."""
FAR_BELOW = 0.2
"""Of the link's speed: less is worth a look."""
SEEN_SEC = 5.0
"""A file must be seen by the other hosts within this time; network file systems look again after some seconds."""
CLOCK_NOTE_SEC, CLOCK_BAD_SEC = 1.0, 300.0
"""Log lines of the hosts no longer line up; munge, and so Slurm, no longer takes the other's credentials."""
JUMP_SEC = 0.5


def check_all_reduce(cluster: Cluster) -> Iterator[Finding]:
    """The sum over all ranks is right on each of them, and how long it takes."""
    world = cluster.world
    if world.size == 1:
        return
    wrong = [rank for rank, is_right in enumerate(world.gather(_sums_rightly(world))) if not is_right]
    if wrong:
        where = ", ".join(f"rank {rank} on {cluster.ranks[rank].host}" for rank in wrong)
        yield Finding(
            "bad", "all-reduce", f"a wrong sum on {where}", "look at the memory and network card of that host"
        )
        return
    latency = _seconds(world, 1, LATENCY_REPEATS)
    probe = 2**20
    rate = probe / max(_seconds(world, probe // 4, 3), 1e-9)
    size = int(min(LARGEST_BYTES, max(probe, rate * ONE_SEC)))
    rate = size / _seconds(world, size // 4, REPEATS)
    wire = rate * 2 * (world.size - 1) / world.size
    found = (
        f"right on all ranks, latency {1e3 * latency:.2f} ms, {rate / 1e9:.2f} GB/s of {size / 2**20:.0f} MiB "
        f"({wire / 1e9:.2f} GB/s on each wire): {BERT_BASE_BYTES / rate:.2g} s for the gradients of bert-base"
    )
    link = min((facts.link_bits for facts in cluster.ranks), default=0) / 8
    if len(cluster.hosts) > 1 and link and wire < FAR_BELOW * link:
        todo = (
            f"the link of {cluster.ranks[0].interface} has {link / 1e9:.2f} GB/s: look for other traffic, or name "
            "another interface with GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
        )
        yield Finding("note", "all-reduce", found, todo)
    else:
        yield Finding("ok", "all-reduce", found)


def _sums_rightly(world: World) -> bool:
    """Small whole numbers, whose sums are exact in fp32 whatever the order."""
    pattern = torch.arange(100_003, device=world.device).remainder(97).float()
    total = world.sum(pattern * (world.rank + 1))
    return torch.equal(total, pattern * (world.size * (world.size + 1) // 2))


def _seconds(world: World, count: int, repeats: int) -> float:
    """The median of the slowest rank's times of an all-reduce of ``count`` numbers; the same on all ranks."""
    tensor = torch.zeros(count, device=world.device)
    taken = []
    for _ in range(repeats):
        world.barrier()
        start = time.monotonic()
        world.sum(tensor)
        float(tensor[0])  # Waits for the device.
        taken.append(time.monotonic() - start)
    return max(world.gather(statistics.median(taken)))


def check_folders(cluster: Cluster) -> Iterator[Finding]:
    """Whether what one host writes is seen by the others: a run needs that, a cache does not."""
    several = f"shared by {len(cluster.hosts)} hosts" if len(cluster.hosts) > 1 else "can be written"
    folder = cluster.world.on_first(lambda: existing(Path(cluster.config.run)))
    unable, blind = _sharing(cluster, folder)
    elsewhere = "type a --run on a file system that all hosts share and may write, as NFS"
    if unable:
        yield Finding("bad", "--run", f"{folder} cannot be written on {abbreviated(unable)}", elsewhere)
    elif blind:
        first = cluster.ranks[0].host
        yield Finding("bad", "--run", f"{abbreviated(blind)} and {first} have each a {folder} of its own", elsewhere)
    else:
        yield Finding("ok", "--run", f"{folder} {several}")

    cache = existing(cache_dir())
    unable, blind = _sharing(cluster, cache)
    if unable:
        todo = "set FINEMASK_CACHE to another folder, for pdsh in .deepspeed_env"
        yield Finding("bad", "cache", f"cannot be written on {abbreviated(unable)}", todo)
    elif blind:
        yield Finding("ok", "cache", f"{cache} is each host's own: text and models are prepared once on each")
    else:
        yield Finding("ok", "cache", f"{cache} {several}: text and models are prepared once")


def _sharing(cluster: Cluster, folder: Path) -> tuple[list[str], list[str]]:
    """The hosts that cannot write a folder, each with its reason, and those that do not see the first host's files."""
    told = zip(cluster.ranks, cluster.world.gather(_refusal(folder)), strict=True)
    unable = list(dict.fromkeys(f"{facts.host} ({reason})" for facts, reason in told if reason))
    return unable, [] if unable else hosts_without(cluster.world, folder, SEEN_SEC)


def _refusal(folder: Path) -> str:
    """Why no file can be made in a folder; empty where one can."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def check_clocks(cluster: Cluster) -> Iterator[Finding]:
    """How far the hosts' wall clocks are from the first one's, and whether one has jumped meanwhile.

    Nothing of ours is decided by a wall clock. Between hosts, munge's credentials are, and thereby Slurm's; log lines
    and TensorBoard's curves of several hosts are put in order by it.
    """
    world = cluster.world
    here = next(facts for facts in cluster.ranks if facts.rank == world.rank)
    jump = time.time() - time.monotonic() - here.wall_minus_monotonic_sec
    offsets, bounds = [], []
    for _ in range(REPEATS):
        world.barrier()
        start = time.monotonic()
        walls = world.gather(time.time())  # All are read while this call takes.
        bounds.append(time.monotonic() - start)
        offsets.append([wall - walls[0] for wall in walls])
    middle = [statistics.median(column) for column in zip(*offsets, strict=True)]
    jumped = [facts.host for facts, sec in zip(cluster.ranks, world.gather(jump), strict=True) if abs(sec) > JUMP_SEC]
    if jumped:
        found = f"the wall clock of {abbreviated(list(dict.fromkeys(jumped)))} has jumped just now"
        yield Finding("note", "clocks", found, "see that only one program sets it, chrony or ntpd")
    far = {facts.host: sec for facts, sec in zip(cluster.ranks, middle, strict=True) if abs(sec) > CLOCK_NOTE_SEC}
    for host, sec in far.items():
        found = f"{host} is {abs(sec):.0f} s {'ahead of' if sec > 0 else 'behind'} {cluster.ranks[0].host}"
        todo = f"set it with chrony or ntpd: munge and so Slurm refuse what is {CLOCK_BAD_SEC:.0f} s old"
        yield Finding("bad" if abs(sec) > CLOCK_BAD_SEC else "note", "clocks", found, todo)
    if not far and not jumped and len(cluster.hosts) > 1:
        within = max(map(abs, middle)) + statistics.median(bounds)
        yield Finding("ok", "clocks", f"of all hosts within {1e3 * within:.0f} ms")


RANK_CHECKS: tuple[Check, ...] = (check_all_reduce, check_folders, check_clocks)
