"""Two files of a benchmark compared, as it is typed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finemask_ds.run import read_json
from tests.conftest import REPOSITORY

SPEED, SELECTION = (REPOSITORY / "results" / name for name in ("speed.json", "selection.json"))
OURS, DENSE, NAIVE = (f"builtin-1r-zero2/{method}" for method in ("tamt-mlm", "dense", "naive"))


def compare(old: Path, new: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "benchmarks/compare.py"), str(old), str(new)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def changed(source: Path, target: Path, factors: dict[tuple[str, str], float | None]) -> Path:
    """The file with these figures (cell, start of their name) times a factor; None: gone, with "" the whole cell."""
    value = read_json(source)
    for (name, start), factor in factors.items():
        cell = value["cells"][name]
        value["cells"][name] = {
            key: one if not key.startswith(start) else one * (factor or 0)
            for key, one in cell.items() if factor is not None or not key.startswith(start)
        }  # fmt: skip
        if factor is None and not start:
            del value["cells"][name]
    target.write_text(json.dumps(value))
    return target


@pytest.mark.parametrize(
    ("source", "factors", "code", "said"),
    [
        (SPEED, {}, 0, "0 regression(s)"),
        (SPEED, {(OURS, "step_sec"): 2.0}, 1, "REGRESSION"),
        (SPEED, {(OURS, "step_sec"): 0.5}, 0, "1 improvement(s)"),
        (SPEED, {(DENSE, "step_sec"): 2.0, (NAIVE, "step_sec"): 2.0, (NAIVE, "tokens_per_sec"): 0.5}, 0,
         "0 regression(s)"),
        (SPEED, {(OURS, "ratio_to_naive"): 2.0}, 1, "REGRESSION"),
        (SELECTION, {("cold-10M-local", "kthvalue_sec"): 2.0}, 0, "0 regression(s)"),
        (SELECTION, {("cold-10M-local", "select_sec"): 2.0}, 1, "REGRESSION"),
        (SPEED, {(OURS, "step_sec"): None}, 1, f"missing: {OURS}: step_sec"),
        (SPEED, {(DENSE, ""): None}, 1, f"missing: {DENSE}"),
    ],
)  # fmt: skip
def test_what_got_worse_or_is_missing_is_the_exit_code(tmp_path, source, factors, code, said):
    ended = compare(source, changed(source, tmp_path / "new.json", factors))
    assert (ended.returncode, ended.stderr) == (code, "")
    assert said in ended.stdout
    assert (code == 0) == ("0 regression(s)" in ended.stdout and ", 0 missing" in ended.stdout)


def test_a_new_file_without_cells_is_no_success(tmp_path):
    (tmp_path / "new.json").write_text('{"made": {}, "cells": {}}')
    assert compare(SELECTION, tmp_path / "new.json").returncode == 1
    assert compare(tmp_path / "new.json", SELECTION).returncode == 0


@pytest.mark.parametrize("text", [None, "{", "[]", '{"cells": 3}', '{"cells": {"a": 3}}', '{"kind": "finetune"}'])
def test_what_is_no_file_of_a_benchmark_is_one_sentence(tmp_path, text):
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text)
    for files in ((path, SPEED), (SPEED, path)):
        ended = compare(*files)
        assert (ended.returncode, ended.stdout) == (2, "")
        (line,) = ended.stderr.splitlines()
        assert str(path) in line
