"""A toy search over two hosts, a fault in it, and what became of both; for the tests and for benchmarks/soak.py."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finemask_ds.engine.damage import complete_steps
from finemask_ds.masks.files import load_mask
from finemask_ds.masks.mask import Mask
from finemask_ds.run import Run
from tests.cluster.hosts import FORWARDED, Hosts
from tests.conftest import REPOSITORY
from tests.pool import free_port

LIMIT_SEC = 60.0
"""Within this time of a fault everything must be gone."""
STARTED = " rank(s) on "
"""The first thing that ranks say, once all are there."""


def words_of(pid: int | str) -> bytes:
    """Command line and environment of a process; no words where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() + b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


@dataclass
class Scene:
    """What the trials share."""

    hosts: Hosts
    model: Path
    text: Path
    folder: Path
    options: Sequence[str] = ()
    """More options of the search."""
    disk: Path | None = None
    """A small file system that the hosts see too."""
    undisturbed: Mask | None = None
    training_sec: float = 0.0
    """From the ranks' first word to the end, undisturbed."""

    def search(self, run: Path, *more: str) -> list[str]:
        """The launcher script with its options."""
        return [
            *("launcher/tamt.py", "--deepspeed", "configs/ds/zero2.json", "--ranks", "2", "--model", str(self.model)),
            *("--data", str(self.text), "--run", str(run), "--seq_len", "16", "--batch_size", "8", "--eval_every", "0"),
            *("--dropout", "0", "--objective", "kd", "--init", "ranked", "--mask_lr", "1e-3", "--log_every", "50"),
            *("--save_every", "10", *self.options, *more),
        ]

    def deepspeed(self, run: Path, *more: str) -> list[str]:
        """The plain launcher over the hosts, as a user types it on the head."""
        place = ["--master_addr", self.hosts.address(0), "--master_port", str(free_port()), "--no_ssh_check"]
        return ["deepspeed", "--hostfile", str(self.hosts.hostfile), *place, *self.search(run, *more)]

    def start(self, run: Path, command: Sequence[str], log: Path, **environment: str) -> Started:
        """Start a command on the head; every process of it has the run's name in command line or environment."""
        self.hosts.forward(FINEMASK_TRIAL=str(run), **environment)
        began = log.stat().st_size if log.exists() else 0
        return Started(self, run, self.hosts.start("head", command, log), log, began)

    def find_undisturbed(self) -> None:
        """Run the search once without a fault."""
        run = self.folder / "undisturbed"
        started = self.start(run, self.pdsh(run), self.folder / "undisturbed.log")
        started.wait_for_ranks()
        began = time.monotonic()
        assert started.process.wait(300) == 0, started.told()
        self.training_sec, self.undisturbed = time.monotonic() - began, load_mask(run / "mask.safetensors")

    def pdsh(self, run: Path, *more: str) -> list[str]:
        """The ranks alone, one on each host, as srun starts them.

        Without DeepSpeed's launcher, whose own processes on head and hosts take as long to start as the ranks.
        """
        place = {"MASTER_ADDR": self.hosts.address(0), "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        told = self.hosts.full_environment({**place, "LOCAL_RANK": "0", "FINEMASK_TRIAL": str(run)})
        names = (*FORWARDED, *place, "LOCAL_RANK", "FINEMASK_TRIAL", "PYTHONPATH")
        forwarded = [f"{name}={told[name]}" for name in names if name in told]
        rank = ["env", *forwarded, "RANK=%n", sys.executable, "-u", *self.search(run, *more)]
        return ["pdsh", "-S", "-w", ",".join(self.hosts.names), f"cd {REPOSITORY} && exec {' '.join(rank)}"]

    def go_on(self, run: Path, log: Path) -> bool:
        """Start a search again; whether it came to its end."""
        again = self.start(run, self.pdsh(run), log)
        with suppress(subprocess.TimeoutExpired):
            again.process.wait(300)
        code = again.process.poll()
        again.kill()
        return code == 0


@dataclass
class Started:
    """A launch that runs."""

    scene: Scene
    run: Path
    process: subprocess.Popen[bytes]
    log: Path
    began: int

    def told(self) -> str:
        """What it has said so far."""
        return self.log.read_bytes()[self.began :].decode(errors="replace")

    def wait_for(self, happened: Callable[[], object], what: str, patience_sec: float = 120.0) -> None:
        """Wait until something happens while the launch runs."""
        deadline = time.monotonic() + patience_sec
        while not happened():
            assert self.process.poll() is None, f"ended before {what}: {self.told()}"
            assert time.monotonic() < deadline, f"waited for {what}: {self.told()}"
            time.sleep(0.002)

    def wait_for_ranks(self) -> None:
        self.wait_for(lambda: STARTED in self.told(), "the ranks' first word")

    def wait_for_step(self, step: int) -> None:
        """Wait for a checkpoint of this step or a later one."""
        self.wait_for(lambda: max(self.steps(), default=0) >= step, f"step {step}")

    def steps(self) -> list[int]:
        return complete_steps(self.run / "checkpoints")

    def pids(self) -> list[int]:
        """Every process that belongs to it, on the head and on the hosts, as seen from outside."""
        mark, me = str(self.run).encode(), str(os.getpid())
        return [int(pid) for pid in os.listdir("/proc") if pid.isdecimal() and pid != me and mark in words_of(pid)]

    def ranks(self) -> dict[int, int]:
        """Rank -> its process."""
        found = {}
        for pid in self.pids():
            words = words_of(pid)
            # The launcher itself has the script among its options, but no rank; a sidecar has no script.
            match = re.search(rb"\0launcher/\w+\.py\0.*\0RANK=(\d+)\0", words, re.S)
            if match and words.startswith(sys.executable.encode()):
                found[int(match[1])] = pid
        return found

    def gone_after(self, limit_sec: float = LIMIT_SEC) -> float | None:
        """Seconds until nothing of it lives; None where something still does after the limit."""
        began = time.monotonic()
        while self.process.poll() is None or self.pids():
            if time.monotonic() - began > limit_sec:
                return None
            time.sleep(0.05)
        return time.monotonic() - began

    def kill(self) -> None:
        """End what is left of it, so that the next one starts on clean hosts."""
        while pids := self.pids():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)
        self.process.wait(20)


