"""build_once with real processes: once, after a kill, after a failure."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from finemask_ds.data.once import build_once
from finemask_ds.errors import UserError

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(3, mp_context=SPAWN) as pool:
        yield pool


class Build:
    """Logs its call, waits until `ask` was called often enough, works for a while, writes or fails."""

    def __init__(self, log: Path, seconds: float = 0.0, error: str = "", asked: int = 1) -> None:
        self.log, self.seconds, self.error, self.asked = log, seconds, error, asked

    def __call__(self, folder: Path) -> None:
        (folder / "half").touch()
        write_line(self.log, "built")
        while self.log.read_text().count("asked") < self.asked:
            time.sleep(0.02)
        time.sleep(self.seconds)
        if self.error:
            raise UserError(self.error)
        (folder / "text").write_text("whole")

    def count(self) -> int:
        return self.log.read_text().count("built") if self.log.exists() else 0


def write_line(log: Path, line: str) -> None:
    with open(log, "a") as stream:
        stream.write(line + "\n")


def ask(folder: Path, build: Build, stale_sec: float) -> str:
    write_line(build.log, "asked")
    try:
        return (build_once(folder, build, stale_sec=stale_sec) / "text").read_text()
    except UserError as error:
        return f"UserError: {error}"


@pytest.mark.slow
def test_three_at_once_build_once_though_it_takes_longer_than_silence_may(processes, tmp_path):
    build = Build(tmp_path / "log", seconds=2.2, asked=3)
    asked = [processes.submit(ask, tmp_path / "folder", build, 1.6) for _ in range(3)]
    assert [future.result(60) for future in asked] == ["whole"] * 3
    assert build.count() == 1
    assert sorted(os.listdir(tmp_path)) == ["folder", "log"]


def test_a_killed_builder_is_taken_over(processes, tmp_path):
    build = Build(tmp_path / "log", asked=2)
    killed = SPAWN.Process(target=ask, args=(tmp_path / "folder", Build(build.log, seconds=600), 1.0))
    killed.start()
    while build.count() == 0:
        time.sleep(0.02)
    waiting = processes.submit(ask, tmp_path / "folder", build, 1.0)
    time.sleep(1.5)
    assert not waiting.done()
    assert build.count() == 1
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert waiting.result(60) == "whole"
    assert build.count() == 2
    assert sorted(os.listdir(tmp_path)) == ["folder", "log"]


def test_a_failing_builder_fails_all_and_the_next_command_starts_afresh(processes, tmp_path):
    build = Build(tmp_path / "log", seconds=1.0, error="there is no text; type --data FOLDER", asked=3)
    asked = [processes.submit(ask, tmp_path / "folder", build, 60.0) for _ in range(3)]
    assert [future.result(60) for future in asked] == ["UserError: there is no text; type --data FOLDER"] * 3
    assert build.count() == 1
    assert ask(tmp_path / "folder", Build(tmp_path / "log"), 60.0) == "whole"


def test_any_other_error_is_the_builders_own_and_leaves_nothing_half_built(tmp_path):
    def build(folder: Path) -> None:
        (folder / "half").touch()
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        build_once(tmp_path / "folder", build)
    assert not [name for name in os.listdir(tmp_path) if name != "folder.failed.json"]


def test_a_folder_that_someone_half_deleted_is_built_again(tmp_path):
    build = Build(tmp_path / "log", asked=0)
    build_once(tmp_path / "folder", build)
    (tmp_path / "folder" / "done").unlink()
    assert (build_once(tmp_path / "folder", build) / "text").read_text() == "whole"


def test_a_cache_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="FINEMASK_CACHE"):
        build_once(tmp_path / "file" / "folder", Build(tmp_path / "log"))
