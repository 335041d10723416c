"""The networks of hosts for tests: numbered bridges, cables and namespaces, and the removal of what was left behind.

A bridge's number names everything that belongs to it. Its alias names the process that owns it; where that process is
dead, ``claim_network`` removes what it left.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = {
    "ip": "iproute2", "nsenter": "util-linux", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh",
    "munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client", "mpirun": "openmpi-bin",
}  # fmt: skip
"""Commands and the Debian packages that hold them."""
SUPER_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin:/bin"
HEAD = "head"
"""A host beside the counted ones, which trains nothing: where a launcher or a Slurm controller runs."""


def lacking(*commands: str) -> str:
    """Why hosts that need these commands cannot be started here; empty where they can."""
    if os.geteuid() != 0:
        return "hosts for tests need root (network namespaces)"
    missing = [PACKAGES[command] for command in commands if shutil.which(command, path=SUPER_PATH) is None]
    if missing:
        return f"the packages {' '.join(missing)} are missing (type: make cluster-packages)"
    tried = subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True, text=True, timeout=10)
    return "" if tried.returncode == 0 else f"namespaces are not allowed here: {tried.stderr.strip()}"


def wait_until(done: Callable[[], Any], timeout_sec: float, what: str) -> None:
    """Ask ``done()`` until it is true."""
    deadline = time.monotonic() + timeout_sec
    while not done():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_sec} s"
        time.sleep(0.02)


def ip(*words: str, check: bool = True) -> str:
    """``ip`` of iproute2."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, env={"PATH": SUPER_PATH})
    assert not check or done.returncode == 0, f"ip {shlex.join(words)}: {done.stderr}"
    return done.stdout


def bridge(number: int) -> str:
    return f"fmb{number}"


def subnet(number: int) -> str:
    """Of the range for measurements of networks (RFC 2544), which no real network uses."""
    return f"198.{18 + number // 256}.{number % 256}"


def namespace(number: int, name: str) -> str:
    return f"fm{number}-{name}"


def cable(number: int, address: str) -> str:
    return f"fm{number}v{address.rpartition('.')[2]}"


def claim_network() -> int:
    """Remove what dead processes left, then make the first free bridge and write its owner on it."""
    with open("/run/finemask-hosts.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _remove_leftovers()
        for number in ((os.getpid() + step) % 512 for step in range(512)):
            if not Path("/sys/class/net", bridge(number)).exists():
                ip("link", "add", bridge(number), "type", "bridge")
                ip("link", "set", "dev", bridge(number), "alias", f"{os.getpid()} {_started(os.getpid())}")
                ip("addr", "add", f"{subnet(number)}.254/24", "dev", bridge(number))
                ip("link", "set", bridge(number), "up")
                return number
    raise AssertionError("512 networks of hosts are in use")


def plug(number: int, name: str, address: str, known: dict[str, str]) -> None:
    """A network namespace with a cable to the bridge; ``ip netns exec`` mounts its /etc/hosts."""
    space, wire = namespace(number, name), cable(number, address)
    etc = Path("/etc/netns") / space
    etc.mkdir(parents=True, exist_ok=True)
    lines = [f"{there} {other}\n" for other, there in known.items()]
    (etc / "hosts").write_text("".join(["127.0.0.1 localhost\n", *lines]))
    (etc / "hostname").write_text(f"{name}\n")
    ip("netns", "add", space)
    ip("link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", space)
    ip("link", "set", wire, "master", bridge(number))
    ip("-n", space, "link", "set", "lo", "up")
    ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
    ip("-n", space, "link", "set", "eth0", "up")


def _remove_leftovers() -> None:
    for link in json.loads(ip("-j", "link", "show", "type", "bridge") or "[]"):
        name = link.get("ifname", "")
        if name.startswith("fmb") and name[3:].isdigit() and not _lives(link.get("ifalias", "")):
            remove(int(name[3:]))


def remove(number: int) -> None:
    """Kill what runs in the hosts of one bridge and remove namespaces, cables and bridge, as far as they are there."""
    spaces = [line.split()[0] for line in ip("netns", "list").splitlines() if line.startswith(f"fm{number}-")]
    for space in spaces:

        def emptied(space: str = space) -> bool:
            pids = ip("netns", "pids", space, check=False).split()
            if pids:
                subprocess.run(["kill", "-9", *pids], capture_output=True, timeout=10)
            return not pids

        wait_until(emptied, 20, f"{space} is empty")
        ip("netns", "del", space, check=False)
        shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)
    for link in json.loads(ip("-j", "link", "show", "master", bridge(number), check=False) or "[]"):
        ip("link", "del", link["ifname"], check=False)
    ip("link", "del", bridge(number), check=False)


def _lives(owner: str) -> bool:
    pid, _, started = owner.partition(" ")
    return pid.isdigit() and _started(int(pid)) == started


def _started(pid: int) -> str:
    """When a process started, in clock ticks: tells it from a later one of the same number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
