"""Seeing a training run through: starting the launcher, ending what is left of it, starting it again on what is left.

The launcher itself is never sent a signal that it handles: on SIGINT and SIGTERM DeepSpeed's ends, on every host, all
launches of the same user. A launch is ended by its own mark instead (``hostprocess``), host by host.
"""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from finemask_ds import hostprocess
from finemask_ds.config import TrainingConfig
from finemask_ds.doctor.hostfile import AT_ONCE, SSH_SEC, environment_files, read_hostfile, ssh_command
from finemask_ds.engine.base import Batching
from finemask_ds.errors import UserError
from finemask_ds.pdsh import for_pdsh
from finemask_ds.run import atomic_write
from finemask_ds.signals import Interrupted, Interruption

GRACE_SEC = 20.0
"""From SIGTERM until a rank that does not end is killed."""
BACK_OFF_SEC, LONGEST_BACK_OFF_SEC = 2.0, 60.0
"""Before the first restart, doubled before each further one."""
KEEP_ALIVE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3 -o ConnectTimeout=10"
"""Without it the head's ssh waits for ever for a host whose cable was cut."""
_OWN = ("hostfile", "max_restarts", "ranks")


def supervise(config: TrainingConfig, command: Sequence[str]) -> int:
    """Start ``command`` on the hosts of ``--hostfile``, or here, and again after each failure.

    Args:
        config: of the run; says how often.
        command: the launcher script and its options as typed.

    Returns:
        The exit code: of the last launch, or 128 and the signal's number where this process was asked to end.

    Raises:
        UserError: where it cannot start as asked.
    """
    if "RANK" in os.environ:
        raise UserError(
            "--hostfile and --max_restarts of this command start the launcher themselves; type "
            f"python {command[0]} with python in front, or give the launcher its own --hostfile before {command[0]}"
        )
    if not config.deepspeed:
        raise UserError("--hostfile and --max_restarts start ranks; type --deepspeed configs/ds/zero2.json")
    try:
        with Interruption().watching() as interruption, interruption.raising():
            return _see_through(config, command)
    except Interrupted as ended:
        return ended.exit_code


def _see_through(config: TrainingConfig, command: Sequence[str]) -> int:
    code, back_off = 1, BACK_OFF_SEC
    asked = read_hostfile(Path(config.hostfile)) if config.hostfile else {}
    for restarts in range(config.max_restarts + 1):
        if restarts:
            _tell(f"restart {restarts} of {config.max_restarts} in {back_off:.0f} s")
            time.sleep(back_off)
            back_off = min(2 * back_off, LONGEST_BACK_OFF_SEC)
        launch = _prepare(config, command, asked, is_first=restarts == 0)
        if launch is None:
            continue
        code, silent = launch.run()
        if code in (0, UserError.exit_code):  # A restart does not mend bad input.
            return code
        _tell(f"the launch ended with code {code}")
        if silent and restarts < config.max_restarts:
            # What lives there hears nothing of the others, and gives them up.
            _tell(f"waiting until whatever lives on {', '.join(silent)} has ended by itself")
            time.sleep(1.5 * config.silence_sec)
    return code


def _prepare(
    config: TrainingConfig, command: Sequence[str], asked: Mapping[str, int], *, is_first: bool
) -> Launch | None:
    """The next launch, None where no host answers.

    Raises:
        UserError: where the first one would not be as asked.
    """
    if not asked:
        return Launch(command, {}, config.ranks, "127.0.0.1", hostprocess.free_port("127.0.0.1"))
    answers = _ask(asked, ["address"], 0)
    silent = [host for host in asked if host not in answers]
    if is_first and silent:
        raise UserError(
            f"{', '.join(silent)} of {config.hostfile} cannot be used: ssh {silent[0]} {sys.executable} did not answer;"
            " take it out of the file, or see what finemask doctor says"
        )
    total = sum(asked.values())
    if is_first and config.ranks not in (0, total):
        raise UserError(f"--ranks {config.ranks} but {config.hostfile} has {total} slots; change the one or the other")
    hosts = dict(asked) if is_first else _usable({host: asked[host] for host in answers}, config)
    number = sum(hosts.values())
    if not is_first:
        left_out = f" ({', '.join(silent)} not answering)" if silent else ""
        _tell(f"going on with {number} of {total} rank(s) on {', '.join(hosts) or 'no host'}{left_out}")
    if not hosts:
        return None
    address, port = answers[next(iter(hosts))].split()
    if number < total and not config.micro_batch_size:
        command = [*command, "--micro_batch_size", str(_micro_batch(config.batch_size, number, total))]
    return Launch(command, hosts, number, address, int(port))


def _usable(hosts: Mapping[str, int], config: TrainingConfig) -> dict[str, int]:
    """As many slots, in the order of the hosts, as the batch can be dealt out to."""
    left = next((number for number in range(sum(hosts.values()), 0, -1) if _divides(number, config)), 0)
    chosen = {}
    for host, slots in hosts.items():
        if taken := min(slots, left):
            chosen[host] = taken
            left -= taken
    return chosen