@dataclass
class Injected:
    """A fault that has just been made."""

    detail: str
    named: str = ""
    """What the log must say of who failed, as a regular expression."""
    codes: tuple[int, ...] = ()
    """The only exit codes allowed; none: any but 0."""
    may_finish: bool = False
    """Whether the search may come to its end in spite of it."""
    lost: tuple[str, ...] = ()
    """Hosts that were switched off, with all that lived there."""
    mend: Callable[[], object] = field(default=lambda: None)
    """Called when all is gone."""


Fault = Callable[[Started, random.Random], Injected]


def _victim(started: Started, draw: random.Random) -> tuple[int, int, str]:
    ranks = started.ranks()
    rank = draw.choice(sorted(ranks))
    return rank, ranks[rank], f"rank {rank} on {started.scene.hosts.names[rank]}"


def kill_trainer(started: Started, draw: random.Random) -> Injected:
    rank, pid, name = _victim(started, draw)
    os.kill(pid, signal.SIGKILL)
    return Injected(f"kill -9 of rank {rank}", f"{name} ended without a word")


def stop_rank(started: Started, draw: random.Random) -> Injected:
    rank, pid, name = _victim(started, draw)
    os.kill(pid, signal.SIGSTOP)
    return Injected(f"SIGSTOP of rank {rank}", f"{name} .*no sign of life")


def power_off(started: Started, draw: random.Random) -> Injected:
    rank, _, name = _victim(started, draw)
    host, silently = started.scene.hosts.names[rank], draw.random() < 0.5
    started.scene.hosts.power_off(host, silently=silently)
    return Injected(f"power off {host}{', no peer told' if silently else ''}", f"{name} failed", lost=(host,))


def cut_cable(started: Started, draw: random.Random) -> Injected:
    rank, _, name = _victim(started, draw)
    started.scene.hosts.cut(started.scene.hosts.names[rank])
    return Injected(f"cable of {started.scene.hosts.names[rank]} cut", f"{name} failed .no sign of life")


