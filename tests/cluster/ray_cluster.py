"""A Ray cluster on hosts for tests: its head on the first host, all hosts with two CPUs."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

from tests.cluster.hosts import Hosts
from tests.cluster.networks import wait_until

PORT = 6379
"""Of the head, on an address of its own."""


class RayCluster:
    """Ray over ``hosts``; start it with ``RayCluster.up``.

    Attributes:
        address: As ``--ray_address`` takes it.
        environment: What a program needs to be let in.
    """

    def __init__(self, hosts: Hosts, folder: Path):
        self.hosts, self.folder = hosts, folder
        self.address = f"{hosts.address(0)}:{PORT}"
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_ADDRESS": None}
        self._blocks: dict[str, subprocess.Popen[bytes]] = {}

    @classmethod
    def up(cls, hosts: Hosts, folder: Path) -> RayCluster:
        """Start Ray on each host."""
        cluster = cls(hosts, folder)
        cluster.mend()
        return cluster

    def down(self) -> None:
        """End Ray; the hosts stay."""
        for name in filter(self._runs, self.hosts.names):
            os.killpg(self._blocks[name].pid, signal.SIGTERM)
            self._blocks[name].wait(30)

    def mend(self) -> None:
        """Start Ray where a host has lost it; everywhere, where that was the head's."""
        if not self._runs(self.hosts.names[0]):
            self.down()
        for name in self.hosts.names:
            if not self._runs(name):
                self._start(name)

    def _runs(self, name: str) -> bool:
        return name in self._blocks and self._blocks[name].poll() is None

    def _start(self, name: str) -> None:
        log = self.folder / f"{name}.log"
        log.unlink(missing_ok=True)
        # Sockets lie in the folder, whose name must be short; it lets several nodes see the same files.
        head = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self.folder}"]
        place = head if name == self.hosts.names[0] else [f"--address={self.address}"]
        options = [f"--node-ip-address={self.hosts.address(name)}", "--num-cpus=2", "--object-store-memory=80000000"]
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", *place, *options]
        command += ["--disable-usage-stats", "--include-log-monitor=false"]
        block = self._blocks[name] = self.hosts.start(name, command, log, self.environment)
        wait_until(lambda: "Ray runtime started" in log.read_text() or block.poll() is not None, 60, f"Ray on {name}")
        assert block.poll() is None, log.read_text()
