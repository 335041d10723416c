"""Where the ranks find each other: a store that listens on the address they were given, not on every interface."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from finemask_ds.errors import UserError

SCHEME = "finemask"
_NOT_OURS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_WAITING = 4096
"""Connections that may wait at once: ranks of the largest runs all connect in the same moment."""


def install() -> str:
    """Teach torch this rendezvous; the address to initialise a process group with."""
    with contextlib.suppress(RuntimeError):  # It is known already.
        dist.register_rendezvous_handler(SCHEME, _rendezvous)
    return f"{SCHEME}://"


def _rendezvous(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[dist.Store, int, int]]:
    """As torch's ``env://``, which listens on all interfaces.

    Raises:
        UserError: where the port is taken.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    yield _store(rank, size, timeout), rank, size


def _store(rank: int, size: int, time_out: timedelta) -> dist.Store:
    if size == 1:
        return dist.HashStore()  # Nobody to find.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # Then torchrun itself has the store.
    listens = rank == 0 and not is_torchruns
    return dist.TCPStore(
        address, port, size, is_master=listens, timeout=time_out, multi_tenant=not is_torchruns,
        master_listen_fd=_listen(address, port) if listens else None,
    )  # fmt: skip


def _listen(address: str, port: int) -> int | None:
    """A socket that listens where the other ranks connect to.

    Returns:
        Its descriptor; None where the address is not one of this machine's that another host could mean, as behind a
        translation of addresses or where a host's own name is 127.0.1.1 to itself: then torch listens everywhere.

    Raises:
        UserError: where the port is taken.
    """
    if not is_local(address) and is_loopback(address):
        return None
    family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    try:
        return socket.create_server(place[:2], family=family, backlog=_WAITING).detach()
    except OSError as error:
        if error.errno in _NOT_OURS:
            return None
        raise UserError(
            f"port {port} of {address} cannot be listened on ({error.strerror}); type another --master_port to the "
            "launcher"
        ) from error


def is_local(address: str) -> bool:
    """Whether an address says by itself that all ranks are on this host."""
    return address == "localhost" or _is_loopback_number(address)


def is_loopback(address: str) -> bool:
    """Whether an address or a host's name leads back to this host only, as far as this host knows."""
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(_is_loopback_number(str(place[0])) for *_, place in found)


def _is_loopback_number(address: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return False


def interface_towards(address: str) -> tuple[str, int]:
    """The network interface through which this host reaches an address, and its bits per second; "", 0 if unknown."""
    import psutil

    try:
        family, _, _, _, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # Of a datagram socket: nothing is sent.
            mine = probe.getsockname()[0]
    except OSError:
        return "", 0
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == mine for one in addresses):
            return name, psutil.net_if_stats()[name].speed * 10**6
    return "", 0
