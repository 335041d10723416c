"""Hosts for tests, several on one machine: each an sshd of its own name, address, processes and mounts.

A host is a net, uts, ipc, pid and mount namespace whose first process is an sshd: its death is a power-off. All hosts
of one ``Hosts`` hang on one bridge.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from finemask_ds.lock import lives
from tests.cluster.networks import (
    HEAD,
    SUPER_PATH,
    cable,
    claim_network,
    ip,
    namespace,
    plug,
    remove,
    subnet,
    wait_until,
)
from tests.conftest import REPOSITORY

PORT = 2222
FORWARDED = ("DS_ACCELERATOR", "FINEMASK_CACHE", "GLOO_SOCKET_IFNAME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS",
             "TRITON_INTERPRET")  # fmt: skip
"""What the ranks on the hosts need and the DeepSpeed launcher forwards only when its environment file names it."""


class Hosts:
    """Hosts ``node1`` ... and ``head`` on a bridge of their own; start them with ``Hosts.up``.

    Attributes:
        names: Of the counted hosts, without ``head``.
        folder: Keys, logs and settings; also the hosts see it, as they see all files of this machine.
        environment: What a process on a host is started with: an ``ssh`` that reaches the others first on PATH.
        hostfile: One slot for each counted host.
    """

    def __init__(self, number: int, count: int, folder: Path):
        self.number, self.folder = number, folder
        self.names = [f"node{index}" for index in range(1, count + 1)]
        self.hostfile = folder / "hostfile"
        self.environment = {
            "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{SUPER_PATH}", "PYTHONPATH": str(REPOSITORY),
            "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false", "DS_ENV_FILE": f"{folder}/deepspeed_env", "PDSH_RCMD_TYPE": "ssh",
        }  # fmt: skip
        self._outer: dict[str, subprocess.Popen[bytes]] = {}
        self._init: dict[str, int] = {}

    @classmethod
    def up(cls, count: int, folder: Path) -> Hosts:
        """Start ``count`` hosts and the head; their state lies in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        number = claim_network()
        hosts = cls(number, count, folder)
        try:
            hosts._write_settings()
            known = {name: hosts.address(name) for name in [*hosts.names, HEAD]}
            for name in known:
                plug(number, name, known[name], known)
                hosts.power_on(name)
        except BaseException:
            hosts.down()
            raise
        return hosts

    def down(self) -> None:
        """End every process on the hosts and remove them; again is no error."""
        remove(self.number)
        for process in self._outer.values():
            process.wait(10)
        self._outer, self._init = {}, {}

    def address(self, which: int | str) -> str:
        """The address of the host of this name, or of this place in ``names``."""
        name = self.names[which] if isinstance(which, int) else which
        return f"{subnet(self.number)}.{100 if name == HEAD else self.names.index(name) + 1}"

    def argv(self, name: str, argv: Sequence[str], cwd: Path = REPOSITORY) -> list[str]:
        """The command that runs ``argv`` on a host."""
        entry = ["nsenter", "-t", str(self._init[name]), "-n", "-u", "-i", "-m", "-p", f"--wdns={cwd}", "--"]
        return [*entry, *argv]

    def full_environment(self, env: Mapping[str, str | None] | None = None) -> dict[str, str]:
        """This process's environment, what hosts need, and ``env``, in which None takes a variable away."""
        told = {**os.environ, **self.environment, **(env or {})}
        return {key: value for key, value in told.items() if value is not None}

    def run(
        self, name: str, argv: Sequence[str], timeout: float = 60, env: Mapping[str, str | None] | None = None,
        cwd: Path = REPOSITORY,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run a command on a host to its end; at the time-out its process group is killed."""
        process = subprocess.Popen(
            self.argv(name, argv, cwd), env=self.full_environment(env), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                told = process.communicate(timeout=10)
                raise AssertionError(f"{shlex.join(argv)} on {name} hung for {timeout} s: {told}") from None
            raise
        return subprocess.CompletedProcess(list(argv), process.returncode, out, err)

    def start(
        self, name: str, argv: Sequence[str], log: Path, env: Mapping[str, str | None] | None = None,
        cwd: Path = REPOSITORY,
    ) -> subprocess.Popen[bytes]:  # fmt: skip
        """Start a command on a host, in a session of its own (``os.killpg(process.pid, ...)`` reaches it)."""
        with open(log, "ab") as stream:
            return subprocess.Popen(
                self.argv(name, argv, cwd), env=self.full_environment(env), stdin=subprocess.DEVNULL,
                stdout=stream, stderr=stream, start_new_session=True,
            )  # fmt: skip

    def power_off(self, name: str, silently: bool = False) -> None:
        """Kill every process of a host; ``silently``: also no peer is told that its connections ended."""
        if silently:
            self.cut(name)
        os.kill(self._init[name], signal.SIGKILL)
        self._outer[name].wait(20)

    def power_on(self, name: str) -> None:
        """Start a host that is off, and wait for its sshd."""
        self.heal(name)
        shell = 'hostname "$1" && exec /usr/sbin/sshd -D -f "$2" -E "$3"'
        sshd = [name, str(self._file(name, "sshd")), str(self._file(name, "log"))]
        namespaces = ["unshare", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child"]
        outer = subprocess.Popen(
            ["ip", "netns", "exec", namespace(self.number, name), *namespaces, "sh", "-c", shell, "host", *sshd],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env={"PATH": SUPER_PATH},
        )  # fmt: skip
        self._outer[name] = outer
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        wait_until(lambda: outer.poll() is not None or children.read_text(), 20, f"{name} starts")
        wait_until(lambda: outer.poll() is not None or self._answers(name), 20, f"{name}'s sshd answers")
        assert outer.poll() is None, f"{name} ended at its start: {self._file(name, 'log').read_text()}"
        self._init[name] = int(children.read_text())

    def mend(self) -> None:
        """Heal every cable and power on every host that is off."""
        for name, outer in list(self._outer.items()):
            self.heal(name)
            if outer.poll() is not None:
                self.power_on(name)

    def cut(self, name: str) -> None:
        """Pull the cable; its processes live on."""
        ip("link", "set", cable(self.number, self.address(name)), "down")

    def heal(self, name: str) -> None:
        """Plug the cable in again."""
        ip("link", "set", cable(self.number, self.address(name)), "up")

    def pids(self, name: str) -> list[int]:
        """All processes of a host, its sshd too, by the numbers that they have outside."""
        inside = pid_namespace(self._init[name])
        every = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        return [] if inside is None else sorted(pid for pid in every if pid_namespace(pid) == inside)

    def traffic_bytes(self, name: str) -> int:
        """What has crossed a host's cable, both ways, since it was made."""
        counters = Path(f"/sys/class/net/{cable(self.number, self.address(name))}/statistics")
        return sum(int((counters / f"{way}_bytes").read_text()) for way in ("rx", "tx"))

    def forward(self, **environment: str) -> None:
        """Name variables (beside FORWARDED) which the DeepSpeed launcher hands to the ranks."""
        told = {key: value for key, value in self.full_environment().items() if key in FORWARDED} | environment
        (self.folder / "deepspeed_env").write_text("\n".join(f"{key}={value}" for key, value in told.items()))

    def _answers(self, name: str) -> bool:
        try:
            with socket.create_connection((self.address(name), PORT), timeout=1) as link:
                return link.recv(4) == b"SSH-"
        except OSError:
            return False

    def _file(self, name: str, kind: str) -> Path:
        return self.folder / f"{name}.{kind}"

    def _write_settings(self) -> None:
        folder, ssh = self.folder, shutil.which("ssh", path=SUPER_PATH)
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd refuses to start without this empty folder.
        for key in ("id", "hostkey"):
            if not (folder / key).exists():
                keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
                subprocess.run(keygen, check=True, timeout=30)
        client = {
            "Port": PORT, "User": "root", "IdentityFile": folder / "id", "IdentitiesOnly": "yes",
            "StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null", "LogLevel": "ERROR",
            "ConnectTimeout": 5, "ServerAliveInterval": 2, "ServerAliveCountMax": 3,
        }  # fmt: skip
        (folder / "ssh_config").write_text("".join(f"{key} {value}\n" for key, value in client.items()))
        for name in [*self.names, HEAD]:
            server = {
                "Port": PORT, "ListenAddress": "0.0.0.0", "HostKey": folder / "hostkey",
                "AuthorizedKeysFile": folder / "id.pub", "StrictModes": "no", "UsePAM": "no",
                "PasswordAuthentication": "no", "PermitRootLogin": "prohibit-password", "PidFile": "none",
                "MaxStartups": 100,
            }  # fmt: skip
            self._file(name, "sshd").write_text("".join(f"{key} {value}\n" for key, value in server.items()))
        wrapper = folder / "bin" / "ssh"
        wrapper.parent.mkdir(exist_ok=True)
        wrapper.write_text(f'#!/bin/sh\nexec {ssh} -F {shlex.quote(str(folder / "ssh_config"))} "$@"\n')
        wrapper.chmod(0o755)
        self.hostfile.write_text("".join(f"{name} slots=1\n" for name in self.names))
        self.forward()


def pid_namespace(pid: int) -> str | None:
    """Which processes a process sees; None where it has ended, even if nobody has waited for it yet."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid") if lives(pid) else None
    except OSError:
        return None
