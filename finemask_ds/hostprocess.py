"""What the supervisor asks of a host: the standard library alone, sent over ssh as it stands, run without the package.

    python -I -S - address             an address by which the cluster reaches this host, and a free port of it
    python -I -S - end LAUNCH GRACE    end what lives here of a launch, and tell how many ranks that were

Every process of a launch has its random name in the environment, so that no other run of the same user is touched.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

VARIABLE = "FINEMASK_LAUNCH"
KILL_SEC = 10.0
"""A process that does not end when it is killed, as it waits for a device, is left behind after this time."""
_NOWHERE = ("192.0.2.1", 9)
"""No host has this address (RFC 5737); the way towards it is the default route. Nothing is sent."""


def address() -> str:
    """The address at which ssh has reached this host; where that is its loopback, the one it goes out by."""
    reached = (os.environ.get("SSH_CONNECTION", "").split() or [""] * 4)[2]
    if reached and not reached.startswith("127.") and reached != "::1":
        return reached
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        try:
            link.connect(_NOWHERE)
        except OSError:
            return "127.0.0.1"
        return str(link.getsockname()[0])


def free_port(host: str) -> int:
    """A port of an address that nobody listens on."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        return int(server.getsockname()[1])


def living(launch: str) -> dict[int, bytes]:
    """Process -> its environment, of all that live here of a launch."""
    found, mark = {}, f"{VARIABLE}={launch}".encode()
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/environ", "rb") as stream:
                environment = stream.read()
        except OSError:  # Another user's, or gone.
            continue
        if mark in environment.split(b"\0"):
            found[int(name)] = environment
    return found


def ranks_of(launch: str) -> list[int]:
    """The ranks of a launch that live here, without what they have started themselves."""
    every = {pid for pid, environment in living(launch).items() if b"\0RANK=" in b"\0" + environment}
    return [pid for pid in every if _parent(pid) not in every]


def end(launch: str, grace_sec: float) -> int:
    """Ask the ranks to end, so that they save; kill what is left after a while. How many ranks there were."""
    ranks, deadline = ask(launch), time.monotonic() + grace_sec
    while ranks and living(launch) and time.monotonic() < deadline:
        time.sleep(0.1)
    deadline = time.monotonic() + KILL_SEC
    while (left := living(launch)) and time.monotonic() < deadline:
        for pid in left:
            _send(pid, signal.SIGKILL)
        time.sleep(0.05)
    return ranks


def ask(launch: str) -> int:
    """Ask the ranks of a launch that live here to end, so that they save. How many there were."""
    ranks = ranks_of(launch)
    for pid in ranks:
        _send(pid, signal.SIGTERM)
    return len(ranks)


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:
            return int(stream.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError:
        return  # It has just ended.


def main(words: list[str]) -> None:
    """Answer one question on standard output."""
    if words[0] == "address":
        host = address()
        print(host, free_port(host))
    else:
        print(end(words[1], float(words[2])))


if __name__ == "__main__":
    main(sys.argv[1:])