def _micro_batch(batch_size: int, ranks: int, ranks_asked: int) -> int:
    """Sequences per forward on one of ``ranks``: no more than on one of all that were asked for, which had room."""
    share, most = batch_size // ranks, batch_size // ranks_asked
    return next(size for size in range(most, 0, -1) if share % size == 0)


def _divides(ranks: int, config: TrainingConfig) -> bool:
    try:
        Batching.of(config.batch_size, config.micro_batch_size, ranks)
    except UserError:
        return False
    return True


@dataclass
class Launch:
    """One start of the DeepSpeed launcher."""

    command: Sequence[str]
    hosts: Mapping[str, int]
    """Host -> ranks there; empty: this machine, without ssh."""
    ranks: int
    """0: as many as the launcher finds devices."""
    address: str
    port: int

    def __post_init__(self) -> None:
        self._name = secrets.token_hex(16)

    def run(self) -> tuple[int, list[str]]:
        """Wait until it ends, by itself or because this process is asked to, and until nothing of it is left.

        Returns:
            Its exit code, and the hosts that did not answer afterwards.
        """
        with tempfile.TemporaryDirectory(prefix="finemask-launch-") as folder:
            command, environment = self._command(Path(folder)), self._environment(Path(folder))
            try:
                process = subprocess.Popen(command, env=environment, start_new_session=True)
                code = process.wait()
            finally:
                found, silent = self._end()
        if code == 0 and found:
            # DeepSpeed's launcher takes the kill of what it has started for a good end.
            return 1, silent
        return (code if code >= 0 else 128 - code), silent

    def _end(self) -> tuple[int, list[str]]:
        """End what lives of it; how many ranks that were, and which hosts did not answer."""
        words = ["end", self._name, str(GRACE_SEC)]
        answers = _ask(self.hosts, words, GRACE_SEC + hostprocess.KILL_SEC)
        program = [sys.executable, "-I", "-S", hostprocess.__file__, *words]
        here = _answer(program, "", GRACE_SEC + hostprocess.KILL_SEC)
        found = sum(int(answer) for answer in [*answers.values(), here] if answer)
        return found, [host for host in self.hosts if host not in answers]

    def _command(self, folder: Path) -> list[str]:
        script, *options = self.command
        number = ["--ranks", str(self.ranks)] if self.ranks else []
        words = [script, *without_options(options, _OWN), *number]
        # At its usual level the launcher prints its command with all forwarded variables, secrets too.
        runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error"]
        runner += ["--master_port", str(self.port), "--master_addr", self.address]
        if not self.hosts:
            return [*runner, "--hostfile=", *(["--num_gpus", str(self.ranks)] if self.ranks else []), *words]
        with atomic_write(folder / "hostfile") as stream:
            stream.writelines(f"{host} slots={slots}\n" for host, slots in self.hosts.items())
        # Also for a single host, which the launcher would take for this one.
        return [*runner, "--hostfile", str(folder / "hostfile"), "--no_ssh_check", "--force_multi", *for_pdsh(words)]

    def _environment(self, folder: Path) -> dict[str, str]:
        """The launcher's own, with the launch's mark, here and, by its file of variables, on the hosts."""
        forwarded = [line for path in environment_files() for line in path.read_text(encoding="utf-8").splitlines()]
        forwarded = list(dict.fromkeys(line for line in forwarded if line.strip()))
        mark = {hostprocess.VARIABLE: self._name}
        path = folder / "environment"
        path.touch(mode=0o600)  # It may hold secrets; the folder is this user's alone too.
        path.write_text("\n".join([*forwarded, *(f"{name}={value}" for name, value in mark.items())]))
        ssh = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {KEEP_ALIVE}".strip()
        return {**os.environ, **mark, "DS_ENV_FILE": str(path), "PDSH_SSH_ARGS_APPEND": ssh}


def without_options(options: Sequence[str], names: Iterable[str]) -> list[str]:
    """Options as typed without some of one value each."""
    kept: list[str] = []
    words = iter(options)
    for word in words:
        name, equals, _ = word.removeprefix("--").partition("=")
        if not (word.startswith("--") and name in names):
            kept.append(word)
        elif not equals:
            next(words, None)
    return kept


def _ask(hosts: Iterable[str], words: Sequence[str], patience_sec: float) -> dict[str, str]:
    """What each host answers to ``hostprocess``, all at once and each in bounded time; the silent ones are left out."""
    program = Path(hostprocess.__file__).read_text(encoding="utf-8")
    there = shlex.join([sys.executable, "-I", "-S", "-", *words])

    def ask(host: str) -> str:
        return _answer([*ssh_command(), host, there], program, patience_sec)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = dict(zip(hosts, pool.map(ask, hosts), strict=True))
    return {host: answer for host, answer in answers.items() if answer}


def _answer(command: Sequence[str], told: str, patience_sec: float) -> str:
    """The last line that a command answers to what it is told, in bounded time; empty where it gives none."""
    try:
        given = subprocess.run(
            command, input=told, capture_output=True, text=True, check=True, timeout=SSH_SEC + patience_sec,
            start_new_session=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return given.splitlines()[-1] if given else ""


def _tell(what: str) -> None:
    print(f"finemask: {what}", file=sys.stderr, flush=True)