def cut_and_heal_cable(started: Started, draw: random.Random) -> Injected:
    """Healed in time nothing may have happened; later, some rank is named: each side takes the other for gone."""
    rank, _, _ = _victim(started, draw)
    host, pause = started.scene.hosts.names[rank], draw.uniform(1, 45)
    started.scene.hosts.cut(host)
    time.sleep(pause)
    started.scene.hosts.heal(host)
    # Where it finishes, the launcher's code tells whether its own connection has outlived it.
    named = r"rank \d on node\d (failed|ended|gave)"
    return Injected(f"cable of {host} cut for {pause:.0f} s", named, codes=tuple(range(256)), may_finish=True)


def terminate(started: Started, draw: random.Random) -> Injected:
    """As srun does to all ranks, or a preempted host to its own."""
    ranks = started.ranks()
    assert ranks, "it has ended"
    chosen = draw.choice([*([rank] for rank in ranks), list(ranks)])
    for rank in chosen:
        os.kill(ranks[rank], signal.SIGTERM)
    return Injected(f"SIGTERM to rank(s) {chosen}", "finemask: SIGTERM: ", codes=(143, 1, 255, 241))


def kill_in_checkpoint(started: Started, draw: random.Random) -> Injected:
    rank, pid, name = _victim(started, draw)
    parts = started.run / "checkpoints"
    started.wait_for(lambda: any(parts.glob(".step-*.part")), "a checkpoint being written")
    time.sleep(draw.uniform(0, 0.02))
    os.kill(pid, signal.SIGKILL)
    return Injected(f"kill -9 of rank {rank} in a checkpoint", f"{name} ended without a word")


