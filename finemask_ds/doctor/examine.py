"""The checks in their order, on one process or on the ranks that a launcher has started."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator

from finemask_ds.config.doctor import DoctorConfig
from finemask_ds.doctor.checks import FACT_CHECKS, Check, Cluster
from finemask_ds.doctor.facts import look_around
from finemask_ds.doctor.finding import Finding, Report
from finemask_ds.doctor.together import RANK_CHECKS
from finemask_ds.engine.world import World, launched_rank, this_process

CHECKS: tuple[Check, ...] = (*FACT_CHECKS, *RANK_CHECKS)
SILENCE_SEC = 20.0


def examine(config: DoctorConfig) -> Report:
    """Examine this process's host, or together with the other ranks the cluster; the first rank prints.

    Raises:
        UserError: for bad input.
    """
    report = Report()
    with _ends_within(config.time_out_sec):
        try:
            with _ranks(config) as world:
                report.speaks = world.is_first
                world.barrier()  # From then on all that will ever listen does.
                cluster = Cluster(config, world, world.gather(look_around(config, world)))
                for check in CHECKS:
                    report.add(check(cluster))
        except RuntimeError as error:  # As all of torch's about ranks that do not find or hear each other.
            report.speaks = True
            report.add([_lost(error)])
    return report


@contextlib.contextmanager
def _ranks(config: DoctorConfig) -> Iterator[World]:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield this_process()
        return
    from finemask_ds.engine.zero import distributed

    with distributed(time_out_sec=config.time_out_sec, silence_sec=SILENCE_SEC) as world:
        yield world


def _lost(error: RuntimeError) -> Finding:
    place = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    reason = " ".join(str(error).split())[:300]
    todo = f"if others are missing, look at {place}, GLOO_SOCKET_IFNAME and the hosts' firewalls"
    return Finding("bad", "connection", f"rank {launched_rank()} on {socket.gethostname()} broke off ({reason})", todo)


@contextlib.contextmanager
def _ends_within(seconds: float) -> Iterator[None]:
    """End this process with code 1 if the block takes longer, whatever it hangs in."""

    def end() -> None:
        who = f"rank {launched_rank()} on {socket.gethostname()}"
        print(f"finemask: {who} ends after {seconds:g} s without an answer", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
