"""How a process learns its rank where Slurm or MPI has started it, and by which interface it reaches the others."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Mapping, MutableMapping

from finemask_ds.errors import UserError

FIRST_PORT, NUM_PORTS = 20000, 10000
"""Of the rendezvous of Slurm steps; below the ports that Linux gives away by itself (32768 and up)."""
MPI_PORT = "29500"
"""Of the rendezvous under MPI, which names no job: DeepSpeed's and torch's own default."""
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
"""What Open MPI, and what MPICH and Intel MPI tell each process: its rank, how many, and the same on its host."""
_NO_STEP = 0xFFFFFFF0
"""Slurm numbers what is no step of ``srun`` (batch script, interactive shell, ...) from here."""
_NOWHERE = "192.0.2.1"
"""No host has this address (RFC 5737); the way towards it is the default route. Nothing is sent."""


def join_launch(environ: MutableMapping[str, str]) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for one of several tasks of srun or mpirun.

    Where a launcher has set RANK, or the process is alone, nothing changes; and of the others only what is not set.
    The rendezvous of a Slurm step is on the first host of its list, at a port that follows from job and step; that of
    MPI on this host, if all ranks are here.

    Raises:
        UserError: under MPI on several hosts without MASTER_ADDR.
    """
    if "RANK" in environ:
        return
    told = _told_by_slurm(environ) or _told_by_mpi(environ)
    for name, value in told.items():
        environ.setdefault(name, value)
    if told and "MASTER_ADDR" not in environ:
        raise UserError(
            f"mpirun has started {told['WORLD_SIZE']} ranks on several hosts and none knows where rank 0 is; type "
            "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 ..., or -genv MASTER_ADDR HOST with MPICH"
        )


def _told_by_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    """Of a task of ``srun``: a batch script has a SLURM_PROCID and a SLURM_NTASKS too, but no step of its own.

    One that was submitted from within a step has that step's variables, beside its own SLURM_TASKS_PER_NODE.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    job, step, rank, size = (_number(environ, name) for name in names)
    if job is None or step is None or step >= _NO_STEP or rank is None or size is None or not 1 < size > rank:
        return {}
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE")
    if environ.get("SLURM_TASKS_PER_NODE", tasks) != tasks:
        return {}
    return {
        **_ranks(environ, rank, size, _number(environ, "SLURM_LOCALID") or 0),
        "MASTER_ADDR": first_host(environ.get("SLURM_STEP_NODELIST", "")) or "127.0.0.1",
        # Jobs and steps that live at the same time have numbers close together, which this keeps apart.
        "MASTER_PORT": str(FIRST_PORT + (97 * job + step) % NUM_PORTS),
    }


def _told_by_mpi(environ: Mapping[str, str]) -> dict[str, str]:
    for names in _MPI:
        rank, size, local_rank, local_size = (_number(environ, name) for name in names)
        if rank is None or size is None or size < 2:
            continue
        here = {"MASTER_ADDR": "127.0.0.1"} if local_size == size else {}
        return {**_ranks(environ, rank, size, local_rank or 0), **here, "MASTER_PORT": MPI_PORT}
    return {}


def _ranks(environ: Mapping[str, str], rank: int, size: int, local_rank: int) -> dict[str, str]:
    """A task that sees fewer devices than its host has tasks was given its own: its number counts among these."""
    visible = [device for device in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    local_rank = local_rank % len(visible) if visible else local_rank
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank)}


def first_host(nodes: str) -> str:
    """The first host of Slurm's list: ``gpu[003-017,20],login`` -> ``gpu003``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group() if first else "")


def _number(environ: Mapping[str, str], name: str) -> int | None:
    value = environ.get(name, "")
    return int(value) if value.isdecimal() else None


def choose_interface(environ: MutableMapping[str, str]) -> None:
    """Set GLOO_SOCKET_IFNAME, unless it is set, to the interface by which this host reaches the ranks' first one.

    Without it gloo tells the others the address of this host's name, which on Debian is 127.0.1.1 and on hosts with
    several networks may be one that they cannot reach. Ranks of one host that meet at 127.0.0.1 stay on the loopback.
    """
    master = environ.get("MASTER_ADDR", "")
    if "GLOO_SOCKET_IFNAME" in environ or not master or environ.get("WORLD_SIZE", "1") == "1":
        return
    if _is_loopback(master):
        address = _own_address_towards(master)
    else:
        # On the first host itself its name may be a loopback address; there the way back to who started us tells.
        starters = environ.get("SSH_CONNECTION", "").partition(" ")[0], environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
        ways = [_own_address_towards(there) for there in (master, *starters, _NOWHERE) if there]
        address = next((way for way in ways if way and not _is_loopback(way)), "")
    if name := _interface_of(address):
        environ["GLOO_SOCKET_IFNAME"] = name


def _own_address_towards(host: str) -> str:
    """This host's address on the way to another; "" where there is no way."""
    try:
        (family, kind, protocol, _, there), *_ = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
        with socket.socket(family, kind, protocol) as link:
            link.connect(there)  # Of a datagram socket: only looks up the route.
            return str(link.getsockname()[0])
    except OSError:
        return ""


def _is_loopback(host: str) -> bool:
    """Whether an address, as written, is one of the loopback; of names only ``localhost`` is."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def _interface_of(address: str) -> str:
    """The interface that has this address; without one, the first that is up and no loopback."""
    import psutil

    states = psutil.net_if_stats()
    for name, addresses in psutil.net_if_addrs().items():
        own = [one.address for one in addresses if one.family in (socket.AF_INET, socket.AF_INET6)]
        if address in own or (not address and own and states[name].isup and not any(map(_is_loopback, own))):
            return name
    return ""
