"""SIGTERM to one rank that trains: all save after the same step and end with 143; at any other time it ends at once."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finemask_ds.engine.damage import newest_step
from finemask_ds.engine.termination import Termination
from tests.conftest import REPOSITORY
from tests.pool import free_port

LAUNCHED = """
import contextlib, io, time
from finemask_ds.config import TamtConfig
from finemask_ds.session import launch, leave

def action(config):
    print("prepares", flush=True)
    with contextlib.redirect_stderr(io.StringIO()):  # As while a model is loaded.
        time.sleep(60)

leave(launch(TamtConfig, action, []))
"""


def start_ranks(model: Path, text: Path, run: Path, size: int = 2) -> list[subprocess.Popen[str]]:
    """A search that would take hours, on plain processes without a launcher, as srun starts them."""
    command = [
        sys.executable, "launcher/tamt.py", "--deepspeed", "configs/ds/zero2.json", "--model", str(model),
        "--data", str(text), "--run", str(run), "--seq_len", "16", "--batch_size", "8", "--steps", "100000",
        "--save_every", "10", "--eval_every", "0", "--objective", "kd",
    ]  # fmt: skip
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    return [
        subprocess.Popen(
            command, cwd=REPOSITORY, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env={**os.environ, **address, "DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]  # fmt: skip


@pytest.mark.slow
def test_one_rank_that_is_asked_to_end_makes_all_save_and_end(toy_bert: Path, toy_text: Path, tmp_path: Path) -> None:
    """Also where the scheduler and the launcher both ask."""
    processes, checkpoints = start_ranks(toy_bert, toy_text, tmp_path / "run"), tmp_path / "run/checkpoints"
    try:
        deadline = time.monotonic() + 120
        while newest_step(checkpoints) < 10:
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() < deadline
            time.sleep(0.02)
        processes[1].send_signal(signal.SIGTERM)
        processes[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [Termination().exit_code, Termination().exit_code]
    (told,) = re.findall(r"^finemask: SIGTERM: .*$", said[0], re.M)
    assert told.endswith(f" in {checkpoints}; the same command goes on")
    assert f" step {newest_step(checkpoints)} " in told
    assert "finemask" not in said[1]


@pytest.mark.slow
def test_where_nothing_trains_it_ends_at_once_and_says_what_stays() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHED], cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "prepares\n"
        process.terminate()
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == Termination().exit_code
    assert said.startswith(f"finemask: SIGTERM: ended on {socket.gethostname()} outside of training; what is done ")


def test_where_no_launcher_asked_for_it_signals_are_left_alone() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    assert not Termination.current().asked
    with Termination().handling():
        first = Termination.current()
        assert Termination.current() is first
        with first.training():
            assert not first.asked
    assert signal.getsignal(signal.SIGTERM) == handler
    assert Termination.current() is not first


@pytest.mark.parametrize("ignored", [signal.SIGTERM, signal.SIGINT])
def test_it_is_found_by_the_signal_that_is_not_ignored(ignored: signal.Signals) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in before:
            signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)
        termination = Termination()
        with termination.handling():
            assert Termination.current() is termination
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT])
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal that is not ignored, as Ctrl-C is where the tests run in the background."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_while_the_ranks_train_it_is_only_remembered(number: signal.Signals) -> None:
    termination = Termination()

    def train() -> None:
        with termination.training():
            os.kill(os.getpid(), number)
            deadline = time.monotonic() + 20
            while not termination.asked and time.monotonic() < deadline:
                time.sleep(0.01)
            raise InterruptedError

    with termination.handling(), pytest.raises(InterruptedError):
        train()
    assert termination.asked
    assert termination.exit_code == 128 + number


def test_a_signal_that_is_ignored_stays_so(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    with Termination().handling():
        assert signal.getsignal(number) == signal.SIG_IGN
