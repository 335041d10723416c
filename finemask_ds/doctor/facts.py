"""What one rank knows about its host by looking around: plain values that the ranks send one another."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from finemask_ds.config.doctor import DoctorConfig
from finemask_ds.doctor.versions import installed
from finemask_ds.engine.precision import BLOCKS, is_fast, resolve_precision
from finemask_ds.engine.settings import check_settings, read_settings
from finemask_ds.engine.world import World
from finemask_ds.errors import UserError
from finemask_ds.run import cache_dir, existing

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Facts:
    """Of one rank and its host."""

    rank: int
    host: str
    versions: dict[str, str]
    device: str
    """The accelerator's name; ``cpu`` without one."""
    device_id: str
    """Which accelerator it is, among all; empty without one."""
    free_bytes: int
    """Of the device's memory, on a CPU of the host's."""
    total_bytes: int
    fast: tuple[str, ...]
    """Of fp16 and bf16, what the device has matrix units for."""
    computes_in: str = ""
    """What becomes of the DeepSpeed file's precision; empty where none was given."""
    disks: dict[str, tuple[str, int]] = field(default_factory=dict)
    """What for -> folder and its free bytes."""
    memory_bytes: int = 0
    """Of the host's, still to be had."""
    failures: dict[str, str] = field(default_factory=dict)
    """Option -> why what it names cannot be had on this host."""
    listens: tuple[str, ...] = ()
    """Addresses that this process listens on."""
    interface: str = ""
    """Network interface towards the first rank."""
    link_bits: int = 0
    """Its bits per second; 0 where it does not tell."""
    wall_minus_monotonic_sec: float = 0.0
    """Of this host's clocks when the facts were taken."""


def look_around(config: DoctorConfig, world: World) -> Facts:
    """This rank's facts; nothing here waits for another rank."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    failures, computes_in = _look_for(config, world)
    free, total = _memory(world.device)
    return Facts(
        rank=world.rank,
        host=socket.gethostname(),
        versions=installed(),
        device="cpu" if world.device.type == "cpu" else torch.cuda.get_device_name(world.device),
        device_id="" if world.device.type == "cpu" else str(torch.cuda.get_device_properties(world.device).uuid),
        free_bytes=free,
        total_bytes=total,
        fast=tuple(name for name, dtype in BLOCKS.items() if is_fast(dtype, world.device)),
        computes_in=computes_in,
        disks=_disks(config),
        memory_bytes=available_bytes(),
        failures=failures,
        listens=listening(),
        interface=interface,
        link_bits=link_bits(interface),
        wall_minus_monotonic_sec=time.time() - time.monotonic(),
    )


def _memory(device: torch.device) -> tuple[int, int]:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    return available_bytes(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int:
    """Memory of this host that this process can still have, within what its container or job was given."""
    import psutil

    left = [psutil.virtual_memory().available]
    with contextlib.suppress(OSError, ValueError):  # As without a limit, which is "max".
        group = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
        folder = Path("/sys/fs/cgroup", group)
        left.append(int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text()))
    return max(0, min(left))


def _disks(config: DoctorConfig) -> dict[str, tuple[str, int]]:
    folders = {"--run": Path(config.run), "FINEMASK_CACHE": cache_dir(), "temporary files": Path(tempfile.gettempdir())}
    found = {what: existing(folder) for what, folder in folders.items()}
    if SHARED_MEMORY.is_dir():
        found["shared memory"] = SHARED_MEMORY
    return {what: (str(folder), shutil.disk_usage(folder).free) for what, folder in found.items()}


def _look_for(config: DoctorConfig, world: World) -> tuple[dict[str, str], str]:
    """Why what is asked for cannot be had here, by option; and what the DeepSpeed file will compute in."""
    computes_in = ""

    def read_deepspeed_file() -> None:
        nonlocal computes_in
        settings = read_settings(config.deepspeed)
        check_settings(settings, config.deepspeed)
        computes_in = resolve_precision(settings, world.device, config.deepspeed)[1].told

    checks: dict[str, Callable[[], None]] = {}
    if config.deepspeed:
        checks["--deepspeed"] = read_deepspeed_file
    if os.environ.get("LOCAL_RANK", "0") == "0":  # Once on each host.
        checks |= {
            f"--{option}": functools.partial(find, value)
            for option, value, find in (("model", config.model, _find_model), ("data", config.data, _find_text))
            if value not in ("", "builtin")
        }
    failures = {}
    for option, check in checks.items():
        try:
            check()
        except UserError as error:
            failures[option] = str(error)
    return failures, computes_in


def _find_model(name: str) -> None:
    from finemask_ds.models.load import find_model

    find_model(name)


def _find_text(name: str) -> None:
    from finemask_ds.data.sources import find_text

    find_text(name)


def listening() -> tuple[str, ...]:
    """Addresses on which this rank waits for connections; ``::`` and ``0.0.0.0`` are all of the machine's.

    With torchrun, which keeps the ranks' store itself, those of its process too.
    """
    import psutil

    me = psutil.Process()
    found: set[str] = set()
    for process in (me, me.parent()) if "TORCHELASTIC_USE_AGENT_STORE" in os.environ else (me,):
        with contextlib.suppress(psutil.Error, OSError, AttributeError):
            connections = process.net_connections(kind="tcp")
            found |= {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN}
    return tuple(sorted(found))


def link_bits(interface: str) -> int:
    """What a network interface of this host can carry, in bits per second; 0 where it does not tell."""
    import psutil

    state = psutil.net_if_stats().get(interface)
    return state.speed * 10**6 if state else 0
