#!/usr/bin/env python
"""Faults of a training run on two hosts, each kind many times at random moments, counted in a tally that goes on.

    python benchmarks/soak.py --count 20

A trial is a toy search by a rank on each of two hosts (namespaces with an sshd, see tests/cluster/hosts.py; root and
pdsh are needed) under the plain deepspeed launcher, a fault at a random moment after the ranks' first word, and the
same command again. It is good where within a minute every rank and the launcher are gone (a clock that jumps must end
nothing, a cable that is healed need not), the log names the rank and host that failed (or the cause), no process of the
run is left on any host, a bystander that DeepSpeed's own pkill would have ended lives, and the continued run finds the
undisturbed run's mask, bit for bit. The kind with the fewest trials comes next; Ctrl-C loses the trial under way only.
Writes results/soak.json.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finemask_ds.provenance import collect
from finemask_ds.recipes.stages import REPOSITORY
from finemask_ds.report.table import markdown
from finemask_ds.run import read_json, write_json

sys.path.insert(0, str(REPOSITORY))
from benchmarks.common import machine
from tests.cluster.faults import FAULTS, Scene, as_json, try_fault
from tests.cluster.hosts import Hosts
from tests.toys import write_bert, write_text

TALLY = REPOSITORY / "results/soak.json"
DISK_MIB = 64


def main(argv: Sequence[str] | None = None) -> None:
    options = _parse(argv)
    trials: list[dict[str, Any]] = read_json(TALLY)["trials"] if TALLY.exists() else []
    made = collect()
    origin = {"commit": made["code"]["commit"], "machine": machine(made)}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # So that the hosts are taken down.
    try:
        if not options.table:
            with _scene() as scene:
                _fill(scene, options, trials, origin)
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
    print(table(trials))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=list(FAULTS), default=list(FAULTS), help="of faults")
    parser.add_argument("--count", type=int, default=20, help="trials of each kind in the end")
    parser.add_argument("--only", type=int, default=0, help="trials of this call; 0: until all are there")
    parser.add_argument("--table", action="store_true", help="only show what is counted")
    return parser.parse_args(argv)


def _fill(scene: Scene, options: argparse.Namespace, trials: list[dict[str, Any]], origin: dict[str, str]) -> None:
    """Try the kind with the fewest trials, again and again, and write the tally after each."""
    left = options.only or options.count * len(FAULTS)
    while left:
        done = Counter(trial["kind"] for trial in trials)
        kind = min(options.kinds, key=lambda kind: done[kind])
        if done[kind] >= options.count:
            return
        # A moment after the run's end is no trial; the next seed draws another.
        seed = 1 + max((trial["seed"] for trial in trials if trial["kind"] == kind), default=0)
        outcome = None
        while outcome is None:
            outcome = try_fault(scene, kind, seed, scene.folder / f"{kind.replace(' ', '-')}-{seed}.log")
            seed += 1
        trials.append({**as_json(outcome), **origin})
        write_json(TALLY, {"command": "python benchmarks/soak.py --count 20", "trials": trials})
        print(json.dumps(trials[-1]), flush=True)
        left -= 1


@contextmanager
def _scene() -> Iterator[Scene]:
    """Two hosts, a small disk that they see, and the undisturbed search."""
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        folder = Path(temporary)
        disk = folder / "disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(disk)], check=True)
        try:
            hosts = Hosts.up(2, folder / "hosts")
            try:
                model, text = write_bert(folder / "bert"), write_text(folder / "text")
                scene = Scene(hosts, model, text, folder, ("--steps", "80"), disk)
                scene.find_undisturbed()
                yield scene
            finally:
                hosts.down()
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


def table(trials: Sequence[dict[str, Any]]) -> str:
    """A line for each kind."""
    rows = []
    for kind in FAULTS:
        of_kind = [trial for trial in trials if trial["kind"] == kind]
        if not of_kind:
            continue
        seconds = [trial["gone_sec"] for trial in of_kind if trial["gone_sec"] is not None]
        counts = [sum(bool(trial[name]) for trial in of_kind) for name in ("good", "named", "bystanders", "equal")]
        orphans = sum(trial["orphans"] for trial in of_kind)
        took = f"{statistics.median(seconds):.0f} ({max(seconds):.0f})" if seconds else "-"
        rows.append([kind, str(len(of_kind)), *map(str, counts), str(orphans), took])
    return markdown(
        ["fault", "trials", "good", "named", "bystanders live", "mask equal", "orphans", "gone after s (longest)"], rows
    )


if __name__ == "__main__":
    main()
