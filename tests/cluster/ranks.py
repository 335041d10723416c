"""A pool of ranks on hosts for tests: the ranks stay up and run one function after another, as those of RankPool."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

from tests.cluster.hosts import Hosts
from tests.pool import RankPool, free_port, serve


class _Rank:
    """What RankPool wants of a process, of one on a host."""

    def __init__(self, entry: subprocess.Popen[bytes], pid: int):
        self._entry, self.pid = entry, pid

    def join(self, timeout_sec: float | None = None) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._entry.wait(timeout_sec)

    def is_alive(self) -> bool:
        return self._entry.poll() is None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class HostRankPool(RankPool):
    """``per_host`` ranks on each host, in the order of the hosts; the first host is told to all by its name."""

    def __init__(self, hosts: Hosts, per_host: int = 1):
        super().__init__(per_host * len(hosts.names))
        self._hosts, self._per_host = hosts, per_host

    def _start(self) -> None:
        port = free_port()
        for rank in range(self.size):
            # The hosts share this machine's files, and with them sockets that are files.
            address = str(Path(self._folder.name) / f"link-{rank}")
            with Listener(address, authkey=b"ranks") as listener:
                listener._listener._socket.settimeout(60)  # type: ignore[attr-defined]
                told = [str(rank), str(self.size), self._hosts.names[0], str(port), address, str(self._stacks(rank))]
                name = self._hosts.names[rank // self._per_host]
                log = Path(self._folder.name) / f"log-{rank}"
                entry = self._hosts.start(name, [sys.executable, "-m", "tests.cluster.ranks", *told], log)
                link = listener.accept()
            self._processes.append(_Rank(entry, _peer(link)))
            self._links.append(link)  # type: ignore[arg-type]


def _peer(link: Connection) -> int:
    """The process at the other end of a link, by the number that it has here."""
    with socket.fromfd(link.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as end:
        return struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]


def main(rank: str, size: str, master: str, port: str, address: str, stacks: str) -> None:
    with Client(address, authkey=b"ranks") as link:
        serve(int(rank), int(size), (master, int(port)), link, stacks, "cpu")


if __name__ == "__main__":
    main(*sys.argv[1:])
