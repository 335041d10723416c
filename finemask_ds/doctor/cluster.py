"""`finemask doctor --hostfile`: look from the head, then start the ranks and pass on what they find."""

from __future__ import annotations

import dataclasses
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

from finemask_ds.config.doctor import DoctorConfig
from finemask_ds.doctor.finding import Finding, Report
from finemask_ds.doctor.hostfile import check_hosts, check_launcher, read_hostfile
from finemask_ds.pdsh import for_pdsh

REPOSITORY = Path(__file__).resolve().parents[2]
LEAVE_SEC = 20.0
"""What the launcher may take beside its ranks, which end by themselves."""
SHOWN_LINES = 40
"""Of what launcher and ranks said otherwise, where they failed without a finding."""


def examine_cluster(config: DoctorConfig, hostfile: Path) -> Report:
    """Examine the hosts of a hostfile from here, and then, where all answer, from ranks on all of them.

    Raises:
        UserError: for a hostfile that cannot be.
    """
    hosts = read_hostfile(hostfile)
    report = Report()
    report.add(check_launcher(hosts, hostfile, config.ranks))
    if len(hosts) > 1:
        report.add(check_hosts(hosts))
    if report.is_bad:
        report.add([Finding("note", "ranks", "not started, as what is bad above would stop them")])
        return report
    code = _start_ranks(config, hostfile, report, several=len(hosts) > 1)
    if code == -signal.SIGKILL:
        todo = "look for the host that hangs: type finemask doctor on each"
        report.add([Finding("bad", "launcher", "had to be killed, as it did not end in time", todo)])
    elif code and not report.is_bad:
        report.add([Finding("bad", "launcher", f"ended with code {code}, see above")])
    return report


def _start_ranks(config: DoctorConfig, hostfile: Path, report: Report, *, several: bool) -> int:
    """Report what the ranks find; the launcher's exit code."""
    options, port = options_of(config), 20_000 + secrets.randbelow(10_000)
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error", "--no_ssh_check",
        "--hostfile", str(hostfile), "--master_port", str(port),
        str(REPOSITORY / "launcher/doctor.py"), *(for_pdsh(options) if several else options),
    ]  # fmt: skip
    # In a group of its own, to be killed as a whole: a signal the launcher would answer with a pkill of all launches
    # of this user on all hosts.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", process_group=0,
    )  # fmt: skip
    timer = threading.Timer(config.time_out_sec + LEAVE_SEC, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    others: deque[str] = deque(maxlen=SHOWN_LINES)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if finding := Finding.parse(line):
                report.add([finding])
            else:
                others.append(line)
        if (code := process.wait()) and not report.is_bad:
            print("".join(others), end="", file=sys.stderr, flush=True)
        return code
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def options_of(config: DoctorConfig) -> list[str]:
    """The options of launcher/doctor.py, where they are not the defaults."""
    defaults = DoctorConfig.defaults()
    chosen = {name: value for name, value in dataclasses.asdict(config).items() if value != defaults[name]}
    return [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
