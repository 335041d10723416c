"""A worker whose cells take no torch: what each does stands in its options."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finemask_ds.commands.sweep import add_worker_arguments, run_worker
from finemask_ds.errors import UserError
from finemask_ds.run import write_json
from finemask_ds.signals import Interrupted, Interruption


def run_cell(options: Mapping[str, Any], folder: Path, interruption: Interruption) -> None:
    """Note the start, do as the options say, leave a result that tells where it ran."""
    start, number = time.monotonic(), int(folder.name.removeprefix("attempt-"))
    diary = folder.parent / "diary"
    note(diary, f"start {number} {time.time_ns()}")
    write_json(folder / "config.json", {"task": options["task"]})
    kind = options.get("do", "")
    if number in options.get("on", [number]):
        act(kind, options, folder)
    if kind == "save":
        with interruption.deferred():
            save_when_asked(options["seconds"], folder, interruption)
    deadline = start + options.get("seconds", 0)
    while time.monotonic() < deadline or (kind == "hold" and not (folder.parents[2] / "go").exists()):
        time.sleep(0.02)
    found = sorted(path.name for path in (folder / "checkpoints").glob("*"))
    write_json(folder / "result.json", {
        "task": options["task"], "score": 0.5, "metric": "accuracy", "seconds": time.monotonic() - start,
        "cores": sorted(os.sched_getaffinity(0)), "environment": dict(os.environ), "pid": os.getpid(),
        "torch": "torch" in sys.modules, "attempt": number, "checkpoints": found,
    })  # fmt: skip
    note(diary, f"end {number} {time.time_ns()}")


def act(kind: str, options: Mapping[str, Any], folder: Path) -> None:
    if kind == "fail":
        raise ArithmeticError("the loss\nis [bold]NaN[/bold]")
    if kind == "refuse":
        raise UserError("there is no column label; type --data FOLDER")
    if kind == "die":
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / f"step-{folder.name}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "leave":
        os._exit(0)
    if kind == "half":
        (folder / "result.json").write_text('{"task": "mrpc", "sco')
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "child":
        if (child := os.fork()) == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        (folder.parent / "child").write_text(str(child))


def save_when_asked(seconds: float, folder: Path, interruption: Interruption) -> None:
    while not interruption.asked:
        time.sleep(0.02)
    time.sleep(seconds)
    (folder / "saved").touch()
    raise Interrupted(interruption.signal)


def measure_cell(options: Mapping[str, Any]) -> float:
    if options.get("do") == "unmeasurable":
        raise UserError("there is no training file in data/MRPC; type --data FOLDER")
    return 100.0


def note(diary: Path, line: str) -> None:
    with open(diary, "a") as stream:
        stream.write(line + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_worker_arguments(parser)
    try:
        sys.exit(run_worker(parser.parse_args(), run_cell, measure_cell))
    except UserError as error:
        print(f"finemask: {error}", file=sys.stderr)
        print(json.dumps(sys.argv), file=sys.stderr)
        sys.exit(2)
