"""How a machine is cut into slots."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finemask_ds.dispatch.local import Slot, environment, layout, usable_cores, visible_gpus
from finemask_ds.errors import UserError


def test_slots_are_gpus_else_cores():
    assert layout(0, [4, 5, 6], []) == [Slot((4,)), Slot((5,)), Slot((6,))]
    assert layout(0, [0, 1, 2, 3], ["0", "1"]) == [Slot((0, 1), "0"), Slot((2, 3), "1")]
    assert layout(1, [0, 1, 2], []) == [Slot((0, 1, 2))]
    assert layout(2, [0, 1, 2, 3, 4], []) == [Slot((0, 1)), Slot((2, 3))]
    assert layout(3, [0, 1], []) == [Slot((0,)), Slot((1,)), Slot((0,))]
    assert layout(3, [0, 1], ["0", "1"]) == [Slot((0,), "0"), Slot((1,), "1"), Slot((0,), "0")]
    assert layout(0, [0], ["0", "1"]) == [Slot((0,), "0"), Slot((0,), "1")]
    with pytest.raises(UserError, match="--slots -1 must not be negative"):
        layout(-1, [0], [])


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-a)'\necho '  MIG 1g Device 0: (UUID: MIG-b)'\n"
                      "echo 'GPU 1: NVIDIA H200 (UUID: GPU-c)'\n")  # fmt: skip
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("asked", "gpus"), [(None, ["0", "1"]), ("1", ["1"]), ("GPU-c, 0", ["GPU-c", "0"]), ("", []), ("-1", [])]
)
def test_gpus_are_those_a_process_may_use(asked, gpus):
    assert visible_gpus({} if asked is None else {"CUDA_VISIBLE_DEVICES": asked}) == gpus


def test_without_nvidia_smi_there_are_no_gpus(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0"}) == []


def test_a_quota_of_processor_time_limits_the_cores(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    assert usable_cores(tmp_path) == cores, "no control groups"
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path) == cores
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert usable_cores(tmp_path) == cores[:1]
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores(tmp_path) == cores
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("100000\n")
    assert usable_cores(tmp_path) == cores[:1]


def test_a_worker_sees_its_gpu_and_its_threads():
    outer = {"PATH": "p", "OMP_NUM_THREADS": "64", "CUDA_VISIBLE_DEVICES": "0,1", "PMIX_RANK": "1", "HF_HOME": "h"}
    inner = environment(outer, Slot((2, 3), "1"))
    assert inner["CUDA_VISIBLE_DEVICES"] == "1"
    assert inner["OMP_NUM_THREADS"] == "2"
    assert inner["HF_HOME"] == "h"
    assert "PMIX_RANK" not in inner
    assert environment(outer, Slot((2,)))["CUDA_VISIBLE_DEVICES"] == "0,1"
