"""Plans run by real dispatchers and workers, which are killed, interrupted and doubled; cells that need no torch."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest

from finemask_ds.cli import main
from finemask_ds.dispatch.attempt import attempts_of
from finemask_ds.dispatch.plan import Cell, Plan
from finemask_ds.dispatch.survey import State, survey
from finemask_ds.lock import lives
from tests.dispatch.fake_dispatch import COMMAND
from tests.dispatch.toys import (
    WAIT_SEC,
    cell,
    diary,
    dispatch,
    failure,
    python,
    result,
    starts,
    until,
    workers_of,
    write_mask,
)


def states(plan: Plan) -> dict[str, str]:
    return {name: str(standing.state) for name, standing in survey(Plan.read(plan.root)).standings.items()}


def test_all_is_run_once_and_again_only_what_is_missing(tmp_path):
    plan = Plan.write(tmp_path / "plan", [cell(f"cell-{number}") for number in range(4)])
    output = dispatch(plan)
    assert f"plan {plan.root}: 4 cells, 0 done, 4 to run on 2 workers of this machine, 1 core each\n" in output
    assert "\ncost: about 6 min 40 s of one worker, 3 min 20 s on 2 workers" in output
    assert output.endswith("4 of 4 cells are done, 0 failed\n")
    assert [output.count(f"cell-{number}: accuracy 0.5000 in ") for number in range(4)] == [1] * 4
    pids = {result(plan, f"cell-{number}")["pid"] for number in range(4)}
    assert len(pids) <= 2, "a worker runs cell after cell"

    (plan.root / "cells" / "cell-2" / "result.json").unlink()
    Plan.write(plan.root, [cell("new")])
    output = dispatch(plan := Plan.read(plan.root))
    assert "5 cells, 3 done, 2 to run" in output
    assert [len(starts(plan, one.id)) for one in plan.cells] == [1, 1, 2, 1, 1]
    assert "5 cells, 5 done, 0 to run" in dispatch(plan)
    assert [len(starts(plan, one.id)) for one in plan.cells] == [1, 1, 2, 1, 1]
    assert workers_of(plan) == []


@pytest.mark.slow
def test_a_failing_cell_is_retried_then_given_up_and_its_traceback_kept(tmp_path):
    cells = [cell("bad", do="fail"), cell("once", do="fail", on=[1]), cell("refused", do="refuse"), cell("good")]
    plan = Plan.write(tmp_path / "plan", cells, retries=2)
    output = dispatch(plan)
    assert states(plan) == {"bad": "failed", "once": "done", "refused": "failed", "good": "done"}
    assert starts(plan, "bad") == starts(plan, "refused") == ["1", "2", "3"]
    assert starts(plan, "once") == ["1", "2"]
    told = failure(plan, "bad", 3)
    assert told["error"] == "ArithmeticError: the loss is [bold]NaN[/bold]"
    assert told["traceback"].startswith("Traceback (most recent call last)")
    assert "in act\n" in told["traceback"]
    assert told["attempt"] == 3
    assert failure(plan, "refused", 1)["error"] == "there is no column label; type --data FOLDER"
    path = plan.root / "cells" / "bad" / "attempt-3" / "failed.json"
    assert f"bad: failed, attempt 3 of 3, given up: ArithmeticError: the loss is [bold]NaN[/bold] ({path})" in output
    assert output.endswith("2 of 4 cells are done, 2 failed\n")

    assert "4 cells, 2 done, 2 to run" in dispatch(plan)
    assert starts(plan, "bad") == [str(number) for number in range(1, 7)], "asked for again: as many attempts again"
    assert starts(plan, "good") == ["1"]


def test_workers_that_die_hard_are_replaced_and_what_they_ran_is_finished(tmp_path):
    ends = {"killed": "die", "left": "leave", "half": "half"}
    cells = [*(cell(name, do=end, on=[1]) for name, end in ends.items()), cell("good")]
    plan = Plan.write(tmp_path / "plan", cells, retries=1)
    dispatch(plan)
    assert set(states(plan).values()) == {"done"}
    for name in ends:
        assert starts(plan, name) == ["1", "2"]
        assert result(plan, name)["attempt"] == 2
        told = failure(plan, name, 1)
        assert told["traceback"] == ""
        assert told["pid"] not in (result(plan, name)["pid"], None)
        # Whoever finds it first says why: the dispatcher, or the other worker on its look for a free cell.
        assert told["error"].startswith(
            ("the worker was ended by signal 9", "the worker ended with exit", "the worker on ")
        )
    assert not (plan.root / "cells" / "killed" / "attempt-1" / "checkpoints").exists()
    assert result(plan, "killed")["checkpoints"] == ["step-attempt-1"], "handed over"
    assert not (plan.root / "cells" / "killed" / "attempt-2" / "checkpoints").exists(), "deleted after the result"


def test_a_worker_killed_from_outside_in_mid_cell(tmp_path):
    plan = Plan.write(tmp_path / "plan", [cell("held", do="hold"), cell("other")])
    process = python("fake_dispatch.py", plan.root, 1)
    until(lambda: starts(plan, "held"))
    pid = attempts_of(plan.folder(plan.cells[0]))[0].facts()["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: len(starts(plan, "held")) == 2)
    (plan.root / "go").touch()
    assert process.wait(WAIT_SEC) == 0
    # What the dispatcher sees first: its child's exit code, or a lock whose process is gone.
    assert failure(plan, "held", 1)["error"].startswith(("the worker was ended by signal 9 (SIGKILL", "the worker on "))
    assert states(plan) == {"held": "done", "other": "done"}


def test_a_worker_ends_with_0_only_where_nothing_is_free_any_more(tmp_path):
    """As Kubernetes starts an index anew unless it ends so."""
    plan = Plan.write(tmp_path / "plan", [cell("bad", do="fail"), cell("held", do="hold")], retries=0)
    worker = python("fake_worker.py", plan.root, "--job", "cells-0")
    worker.communicate(timeout=WAIT_SEC)
    assert (worker.returncode, states(plan)) == (1, {"bad": "failed", "held": "waiting"})
    worker = python("fake_worker.py", plan.root, "--job", "cells-0")
    until(lambda: starts(plan, "held"))
    worker.send_signal(signal.SIGTERM)
    worker.communicate(timeout=WAIT_SEC)
    assert (worker.returncode, states(plan)) == (128 + signal.SIGTERM, {"bad": "failed", "held": "waiting"})
    assert main(["worker", str(plan.root)]) == 1, "what the fake cells are told is no option of a real one"
    assert main(["worker", str(plan.root)]) == 0
    assert set(states(plan).values()) == {"failed"}


@pytest.mark.slow
def test_two_dispatchers_on_one_plan_never_run_a_cell_twice_at_a_time(tmp_path):
    cells = [cell(f"cell-{number}", seconds=0.05, do="fail", on=[1] if number % 3 == 0 else []) for number in range(12)]
    plan = Plan.write(tmp_path / "plan", cells)
    processes = [python("fake_dispatch.py", plan.root, 3) for _ in range(2)]
    for process in processes:
        output, errors = process.communicate(timeout=WAIT_SEC)
        assert (process.returncode, errors) == (0, "")
        assert output.endswith("12 of 12 cells are done, 0 failed\n")
    for number, one in enumerate(cells):
        expected = ["1", "2"] if number % 3 == 0 else ["1"]
        assert starts(plan, one.id) == expected
        assert [attempt.number for attempt in attempts_of(plan.folder(one))] == [int(name) for name in expected]
        assert result(plan, one.id)["attempt"] == len(expected)
    assert workers_of(plan) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_dispatcher_leaves_a_plan_that_the_same_call_finishes(tmp_path, number):
    plan = Plan.write(tmp_path / "plan", [cell("first"), cell("held", do="hold"), cell("also", do="hold")], retries=0)
    process = python("fake_dispatch.py", plan.root, 2)
    until(lambda: starts(plan, "held") and starts(plan, "also"))
    process.send_signal(number)
    _, errors = process.communicate(timeout=WAIT_SEC)
    assert process.returncode == 128 + number
    assert "finemask: interrupted, 1 of 3 cells are done; the same command goes on: " in errors
    assert errors.rstrip().endswith(f"fake_dispatch.py {plan.root} 2")
    assert errors.count("\n") == 1
    assert workers_of(plan) == []
    assert states(plan) == {"first": "done", "held": "waiting", "also": "waiting"}, "no failure, though retries = 0"
    (plan.root / "go").touch()
    assert "3 of 3 cells are done, 0 failed" in dispatch(plan)
    assert [starts(plan, name) for name in ("first", "held", "also")] == [["1"], ["1", "2"], ["1", "2"]]


@pytest.mark.slow
def test_workers_end_with_a_dispatcher_that_is_killed(tmp_path):
    plan = Plan.write(tmp_path / "plan", [cell("held", do="hold"), cell("also", do="hold")], retries=0)
    process = python("fake_dispatch.py", plan.root, 2)
    until(lambda: starts(plan, "held") and starts(plan, "also"))
    process.kill()
    process.communicate(timeout=WAIT_SEC)
    until(lambda: workers_of(plan) == [])
    assert states(plan) == {"held": "waiting", "also": "waiting"}


def test_a_workers_own_children_do_not_outlive_it(tmp_path):
    plan = Plan.write(tmp_path / "plan", [cell("parent", do="child")])
    dispatch(plan)
    child = int((plan.root / "cells" / "parent" / "child").read_text())
    until(lambda: not lives(child))


def test_workers_may_take_long_to_save_unless_ctrl_c_comes_again(tmp_path):
    plan = Plan.write(tmp_path / "plan", [cell("quick", do="save", seconds=0), cell("slow", do="save", seconds=900)])
    process = python("fake_dispatch.py", plan.root, 2)
    until(lambda: starts(plan, "quick") and starts(plan, "slow"))
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    told = process.stderr.readline()
    assert told == "finemask: waiting until the workers have saved; Ctrl-C again ends them at once\n"
    assert len(workers_of(plan)) == 1
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=WAIT_SEC)
    assert process.returncode == 128 + signal.SIGINT
    assert workers_of(plan) == []
    assert states(plan) == {"quick": "waiting", "slow": "waiting"}
    assert [path.parent.parent.name for path in plan.root.glob("cells/*/attempt-1/saved")] == ["quick"]


def test_workers_save_though_nobody_reads_any_more_what_the_dispatcher_says(tmp_path):
    """As a Ctrl-C ends the `2>&1 | tee log` beside it too."""
    plan = Plan.write(tmp_path / "plan", [cell("quick"), cell("slow", do="save", seconds=2.5)])
    process = python("fake_dispatch.py", plan.root, 1)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    until(lambda: starts(plan, "slow"))
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT_SEC) == 128 + signal.SIGINT
    assert (plan.root / "cells" / "slow" / "attempt-1" / "saved").exists()
    assert workers_of(plan) == []
    assert states(plan) == {"quick": "done", "slow": "waiting"}


@pytest.mark.slow
def test_a_worker_whose_cell_another_has_done_is_not_awaited_for_long(tmp_path):
    plan = Plan.write(tmp_path / "plan", [cell("one", do="save", seconds=900)])
    process = python("fake_dispatch.py", plan.root, 1)
    until(lambda: starts(plan, "one"))
    (plan.folder(plan.cells[0]) / "result.json").write_text('{"task": "mrpc", "score": 0.5}')
    output, errors = process.communicate(timeout=WAIT_SEC)
    assert (process.returncode, errors) == (0, "")
    assert output.endswith("1 of 1 cells are done, 0 failed\n")
    assert workers_of(plan) == []


@pytest.mark.slow
def test_a_stopped_worker_is_killed_at_the_end_of_the_grace(tmp_path):
    plan = Plan.write(tmp_path / "plan", [cell("held", do="hold")], retries=0)
    process = python("fake_dispatch.py", plan.root, 1, 1.0)
    until(lambda: starts(plan, "held"))
    os.kill(attempts_of(plan.folder(plan.cells[0]))[0].facts()["pid"], signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=WAIT_SEC)
    assert workers_of(plan) == []
    assert states(plan) == {"held": "waiting"}


def test_workers_are_pinned_and_know_of_no_launcher(tmp_path, monkeypatch):
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "CROSS_RANK",
        "OMPI_COMM_WORLD_RANK",
    ):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("RANKING", "kept")
    cores = sorted(os.sched_getaffinity(0))
    plan = Plan.write(tmp_path / "plan", [cell(f"cell-{number}", seconds=0.5) for number in range(len(cores))])
    dispatch(plan, slots=0)
    results = [result(plan, one.id) for one in plan.cells]
    assert sorted(one["cores"] for one in results) == [[core] for core in cores]
    for one in results:
        assert not one["torch"], "no import of dispatch brings torch along"
        assert one["environment"]["OMP_NUM_THREADS"] == "1"
        assert [name for name in one["environment"] if "RANK" in name or "MASTER" in name] == ["RANKING"]


def test_a_cell_that_cannot_even_begin_is_one_sentence_before_anything_runs(tmp_path):
    plan = Plan.write(tmp_path / "plan", [cell("good"), cell("bad", do="unmeasurable")])
    process = python("fake_dispatch.py", plan.root)
    _, errors = process.communicate(timeout=WAIT_SEC)
    assert process.returncode == 1
    assert errors == "finemask: there is no training file in data/MRPC; type --data FOLDER\n"
    assert diary(plan, "good") == []


def test_workers_that_end_at_once_end_the_dispatcher(tmp_path):
    code = (
        "import sys; from pathlib import Path; from finemask_ds.dispatch.executor import dispatch;"
        "from finemask_ds.dispatch.local import LocalExecutor; from finemask_ds.dispatch.plan import Plan;"
        "dispatch(Plan.read(Path(sys.argv[1])), LocalExecutor(1, ['false']), poll_sec=0.01)"
    )
    plan = Plan.write(tmp_path / "plan", [cell("good")])
    process = subprocess.run(
        [sys.executable, "-c", code, plan.root], capture_output=True, text=True, timeout=WAIT_SEC, check=False
    )
    assert process.returncode == 1
    log = plan.root / "logs" / "slot-0.log"
    assert (
        f"UserError: 5 workers ended before any cell did; the last ended with exit code 1, see {log}\n"
        in process.stderr
    )


def test_an_error_is_told_before_workers_save_and_the_first_ctrl_c_ends_them(tmp_path):
    """The first worker has a cell that saves for long; those beside it end at once, for which the dispatcher ends."""
    plan = Plan.write(tmp_path / "plan", [cell("slow", do="save", seconds=900), cell("other")])
    begun, worker = plan.root / "cells" / "slow" / "diary", shlex.join(COMMAND)
    script = f"mkdir {plan.root}/first && exec {worker} $0 $*; until [ -e {begun} ]; do sleep 0.05; done; exit 3"
    code = (
        "import sys; from pathlib import Path; from finemask_ds.dispatch.executor import dispatch;"
        "from finemask_ds.dispatch.local import LocalExecutor; from finemask_ds.dispatch.plan import Plan;"
        "workers = LocalExecutor(2, ['sh', '-c', sys.argv[2]]);"
        "dispatch(Plan.read(Path(sys.argv[1])), workers, measure=False, poll_sec=0.01)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, plan.root, script], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    told = process.stderr.readline()
    assert told.startswith("finemask: 10 workers ended before any cell did; the last ended with exit code 3, see ")
    assert told.endswith(".log; waiting until the workers have saved; Ctrl-C ends them at once\n")
    assert len(set(workers_of(plan)) - {process.pid}) == 1
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=WAIT_SEC)
    assert process.returncode == 1
    assert "UserError: 10 workers ended before any cell did" in errors
    assert workers_of(plan) == []


def test_the_estimate_is_measured_once_for_each_kind_of_cell(tmp_path):
    plan = Plan.write(tmp_path / "plan", [cell("a", seed=1), cell("b", seed=2), cell("c", seconds=0.1)])
    assert "cost: about 5 min 0 s of one worker" in dispatch(plan)
    log = plan.root / "logs" / "measure.log"
    assert log.read_text().count("about 100 s") == 2
    assert len(json.loads((plan.root / "estimate.json").read_text())) == 2
    log.unlink()
    Plan.write(plan.root, [cell("d", seed=3)])
    output = dispatch(Plan.read(plan.root))
    assert "cost: about " in output
    assert "1 min 40 s" not in output, "known from the cells that are done, no longer the 100 s of the estimate"
    assert not log.exists()


def test_a_mask_that_vanishes_or_changes_fails_its_cell_and_the_rest_finishes(tmp_path):
    masks = [write_mask(tmp_path / f"{name}.safetensors", name) for name in ("gone", "changed", "kept")]
    cells = [Cell.of({"task": "mrpc", "mask": str(mask)}) for mask in masks]
    plan = Plan.write(tmp_path / "plan", cells, retries=0)
    masks[0].unlink()
    write_mask(masks[1], "other", seed=2)
    dispatch(plan)
    assert list(states(plan).values()) == ["failed", "failed", "done"]
    assert failure(plan, cells[0].id, 1)["error"].startswith(f"there is no mask file {masks[0]}: ")
    assert failure(plan, cells[1].id, 1)["error"].startswith(f"{masks[1]} is another mask than when the plan was made")


def test_a_broken_result_counts_as_none(tmp_path):
    plan = Plan.write(tmp_path / "plan", [cell("whole")])
    dispatch(plan)
    path = plan.root / "cells" / "whole" / "result.json"
    text = path.read_text()
    for broken in (text[:20], "", "[]", '{"task": "mrpc"}', '{"task": "cola", "score": 0.5}'):
        path.unlink()  # the attempt's own file is the same one under another name
        path.write_text(broken)
        assert survey(plan).count(State.DONE) == 0
    dispatch(plan)
    assert survey(plan).count(State.DONE) == 1
    assert starts(plan, "whole") == ["1", "2"]
    assert result(plan, "whole")["attempt"] == 2
