"""The supervisor on one machine: it starts again after a failure, not after bad input, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from finemask_ds import hostprocess
from finemask_ds.config import TamtConfig
from finemask_ds.engine.base import Batching
from finemask_ds.errors import UserError
from finemask_ds.supervise import _micro_batch, _usable, supervise, without_options
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


@pytest.mark.parametrize(
    ("batch", "left", "asked", "size"), [(256, 4, 8, 32), (48, 3, 4, 8), (16, 1, 16, 1), (14, 7, 14, 1)]
)
def test_fewer_ranks_take_no_larger_micro_batches(batch: int, left: int, asked: int, size: int) -> None:
    assert _micro_batch(batch, left, asked) == size
    Batching.of(batch, size, left)


def test_a_rank_is_told_how_to_type_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"type python launcher/tamt\.py with python in front"):
        supervise(TamtConfig(max_restarts=1), ["launcher/tamt.py"])
    monkeypatch.delenv("RANK")
    with pytest.raises(UserError, match="type --deepspeed"):
        supervise(TamtConfig(max_restarts=1), ["launcher/tamt.py"])


@pytest.mark.slow
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


RANK = """
import os, signal, sys, time
from pathlib import Path

def end(*_):
    (folder / f"saved-{rank}").touch()
    sys.exit(143)

*_, how, folder = sys.argv[:4]
folder, rank = Path(folder), os.environ["RANK"]
signal.signal(signal.SIGTERM, end)
with open(folder / f"starts-{rank}", "a") as stream:
    stream.write("x")
starts = (folder / f"starts-{rank}").stat().st_size
if how == "bad input":
    sys.exit(2)
if how == "passing trouble":
    sys.exit(0 if starts == 2 else 75)
if how == "faults" and starts == 3:
    sys.exit(0)
if how == "faults" and starts == 1 and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "faults" and starts == 2 and rank == "0":
    os.kill(os.getppid(), signal.SIGKILL)
time.sleep(100)
"""
SUPERVISOR = """
import sys
from finemask_ds.config import TamtConfig
from finemask_ds.supervise import supervise
sys.exit(supervise(TamtConfig(deepspeed="x", ranks=2, max_restarts=3), sys.argv[1:]))
"""


@contextmanager
def supervised(how: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The supervisor over two ranks that are no search but end in some way, at their first, second and third start."""
    (folder / "rank.py").write_text(RANK)
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(folder / "rank.py"), how, str(folder)], cwd=REPOSITORY, text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()
    assert not [pid for pid in filter(str.isdecimal, os.listdir("/proc")) if names(pid, folder)]


def names(pid: str, folder: Path) -> bool:
    """Whether a process's command line names a folder."""
    try:
        return str(folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


@pytest.mark.slow
def test_what_fails_is_started_again(tmp_path: Path) -> None:
    """A rank that is killed; and the launcher itself, which then leaves its ranks behind and has exit code 0."""
    with supervised("faults", tmp_path) as process:
        _, told = process.communicate(timeout=200)
        assert process.returncode == 0, told
    assert [(tmp_path / f"starts-{rank}").read_text() for rank in (0, 1)] == ["xxx", "xxx"]
    assert "finemask: the launch ended with code 247\nfinemask: restart 1 of 3 in 2 s\n" in told
    assert "finemask: the launch ended with code 1\nfinemask: restart 2 of 3 in 4 s\n" in told


@pytest.mark.slow
def test_bad_input_is_not_tried_again(tmp_path: Path) -> None:
    with supervised("bad input", tmp_path) as process:
        _, told = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "restart" not in told
    assert (tmp_path / "starts-0").read_text() == "x"


@pytest.mark.slow
def test_what_may_go_well_the_next_time_is_tried_again(tmp_path: Path) -> None:
    with supervised("passing trouble", tmp_path) as process:
        _, told = process.communicate(timeout=100)
    assert process.returncode == 0, told
    assert (tmp_path / "starts-0").read_text() == "xx"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_supervisor_that_is_asked_to_end_lets_all_ranks_save_and_ends_everything(
    tmp_path: Path, number: signal.Signals
) -> None:
    with supervised("wait", tmp_path) as process:
        deadline = time.monotonic() + 100
        while not all((tmp_path / f"starts-{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    assert all((tmp_path / f"saved-{rank}").exists() for rank in (0, 1))
