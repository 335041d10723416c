"""How the ranks find each other: at the first rank's store, within a bounded time, on the cluster's interface only."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from finemask_ds.errors import TransientError, UserError

START_SEC = 20.0
"""Beyond the time after which a silent rank is given up, ranks may start so much later than each other."""


def join(rank: int, size: int, wait_sec: float) -> dist.Store:
    """The store of the ranks, once all of them are there; ``MASTER_ADDR`` and ``MASTER_PORT`` (0: any) say where.

    Raises:
        RuntimeError: where some are not there in time, naming them.
        UserError: where the port is taken, or nobody knows the address.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=wait_sec)
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # Then torchrun itself has the store.
    if rank == 0 and not is_torchruns:
        listener = _listen(address, port)
        port = listener.getsockname()[1] if listener else port
        os.environ["MASTER_PORT"] = str(port)
        descriptor = listener.detach() if listener else None
        own = dist.TCPStore(
            address, port, is_master=True, wait_for_workers=False, timeout=patience, master_listen_fd=descriptor
        )
    else:
        try:
            own = dist.TCPStore(address, port, is_master=False, timeout=patience)
        except dist.DistError as error:
            raise _missing([0], wait_sec) from error
    store = of_this_start(own)
    store.set(_key(rank), "")
    if store.add("finemask/ranks", 1) == size:
        store.set("finemask/all", "")
    try:
        store.wait(["finemask/all"], patience)
    except dist.DistError as error:
        missing = [other for other in range(size) if not store.check([_key(other)])] if rank == 0 else []
        raise _missing(missing, wait_sec) from error
    return store


def of_this_start(store: dist.Store) -> dist.Store:
    """What a store holds of this start of the ranks: torchrun's own outlives the ranks that it starts again."""
    return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _listen(address: str, port: int) -> socket.socket | None:
    """A socket on the interface of ``address`` alone.

    Returns:
        None, for a store that listens everywhere, where the address is none of this host's, as a service's name, or
        where the host's own name leads to its loopback, as on Debian, and the other hosts mean another one by it.

    Raises:
        TransientError: where the port is taken.
        UserError: where nobody knows the address.
    """
    try:
        for family, kind, protocol, _, where in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM):
            is_own_name = address not in ("localhost", where[0]) and ipaddress.ip_address(where[0]).is_loopback
            if not is_own_name and (listener := _bind(socket.socket(family, kind, protocol), where)):
                return listener
    except OSError as error:
        refused = TransientError if error.errno == errno.EADDRINUSE else UserError
        raise refused(
            f"port {port} of {address} cannot be listened on ({error.strerror}): type --master_addr and --master_port "
            "to the launcher, an address of the first host and a port that is free there"
        ) from error
    return None


def _bind(listener: socket.socket, where: Any) -> socket.socket | None:
    """The socket, listening; None where the address is none of this host's."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(where)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        return None
    return listener


def _missing(ranks: Sequence[int], wait_sec: float) -> RuntimeError:
    which = f"rank(s) {', '.join(map(str, ranks))}" if ranks else "some ranks"
    me = f"rank {os.environ['RANK']} on {socket.gethostname()}"
    return RuntimeError(f"{which} did not come; {me} has waited for {wait_sec:.0f} s")


def _key(rank: int) -> str:
    return f"finemask/rank/{rank}"
