"""What is handed to Slurm, and what the end of a task means; Slurm itself runs in tests/cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from finemask_ds import hostprocess
from finemask_ds.config import SweepConfig
from finemask_ds.config.search import MagnitudeConfig
from finemask_ds.dispatch import slurm_queue
from finemask_ds.dispatch.attempt import attempts_of, claim
from finemask_ds.dispatch.plan import Cell, Plan
from finemask_ds.dispatch.slurm_ends import has_begun, is_barren, settle
from finemask_ds.dispatch.slurm_jobs import (
    Submission,
    array_options,
    array_script,
    checked_options,
    logs_of,
    read_submissions,
    tidy_script,
    write_submissions,
)
from finemask_ds.dispatch.worker import alone
from finemask_ds.downstream import executor_of, sweep_options
from finemask_ds.errors import UserError
from finemask_ds.options import parse
from finemask_ds.run import write_json
from tests.dispatch.toys import cell

ODD = 'it\'s 100% x; $(touch oops) "a" & b'
TELL = (sys.executable, "-c", "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))")


def told_by(script: str, folder: Path, **variables: str) -> tuple[list[str], Mapping[str, str]]:
    """Arguments and environment of what a script runs, which bash ends in."""
    ended = subprocess.run(
        ["bash"], input=script, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    arguments, environment = json.loads(ended.stdout)
    return arguments, environment


def test_a_task_runs_its_own_cell_whatever_the_folder_is_called(tmp_path: Path) -> None:
    plan = Plan.write(tmp_path / ODD, [cell("one"), cell("t.w+o-2")])
    submission = Submission.new(["t.w+o-2", "one"], [0, 3])
    script = array_script(plan, submission, TELL, "export TOLD='by the set-up'\ncd .")
    for index, name in enumerate(submission.cells):
        numbers = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": str(index), "SLURM_CPUS_ON_NODE": "7"}
        arguments, environment = told_by(script, tmp_path, **numbers)
        assert arguments == [
            str(plan.root), "--cell", name, "--job", submission.task(index),
            "--log", f"{plan.root}/logs/slurm-12_{index}.log",
        ]  # fmt: skip
        assert environment["TOLD"] == "by the set-up"
        assert environment["OMP_NUM_THREADS"] == "7"
    assert told_by(tidy_script([*TELL, ODD, "--wait", "tidy"], ""), tmp_path)[0] == [ODD, "--wait", "tidy"]
    assert not (tmp_path / "oops").exists()


def test_slurm_writes_logs_where_the_worker_says_it_does(tmp_path: Path) -> None:
    plan = Plan(tmp_path / "100%j", ())
    assert logs_of(plan, "%A_%a") == f"{tmp_path}/100%%j/logs/slurm-%A_%a.log"
    with pytest.raises(UserError, match=r"no log under a name with a backslash .* type another --run$"):
        logs_of(Plan(tmp_path / "a\\b", ()), "%A_%a")


def test_options_reach_sbatch_as_they_are_and_ours_are_refused() -> None:
    assert checked_options(["gres=gpu:1", "cpus_per_task=4", "comment=a; b", "exclusive=", "time=1-0"]) == [
        "--gres=gpu:1", "--cpus-per-task=4", "--comment=a; b", "--exclusive", "--time=1-0",
    ]  # fmt: skip
    for option in ("array=0-9", "dependency=afterok:1", "output=x", "arr=0-9", "no_requeue=", "wait=", "clusters=b"):
        with pytest.raises(UserError, match=rf"^--job_options {option}: dispatch sets --.* itself; leave it out$"):
            checked_options([option])
    submission = Submission.new(["one", "two", "three"], [0, 0, 0])
    assert array_options(submission, 2, ["--time=1"], "x")[0] == "--array=0-2%2"
    options = array_options(submission, 0, ["--signal=B:TERM@300"], "x")
    assert options[0] == "--array=0-2"
    assert [one for one in options if "signal" in one][-1] == "--signal=B:TERM@300", "the last one counts"


def test_what_was_submitted_is_found_again(tmp_path: Path) -> None:
    plan = Plan.write(tmp_path, [cell("one")])
    assert read_submissions(plan) == []
    written = [Submission.new(["one"], [2]), Submission("finemask-0", ("one",), (0,), "12")]
    write_submissions(plan, written)
    assert read_submissions(plan) == written
    before = {"name": "finemask-0", "cells": ["one"], "attempts": [0], "job": "12"}  # before small jobs were recorded
    write_json(tmp_path / "slurm" / "jobs.json", [before])
    assert read_submissions(plan) == written[1:]
    for broken in ('{"a": 1}', "[1]", '[{"name": "a"}]'):
        (tmp_path / "slurm" / "jobs.json").write_text(broken)
        with pytest.raises(UserError, match=r"jobs\.json is no record .* cancel the plan's jobs and delete it$"):
            read_submissions(plan)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan.write(tmp_path, [cell("one"), cell("two")], retries=5)


def begin(plan: Plan, one: Cell, job: str) -> Path:
    """An attempt that a job has begun and, by its lock, not ended; its folder."""
    claimed = claim(plan.folder(one), one.task, attempts_of(plan.folder(one)), job=job)
    assert claimed is not None
    return claimed.attempt.folder


def errors(plan: Plan, one: Cell) -> list[str | None]:
    return [(attempt.failure() or {}).get("error") for attempt in attempts_of(plan.folder(one))]


def test_every_end_of_a_task_counts_once(plan: Plan) -> None:
    array, (one, two) = Submission("finemask-0", ("one", "two"), (0, 0), "12"), plan.cells
    assert is_barren(plan, array)
    folder = begin(plan, one, array.task(0))
    assert has_begun(plan, array)
    assert not is_barren(plan, array)
    for _ in range(2):
        settle(plan, array, 0, "12_0", "OUT_OF_MEMORY")
        settle(plan, array, 1, "12_1", "")
    assert errors(plan, one) == [
        "Slurm's job 12_0 ended as OUT_OF_MEMORY without leaving a word: killed, or its node is gone"
    ]
    assert errors(plan, two) == ["Slurm's job 12_1 has left the queue before it had begun the cell"]
    assert not list(plan.root.rglob("lock"))
    assert json.loads((folder / "failed.json").read_text())["attempt"] == 1


def test_who_was_asked_to_end_and_has_saved_is_no_failure(plan: Plan) -> None:
    array, one = Submission("finemask-0", ("one",), (0,), "12"), plan.cells[0]

    def ended_tidily(saved: bool, state: str) -> str | None:
        folder = begin(plan, one, array.task(0))
        older = folder / "attempt.json"
        os.utime(older, (older.stat().st_mtime - 10,) * 2)
        (folder / "checkpoints/step-5").mkdir(parents=True)
        if not saved:  # taken over from the attempt before
            os.utime(folder / "checkpoints/step-5", (older.stat().st_mtime - 10,) * 2)
        (folder / "lock").unlink()
        settle(plan, array, 0, "12_0", state)
        return errors(plan, one)[-1]

    assert ended_tidily(True, "TIMEOUT") is None
    assert ended_tidily(True, "COMPLETED") is None
    assert ended_tidily(False, "TIMEOUT") == (
        "Slurm's job 12_0 ended as TIMEOUT before the cell had saved anything: give it more time, as --job_options "
        "time=04:00:00"
    )
    assert ended_tidily(True, "CANCELLED") == "Slurm's job 12_0 ended as CANCELLED: somebody has cancelled it"


def test_a_task_whose_cell_is_done_or_tried_by_others_is_nobodys_fault(plan: Plan) -> None:
    array, (one, two) = Submission("finemask-0", ("one", "two"), (0, 0), "12"), plan.cells
    write_json(plan.folder(one) / "result.json", {"task": "mrpc", "score": 0.5})
    begin(plan, two, "finemask-other_0")
    assert not is_barren(plan, array)
    for index in range(2):
        settle(plan, array, index, f"12_{index}", "COMPLETED")
    assert (errors(plan, one), errors(plan, two)) == ([], [None])


def test_a_result_that_was_not_published_any_more_counts(plan: Plan) -> None:
    array, one = Submission("finemask-0", ("one",), (0,), "12"), plan.cells[0]
    write_json(begin(plan, one, array.task(0)) / "result.json", {"task": "mrpc", "score": 0.5})
    settle(plan, array, 0, "12_0", "FAILED")
    assert (plan.folder(one) / "result.json").exists()
    assert errors(plan, one) == [None]


def test_a_process_that_works_alone_knows_of_no_launcher() -> None:
    kept = {"SLURM_JOB_ID": "1", "SLURM_CPUS_ON_NODE": "2", "PATH": "/bin"}
    told = {"RANK": "1", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "PMI_RANK": "1"}
    assert alone({**kept, **told}) == kept


def test_bad_input_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SweepConfig(executor="slurm", masks=("m",))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^there is no sbatch on the PATH of .*: dispatch where Slurm"):
        executor_of(config)
    for name in ("sbatch", "squeue", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(UserError, match=r"^cannot read --job_setup .*nowhere .*: type a file of shell lines$"):
        executor_of(SweepConfig(executor="slurm", masks=("m",), job_setup=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"^--after 12; rm is no number of a job; squeue --me shows them$"):
        executor_of(SweepConfig(executor="slurm", masks=("m",), after="12; rm"))
    assert executor_of(config).waits


def test_a_search_inside_a_job_does_not_wait_for_its_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MagnitudeConfig(dispatch="slurm", slots=3, job_options=("gres=gpu:1", "time=1"), job_setup="a b.sh")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    outside = parse(SweepConfig, sweep_options(config, "run"))
    assert (outside.executor, outside.wait, outside.slots) == ("slurm", "yes", 3)
    assert (outside.job_options, outside.job_setup) == (config.job_options, "a b.sh")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    inside = parse(SweepConfig, sweep_options(config, "run"))
    assert (inside.wait, inside.after) == ("no", "12")


def test_a_job_bears_no_mark_of_the_launch_that_submits_it(monkeypatch):
    """By which the supervisor would end it."""
    monkeypatch.setenv(hostprocess.VARIABLE, "launch")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    told = slurm_queue._ask("env").stdout.splitlines()
    assert "SLURM_CONF=/etc/slurm.conf" in told
    assert not [line for line in told if line.startswith((hostprocess.VARIABLE, "SLURM_JOB_ID"))]
