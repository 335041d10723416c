"""`finemask doctor` and its ranks as real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finemask_ds.config import DoctorConfig
from finemask_ds.doctor.cluster import options_of
from finemask_ds.options import parse
from tests.conftest import REPOSITORY
from tests.pool import free_port
from tests.test_launchers import ENVIRONMENT


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], cwd=REPOSITORY, env={**os.environ, **ENVIRONMENT, **environment}, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip


def doctor(*options: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "finemask_ds", "doctor", *options, **environment)


def levels(output: str) -> dict[str, str]:
    return {
        line.split()[1].rstrip(":"): line.split()[0]
        for line in output.splitlines()
        if line[:3] in ("ok ", "not", "bad")
    }


def test_this_machine(tmp_path: Path) -> None:
    told = doctor("--run", tmp_path / "not" / "yet", "--data", "builtin")
    assert (told.returncode, told.stderr) == (0, ""), told.stdout
    seen = levels(told.stdout)
    assert {"ranks", "versions", "devices", "memory", "disk", "--run", "cache"} <= seen.keys()
    assert "bad" not in seen.values()
    assert f"--run: {tmp_path} can be written" in told.stdout
    assert list(tmp_path.iterdir()) == [], "looking leaves nothing behind"


def test_what_is_bad_is_the_exit_code(tmp_path: Path) -> None:
    told = doctor("--ranks", "4", "--data", tmp_path / "none", "--deepspeed", tmp_path / "none.json")
    assert told.returncode == 1
    seen = levels(told.stdout)
    assert {what for what, level in seen.items() if level == "bad"} == {"ranks", "--data", "--deepspeed"}
    assert told.stdout.splitlines()[-1].endswith(" 3 bad")


def test_a_hostfile_that_cannot_be_is_the_users_error(tmp_path: Path) -> None:
    told = doctor("--hostfile", tmp_path / "none")
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith("finemask: hostfile ")


@pytest.mark.slow
def test_two_ranks_under_deepspeeds_launcher(tmp_path: Path, toy_bert: Path, toy_text: Path) -> None:
    told = run(
        "deepspeed", "--log_level", "error", "--num_gpus", "2", "--master_port", free_port(), "launcher/doctor.py",
        "--ranks", "2", "--run", tmp_path, "--model", toy_bert, "--data", toy_text, "--deepspeed",
        "configs/ds/zero2_fp16.json",
    )  # fmt: skip
    assert told.returncode == 0, told.stdout + told.stderr
    seen = levels(told.stdout)
    assert "bad" not in seen.values()
    assert {"all-reduce", "addresses", "precision", "--model", "--data", "--run"} <= seen.keys()
    assert "right on all ranks" in told.stdout
    assert "for which this cpu has no fast arithmetic" in told.stdout
    assert "the ranks listen on 127.0.0.1 only" in told.stdout


@pytest.mark.slow
def test_a_rank_that_never_comes_ends_the_others_in_time(tmp_path: Path) -> None:
    told = run(
        sys.executable, "launcher/doctor.py", "--time_out_sec", "8", "--run", tmp_path, RANK="0", LOCAL_RANK="0",
        WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()),
    )  # fmt: skip
    assert told.returncode == 1
    assert "ends after 8 s without an answer" in told.stderr


def test_the_ranks_get_the_options_that_were_typed():
    config = DoctorConfig(ranks=4, run="a b; c", data="wikitext-103")
    assert parse(DoctorConfig, options_of(config)) == config
    assert options_of(DoctorConfig()) == []


def test_a_file_is_no_folder_to_write_to(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    told = doctor("--run", tmp_path / "taken")
    assert f"--run: {tmp_path / 'taken'} cannot be written" in told.stdout
    assert told.returncode == 1