def fill_disk(started: Started, draw: random.Random) -> Injected:
    assert started.scene.disk is not None
    ballast = started.scene.disk / "ballast"
    with open(ballast, "wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError:
            pass
    return Injected("disk full", "the disk is full at ", codes=(2,), mend=ballast.unlink)


def damage_checkpoint(started: Started, draw: random.Random) -> Injected:
    """After a kill -9, so that the damage is there when the run goes on."""
    started.wait_for(lambda: len(started.steps()) > 1, "two checkpoints")
    killed = kill_trainer(started, draw)
    how = draw.choice(["half", "bit", "gone", "empty"])

    def damage() -> None:
        newest = started.run / "checkpoints" / f"step-{started.steps()[-1]}"
        file = draw.choice(sorted(newest.iterdir()))
        content = bytearray(file.read_bytes())
        if how == "bit":
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        elif how == "half":
            content = content[: len(content) // 2]
        file.write_bytes(b"" if how == "empty" else content)
        if how == "gone" and file.name != "state.json":
            file.unlink()

    return Injected(f"newest checkpoint damaged ({how})", killed.named, mend=damage)


def jump_clock(started: Started, draw: random.Random) -> Injected:
    """The clock of one host jumps; nothing may come of it."""
    host, jump = draw.choice(started.scene.hosts.names), draw.choice([86_400, -86_400, 40, -40])
    started.run.with_name(f"{started.run.name}.clock-{host}").write_text(str(jump))
    return Injected(f"the clock of {host} jumps by {jump} s", codes=(0,), may_finish=True)


def with_own_clock(run: Path, folder: Path) -> dict[str, str]:
    """The environment in which each host has a wall clock of its own for ``jump_clock`` (see wallclock.c)."""
    library = folder / "wallclock.so"
    source = Path(__file__).with_name("wallclock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-ldl"], check=True, timeout=60)
    # The launcher writes what is not plain in double quotes, so that each host's shell puts its own name there.
    return {"LD_PRELOAD": str(library), "WALLCLOCK_JUMP": f"{run}.clock-$HOSTNAME"}


FAULTS: dict[str, Fault] = {
    "kill -9": kill_trainer, "stop": stop_rank, "power off": power_off, "cable cut": cut_cable,
    "cable cut and healed": cut_and_heal_cable, "SIGTERM": terminate, "kill in a checkpoint": kill_in_checkpoint,
    "disk full": fill_disk, "damaged checkpoint": damage_checkpoint, "clock jump": jump_clock,
}  # fmt: skip


@contextmanager
def bystanders(hosts: Hosts, folder: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """On each host a process that the launcher's own pkill would take for one of its own."""
    pretend = ["bash", "-c", 'exec -a "$0 -u -m deepspeed.launcher.launch --world_info=x" sleep 100000', sys.executable]
    found = {name: hosts.start(name, pretend, folder / "bystanders.log") for name in hosts.names}
    try:
        yield found
    finally:
        for process in found.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


@dataclass
class Outcome:
    """What became of a fault and of the run."""

    kind: str
    seed: int
    detail: str
    moment_sec: float
    """After the ranks' first word."""
    step: int
    """Of the newest checkpoint then."""
    gone_sec: float | None
    """Until every rank and the launcher were gone, or the run was done; None: not within a minute."""
    code: int | None
    named: bool
    """Whether the log names the rank and host that failed (or the cause, where none failed)."""
    orphans: int
    bystanders: bool
    """Whether the other processes of the same user live."""
    equal: bool
    """Whether the run that went on found the undisturbed one's mask, bit for bit."""
    said: str = ""

    @property
    def good(self) -> bool:
        return self.gone_sec is not None and self.named and self.bystanders and self.equal and not self.orphans


def inject(started: Started, kind: str, draw: random.Random) -> Injected | None:
    """Make a fault; None where the search has left its result by then: what only ends proves nothing."""
    run = Run(started.run)
    try:
        assert started.process.poll() is None, "it has ended"
        assert not run.done("search"), "it only ends"
        injected = FAULTS[kind](started, draw)
    except (AssertionError, IndexError, ProcessLookupError):
        return None
    if injected.may_finish or not run.done("search"):
        return injected
    injected.mend()
    return None


def try_fault(
    scene: Scene, kind: str, seed: int, log: Path, *, at_step: int = 0, with_launcher: bool = True
) -> Outcome | None:
    """One trial; None where the run was done before the fault.

    Args:
        scene: with its undisturbed mask.
        kind: a key of ``FAULTS``.
        seed: of moment, victim and manner.
        log: takes what all launches say.
        at_step: the fault comes when this step is saved; 0: at a random moment after the ranks' first word.
        with_launcher: whether DeepSpeed's launcher starts the run in which the fault happens.
    """
    draw = random.Random(f"{kind} {seed}")
    base = scene.disk if kind == "disk full" and scene.disk else scene.folder
    run = base / f"{kind.replace(' ', '-')}-{seed}"
    environment = with_own_clock(run, scene.folder) if kind == "clock jump" else {}
    with bystanders(scene.hosts, scene.folder) as others:
        command = scene.deepspeed(run) if with_launcher else scene.pdsh(run)
        started = scene.start(run, command, log, **environment)
        started.wait_for_ranks()
        moment = draw.uniform(0, 0 if at_step else scene.training_sec)
        time.sleep(moment)
        if at_step:
            started.wait_for_step(at_step)
        steps = started.steps()
        injected = inject(started, kind, draw)
        if injected is None:
            started.kill()
            scene.hosts.mend()
            return None
        gone_sec = started.gone_after(LIMIT_SEC + (2 * scene.training_sec if injected.may_finish else 0))
        orphans = len(started.pids())
        started.kill()
        is_alive = all(process.poll() is None for name, process in others.items() if name not in injected.lost)
    scene.hosts.mend()
    injected.mend()
    code, told = started.process.returncode, started.told()
    has_finished = injected.may_finish and (run / "mask.safetensors").exists()
    is_named = has_finished or re.search(injected.named, told) is not None
    is_code_right = code in injected.codes if injected.codes else code != 0
    equal = scene.go_on(run, log) and load_mask(run / "mask.safetensors") == scene.undisturbed
    said = [line for line in told.splitlines() if "finemask: " in line]
    return Outcome(
        kind, seed, injected.detail, round(moment, 2), max(steps, default=0),
        None if gone_sec is None else round(gone_sec, 1), code, is_code_right and is_named, orphans,
        is_alive, equal, said=" | ".join(said)[:400],
    )  # fmt: skip


def as_json(outcome: Outcome) -> dict[str, Any]:
    """For the tally."""
    return asdict(outcome) | {"good": outcome.good}
