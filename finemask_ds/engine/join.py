"""How the ranks find each other: at the first rank's store, within a bounded time, on the cluster's interface only."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

START_SEC = 20.0
"""Beyond the time after which a silent rank is given up, ranks may start so much later than each other."""


def join(rank: int, size: int, wait_sec: float) -> dist.Store:
    """The store of the ranks, once all of them are there; ``MASTER_ADDR`` and ``MASTER_PORT`` (0: any) say where.

    Raises:
        RuntimeError: where some are not there in time, naming them.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=wait_sec)
    if rank == 0:
        listener = _listen(address, port)
        port = listener.getsockname()[1] if listener else port
        os.environ["MASTER_PORT"] = str(port)
        descriptor = listener.detach() if listener else None
        store = dist.TCPStore(
            address, port, is_master=True, wait_for_workers=False, timeout=patience, master_listen_fd=descriptor
        )
    else:
        try:
            store = dist.TCPStore(address, port, is_master=False, timeout=patience)
        except dist.DistError as error:
            raise _missing([0], wait_sec) from error
    store.set(_key(rank), "")
    if store.add("finemask/ranks", 1) == size:
        store.set("finemask/all", "")
    try:
        store.wait(["finemask/all"], patience)
    except dist.DistError as error:
        missing = [other for other in range(size) if not store.check([_key(other)])] if rank == 0 else []
        raise _missing(missing, wait_sec) from error
    return store


def _listen(address: str, port: int) -> socket.socket | None:
    """A socket on the interface of ``address`` alone; None where that is none of this host's, as a service's name."""
    for family, kind, protocol, _, where in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM):
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(where)
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            continue
        listener.listen(2048)
        return listener
    return None


def _missing(ranks: Sequence[int], wait_sec: float) -> RuntimeError:
    which = f"rank {', '.join(map(str, ranks))} has" if ranks else "some ranks have"
    return RuntimeError(
        f"rank {os.environ['RANK']} on {socket.gethostname()}: {which} not come within {wait_sec:.0f} s"
    )


def _key(rank: int) -> str:
    return f"finemask/rank/{rank}"
