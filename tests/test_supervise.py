"""The supervisor on one machine: it starts again after a failure, not after bad input, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from finemask_ds import hostprocess
from finemask_ds.config import TamtConfig
from finemask_ds.engine.damage import newest_step
from finemask_ds.engine.termination import EXIT_CODE
from finemask_ds.errors import UserError
from finemask_ds.supervise import _usable, supervise, without_options
from tests.conftest import REPOSITORY


def test_options_of_the_supervisor_are_taken_out_and_no_others() -> None:
    typed = ["--hostfile", "a b", "--tasks", "x", "ranks", "--ranks=4", "--run", "r", "--max_restarts", "5"]
    kept = without_options(typed, ("hostfile", "max_restarts", "ranks"))
    assert kept == ["--tasks", "x", "ranks", "--run", "r"]


@pytest.mark.parametrize(
    ("left", "batch", "micro", "chosen"),
    [
        ({"a": 8, "b": 8}, 16, 0, {"a": 8, "b": 8}),
        ({"a": 8, "b": 4}, 16, 0, {"a": 8}),
        ({"a": 1, "b": 1, "c": 1}, 16, 0, {"a": 1, "b": 1}),
        ({"a": 2, "b": 1}, 12, 4, {"a": 2, "b": 1}),
        ({"a": 2, "b": 2}, 12, 4, {"a": 2, "b": 1}),
        ({}, 16, 0, {}),
    ],
)
def test_a_restart_takes_as_many_ranks_as_the_batch_divides_by(
    left: dict[str, int], batch: int, micro: int, chosen: dict[str, int]
) -> None:
    assert _usable(left, TamtConfig(batch_size=batch, micro_batch_size=micro)) == chosen


def test_a_rank_is_told_how_to_type_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"type python launcher/tamt\.py with python in front"):
        supervise(TamtConfig(max_restarts=1), ["launcher/tamt.py"])
    monkeypatch.delenv("RANK")
    with pytest.raises(UserError, match="type --deepspeed"):
        supervise(TamtConfig(max_restarts=1), ["launcher/tamt.py"])


def test_only_the_processes_of_a_launch_are_ended(tmp_path: Path) -> None:
    """Ranks are asked first; what ignores it is killed; another launch of the same user goes on."""
    polite = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(3)); print(1, flush=True); time.sleep(60)"
    rude = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"

    def start(program: str, launch: str, **more: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, hostprocess.VARIABLE: launch, **more}
        process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    rank, stubborn, launcher = start(polite, "one", RANK="0"), start(rude, "one", RANK="1"), start(polite, "one")
    other = start(polite, "another", RANK="0")
    try:
        assert sorted(hostprocess.ranks_of("one")) == sorted([rank.pid, stubborn.pid])
        assert hostprocess.end("one", 1) == 2
        codes = [process.wait(10) for process in (rank, stubborn, launcher)]
        assert codes == [3, -signal.SIGKILL, -signal.SIGKILL]
        assert other.poll() is None
        assert hostprocess.end("one", 1) == 0
    finally:
        for process in (rank, stubborn, launcher, other):
            process.kill()
            process.wait()


def supervised(model: Path, text: Path, run: Path, log: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [
        *(sys.executable, "launcher/tamt.py", "--deepspeed", "configs/ds/zero2.json", "--ranks", "2", "--model"),
        *(str(model), "--data", str(text), "--run", str(run), "--seq_len", "16", "--batch_size", "8", "--objective"),
        *("kd", "--init", "ranked", "--mask_lr", "1e-3", "--dropout", "0", "--eval_every", "0", "--save_every", "10"),
        *("--steps", "80", "--silence_sec", "6", "--max_restarts", "3", *more),
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as stream:
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=stream, stderr=stream)


def processes_of(run: Path) -> dict[int, Sequence[bytes]]:
    """Process -> its words, of all whose command line names the run."""
    found = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(run).encode() in words:
            found[int(name)] = words
    return found


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while newest_step(run / "checkpoints") < step:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_rank_is_no_end(toy_bert: Path, toy_text: Path, tmp_path: Path) -> None:
    """Nor is the launcher's own, which leaves its ranks behind and has exit code 0."""
    run, log = tmp_path / "run", tmp_path / "log"
    process = supervised(toy_bert, toy_text, run, log)
    try:
        wait_for_step(run, 10, process, log)
        victim = next(pid for pid, words in processes_of(run).items() if b"--local_rank=1" in words)
        os.kill(victim, signal.SIGKILL)
        wait_for_step(run, newest_step(run / "checkpoints") + 10, process, log)
        told = log.read_text()
        assert f"finemask: rank 1 on {os.uname().nodename} ended without a word" in told
        assert "finemask: restart 1 of 3 in 2 s" in told
        launcher = next(pid for pid, words in processes_of(run).items() if b"deepspeed.launcher.launch" in words)
        os.kill(launcher, signal.SIGKILL)
        assert process.wait(200) == 0, log.read_text()
        assert "finemask: restart 2 of 3 in 4 s" in log.read_text()
        assert processes_of(run) == {}
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_ctrl_c_and_sigterm_save_and_end_all_and_bad_input_is_not_tried_again(
    toy_bert: Path, toy_text: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    process = supervised(toy_bert, toy_text, run, log, "--steps", "100000", "--save_every", "100000")
    try:
        deadline = time.monotonic() + 120
        while "ZeRO-2" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        time.sleep(1)
        process.terminate()
        assert process.wait(60) == EXIT_CODE, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert processes_of(run) == {}
    step = newest_step(run / "checkpoints")
    assert f"finemask: SIGTERM: checkpoint at step {step} in {run}/checkpoints" in log.read_text()
    again = supervised(toy_bert, toy_text, run, log, "--steps", "50")
    assert again.wait(100) == 2, log.read_text()
    assert "restart" not in log.read_text()
