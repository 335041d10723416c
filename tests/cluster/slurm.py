"""Slurm on hosts for tests: munged and slurmctld on the head, slurmd on each counted host, two "GPUs" in each."""

from __future__ import annotations

import os
import secrets
import stat
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.cluster.hosts import Hosts
from tests.cluster.networks import HEAD, wait_until

SETTINGS = """\
ClusterName={cluster}
SlurmctldHost=head({head})
SlurmctldPort=6817
SlurmdPort=6818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its old credential expires: two minutes by default.
AuthInfo=socket={folder}/munge/sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000,batch_sched_delay=0
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
MinJobAge=300
KillWait=2
UnkillableStepTimeout=10
MessageTimeout=10
# A node that comes back after a power-off is used again by itself.
ReturnToService=2
JobRequeue=1
RebootProgram=/bin/true
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""
NODE = "NodeName={name} NodeAddr={address} CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN\n"


class Slurm:
    """A Slurm over ``hosts``; start it with ``Slurm.up``.

    Attributes:
        environment: What Slurm's commands need on any host, beside the hosts' own environment.
    """

    def __init__(self, hosts: Hosts, folder: Path):
        self.hosts, self.folder = hosts, folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    @classmethod
    def up(cls, hosts: Hosts, folder: Path) -> Slurm:
        """Start munged, slurmctld and a slurmd on each host; all nodes are idle at the end."""
        slurm = cls(hosts, folder)
        slurm._write_settings()
        munge = [f"--{kind}={folder}/munge/{name}" for kind, name in
                 (("key-file", "key"), ("socket", "sock"), ("pid-file", "pid"), ("log-file", "log"),
                  ("seed-file", "seed"))]  # fmt: skip
        slurm._start(HEAD, ["munged", *munge, "--force"])
        slurm._start(HEAD, ["slurmctld"])
        for name in hosts.names:
            slurm.start_node(name)
        slurm._wait_until_idle()
        return slurm

    def down(self) -> None:
        """End the jobs and daemons; the hosts stay."""
        self.run(["scancel", "--quiet", "-u", "root"], timeout=20)
        pids = [*self.folder.glob("slurmd.*.pid"), self.folder / "slurmctld.pid", self.folder / "munge" / "pid"]
        for path in (path for path in pids if path.exists()):
            name = path.name.split(".")[1] if path.name.startswith("slurmd.") else HEAD
            self.hosts.run(name, ["kill", "-9", path.read_text().strip()])

    def start_node(self, name: str) -> None:
        """Start slurmd on a host, which must also be done after its power came back."""
        self._start(name, ["slurmd", "-N", name, "-d", "/usr/sbin/slurmstepd"])

    def mend(self) -> None:
        """Start slurmd where a host has lost it; all nodes are idle at the end."""
        for name in self.hosts.names:
            if self.hosts.run(name, ["pgrep", "-x", "slurmd"]).returncode != 0:
                # Otherwise slurmctld waits a minute for what the old slurmd has still to say of its last job.
                update = ["scontrol", "update", f"nodename={name}"]
                self.run([*update, "state=down", "reason=lost"])
                self.start_node(name)
                self.run([*update, "state=resume"])
        self._wait_until_idle()

    def run(
        self, argv: Sequence[str], timeout: float = 60, env: Mapping[str, str | None] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands, or what calls them, on the head to its end."""
        return self.hosts.run(HEAD, argv, timeout, {**self.environment, **(env or {})})

    def states(self) -> list[str]:
        """Of each node: idle, mixed, allocated, down ..."""
        return self.run(["sinfo", "-h", "-N", "-o", "%t"], timeout=30).stdout.split()

    def _wait_until_idle(self) -> None:
        wait_until(lambda: self.states() == ["idle"] * len(self.hosts.names), 60, "all Slurm nodes are idle")

    def _start(self, name: str, argv: Sequence[str]) -> None:
        """Start a daemon, which must be given no pipes of ours to keep open."""
        log = self.folder / f"{argv[0]}.out"
        process = self.hosts.start(name, argv, log, self.environment)
        assert process.wait(30) == 0, f"{argv[0]} on {name}: {log.read_text()}"

    def _write_settings(self) -> None:
        folder, hosts = self.folder, self.hosts
        for name in ("state", "munge", "dev", *(f"spool.{name}" for name in hosts.names)):
            (folder / name).mkdir(parents=True)
        (folder / "munge").chmod(0o755)
        key = folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        for index in range(2):  # Copies of /dev/null: a GPU that is only counted, without a file, drains the node.
            os.mknod(folder / "dev" / f"gpu{index}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/dev/gpu[0-1] Flags=nvidia_gpu_env\n")
        version = "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1"
        groups = f"CgroupPlugin=cgroup/{version}\nCgroupMountpoint=/sys/fs/cgroup\nIgnoreSystemd=yes\n"
        (folder / "cgroup.conf").write_text(groups)  # Without it slurmd dies, though nothing uses it.
        nodes = "".join(NODE.format(name=name, address=hosts.address(name)) for name in hosts.names)
        first = SETTINGS.format(cluster=f"fm{hosts.number}", head=hosts.address(HEAD), folder=folder)
        (folder / "slurm.conf").write_text(first.replace("PartitionName", f"{nodes}PartitionName"))
