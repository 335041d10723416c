"""What the head of a cluster sees before anything starts: hostfile, pdsh, what is forwarded, who answers over ssh."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finemask_ds.doctor.checks import compare_versions
from finemask_ds.doctor.finding import Finding
from finemask_ds.errors import UserError, abbreviated
from finemask_ds.pdsh import SHELL_WORD

SSH_SEC = 10.0
"""A host must answer within this time."""
AT_ONCE = 64
_LINE = re.compile(r"(\S+)\s+slots=(\d+)")
"""As DeepSpeed reads it: what follows is ignored."""
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|_KEY$", re.I)
"""Names of variables of which the launcher makes words of a command, which `ps` shows and its log too."""


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> slots, in order, as DeepSpeed reads a hostfile.

    Raises:
        UserError: for a missing, empty or impossible file, naming the line; DeepSpeed itself would train on one host
            where the file is missing.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise UserError(f"hostfile {path} cannot be read ({reason}); type --hostfile with the cluster's") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not (text := line.strip()) or text.startswith("#"):
            continue
        match = _LINE.match(text)
        if match is None or not SHELL_WORD.fullmatch(match[1]) or match[1].startswith("-"):
            raise UserError(f"line {number} of {path} is {text[:80]!r}; write for instance: node1 slots=8")
        if match[1] in hosts:
            raise UserError(f"line {number} of {path} names {match[1]} again; write one line for each host")
        hosts[match[1]] = int(match[2])
    if not hosts or not all(hosts.values()):
        raise UserError(f"hostfile {path} has {'no host' if not hosts else 'a host of 0 slots'}; write: node1 slots=8")
    return hosts


def check_launcher(hosts: Mapping[str, int], hostfile: Path, ranks: int) -> Iterator[Finding]:
    """Whether the DeepSpeed launcher can do what this hostfile asks for."""
    total = sum(hosts.values())
    found = f"{hostfile} has {len(hosts)} host(s) with {total} slot(s)"
    if ranks and ranks != total:
        yield Finding("bad", "hostfile", found, f"--ranks asks for {ranks}: change slots= or --ranks")
    else:
        yield Finding("ok", "hostfile", found)
    if len(hosts) == 1:
        if not _is_here(host := next(iter(hosts))):
            found = f"the launcher takes a single host for this one and starts {host}'s ranks here"
            yield Finding("bad", "launcher", found, "type it on that host, or add --force_multi to deepspeed's options")
        return
    if shutil.which("pdsh") is None:
        todo = "apt-get install pdsh, or give deepspeed another --launcher"
        yield Finding("bad", "pdsh", "not on PATH, and the launcher starts the hosts with it", todo)
    if not SHELL_WORD.fullmatch(os.getcwd()):
        todo = "start from a folder of plain letters"
        yield Finding("bad", "folder", f"the launcher hands {os.getcwd()!r} to the hosts' shells unquoted", todo)
    yield from check_forwarded(environment_files())


def _is_here(host: str) -> bool:
    """Whether a host's name or address means this machine."""
    import psutil

    own = {address.address.partition("%")[0] for listed in psutil.net_if_addrs().values() for address in listed}
    try:
        found = {str(place[0]) for *_, place in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return host == socket.gethostname() or not own.isdisjoint(found)


def environment_files() -> list[Path]:
    """The files of variables that the DeepSpeed launcher forwards to the hosts, in its order."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    return [path for folder in (Path.home(), Path()) if (path := folder / name).is_file()]


def check_forwarded(files: list[Path]) -> Iterator[Finding]:
    """Every line must be NAME=VALUE, as a blank one is a ValueError there; values run in a shell, for all to see."""
    for path in dict.fromkeys(path.resolve() for path in files):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            name, equals, value = line.partition("=")
            if not equals or not re.fullmatch(r"\s*[A-Za-z_]\w*", name):
                found = f"line {number} of {path} is {line[:80]!r}, on which the launcher breaks off"
                yield Finding("bad", "environment", found, "write NAME=VALUE lines only, none of them blank")
            elif _SECRET.search(name):
                found = f"{name.strip()} in line {number} of {path} is shown to all users of the hosts, and printed"
                yield Finding(
                    "note", "environment", found, "leave it out: keep secrets in files, as hf auth login does"
                )
            elif re.search(r"[`$\"\\]", value):
                found = f"the value of {name.strip()} in line {number} of {path} is obeyed by the hosts' shells"
                yield Finding("note", "environment", found, 'leave out ` $ " and \\')


def check_hosts(hosts: Mapping[str, int]) -> Iterator[Finding]:
    """Every host answers over ssh without a password, and has what is installed here, under the same path."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = dict(zip(hosts, pool.map(_installed_on, hosts), strict=True))
    silent = {host: answer for host, answer in answers.items() if isinstance(answer, str)}
    for host, reason in silent.items():
        yield Finding("bad", "ssh", f"{host} {reason}", f"try: {shlex.join([*ssh_command(), host, 'true'])}")
    heard = {host: answer for host, answer in answers.items() if not isinstance(answer, str)}
    if heard:
        yield Finding("ok", "ssh", f"{abbreviated(list(heard), 8)} answer(s) without a password")
        yield from (finding for finding in compare_versions(heard) if finding.level == "bad")


def ssh_command() -> list[str]:
    """How a host is reached: as pdsh calls ssh, asking nobody for a password."""
    return ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_SEC / 2:.0f}",
            *shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))]  # fmt: skip


def _installed_on(host: str) -> dict[str, str] | str:
    """What a host has installed, or why that is not known."""
    here = Path.cwd()
    path = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    python = ["env", f"PYTHONPATH={path}", sys.executable, "-m", "finemask_ds.doctor.versions"]
    script = f"cd {shlex.quote(str(here))} && exec {shlex.join(python)}"
    try:
        told = subprocess.run(
            [*ssh_command(), host, script], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SSH_SEC
        )
    except subprocess.TimeoutExpired:
        return f"did not answer within {SSH_SEC:.0f} s"
    except OSError as error:
        return f"cannot be asked: ssh: {error.strerror}"
    last = (told.stderr.strip().splitlines() or [""])[-1][:200]
    if told.returncode == 255:
        return f"does not let us in ({last})"
    if told.returncode != 0:
        return f"has no finemask_ds for {sys.executable} in {here} ({last})"
    try:
        answer = json.loads(told.stdout)
        return {str(name): str(version) for name, version in answer.items()}
    except (ValueError, AttributeError):
        return f"says something else than it was asked ({told.stdout[:80]!r}); silence its shell's start-up files"
