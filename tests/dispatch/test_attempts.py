"""Attempts at one cell: who may begin one, what goes over to the next, which result counts."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from finemask_ds.dispatch.attempt import Attempt, Claim, attempts_of, claim, end_attempts
from finemask_ds.dispatch.plan import Plan
from finemask_ds.dispatch.survey import Standing, State, look
from finemask_ds.dispatch.worker import work
from finemask_ds.errors import UserError
from finemask_ds.lock import process_name
from tests.dispatch.toys import cell

GONE = f"{process_name(2**22 - 1)}00000000"
ELSEWHERE = "1@another-host-00000000-00000000"
RESULT = {"task": "mrpc", "score": 0.5}


def standing(folder: Path, retries: int = 1, bury: bool = True) -> Standing:
    return look(folder, "mrpc", retries, 60.0, bury=bury)


def begin(folder: Path) -> Claim:
    claimed = claim(folder, "mrpc", attempts_of(folder))
    assert claimed is not None
    return claimed


def left_by(name: str, folder: Path, silent_sec: float = 0.0) -> Attempt:
    """An attempt that a process of another name began and never ended."""
    attempt = begin(folder).attempt
    lock = attempt.folder / "lock"
    lock.write_text(name)
    os.utime(lock, (lock.stat().st_mtime - silent_sec,) * 2)
    return attempt


def test_only_one_of_many_gets_the_cell(tmp_path):
    for round_ in range(20):
        folder = tmp_path / f"cell-{round_}"
        with ThreadPoolExecutor(8) as pool:
            claims = list(pool.map(lambda _, folder=folder: claim(folder, "mrpc", []), range(8)))
        assert len([one for one in claims if one]) == 1
        assert os.listdir(folder) == ["attempt-1"], "the others leave nothing"
        assert standing(folder).state is State.RUNNING


def test_an_attempt_lives_while_its_lock_beats_and_is_over_with_its_release(tmp_path):
    claimed = begin(tmp_path)
    with claimed.held(60.0):
        assert standing(tmp_path).state is State.RUNNING
    assert standing(tmp_path) == Standing(State.WAITING, (claimed.attempt,)), "interrupted, not failed"


def test_a_silent_attempt_of_another_host_is_given_up_only_after_a_while(tmp_path):
    attempt = left_by(ELSEWHERE, tmp_path, silent_sec=50)
    assert standing(tmp_path).state is State.RUNNING
    os.utime(attempt.folder / "lock", (0, 0))
    assert standing(tmp_path, bury=False).state is State.WAITING
    assert not attempt.failed.exists(), "a look alone changes nothing"
    found = standing(tmp_path)
    assert found.state is State.WAITING
    assert found.error == "the worker on another-host fell silent: it was killed, or its host is gone"
    assert standing(tmp_path, retries=0).state is State.FAILED
    os.utime(attempt.folder / "lock")
    assert standing(tmp_path, retries=0).state is State.RUNNING, "it was only suspended: no other may begin now"


def test_a_stale_cell_is_taken_over_by_a_worker(tmp_path):
    plan = Plan.write(tmp_path, [cell("one")])
    left_by(ELSEWHERE, plan.folder(plan.cells[0]))
    ran = []

    def run_cell(options, folder, interruption):
        ran.append(folder.name)
        (folder / "result.json").write_text(json.dumps(RESULT))

    work(tmp_path, run_cell)
    assert ran == [], "alive elsewhere"
    os.utime(plan.folder(plan.cells[0]) / "attempt-1" / "lock", (0, 0))
    for _ in range(2):
        assert work(tmp_path, run_cell) == 0
    assert standing(plan.folder(plan.cells[0])).state is State.DONE
    assert ran == ["attempt-2"]


def test_a_worker_runs_only_the_cells_it_is_given_and_ends_after_an_error_of_the_program(tmp_path):
    plan = Plan.write(tmp_path, [cell("one"), cell("two"), cell("three")], retries=0)
    ran = []

    def run_cell(options, folder, interruption):
        ran.append(folder.parent.name)
        raise ZeroDivisionError("a bug")

    assert [work(tmp_path, run_cell, cells=["two", "three"]) for _ in range(3)] == [1, 1, 0]
    assert ran == ["two", "three"]
    with pytest.raises(UserError, match=f"^--cell four is not in the plan {tmp_path}; finemask status"):
        work(tmp_path, run_cell, cells=["one", "four"])
    assert look(plan.folder(plan.cells[1]), "mrpc", 0, 60.0).error == "ZeroDivisionError: a bug"


def test_a_cell_that_ends_without_a_result_has_failed(tmp_path):
    plan = Plan.write(tmp_path, [cell("one")], retries=0)
    assert work(tmp_path, lambda options, folder, interruption: None) == 1
    assert "result.json is missing or broken, though the cell has ended" in standing(plan.folder(plan.cells[0])).error


def test_the_first_whole_result_wins(tmp_path):
    slow, fast = begin(tmp_path).attempt, begin(tmp_path).attempt
    assert not slow.publish("mrpc")
    slow.run.result.write_text(json.dumps({**RESULT, "score": 0.1})[:-4])
    assert not slow.publish("mrpc"), "half-written"
    assert not (tmp_path / "result.json").exists()
    fast.run.result.write_text(json.dumps({**RESULT, "score": 0.2}))
    assert fast.publish("mrpc")
    slow.run.result.write_text(json.dumps({**RESULT, "score": 0.1}))
    assert slow.publish("mrpc")
    assert standing(tmp_path).result["score"] == 0.2
    assert claim(tmp_path, "mrpc", attempts_of(tmp_path)) is None, "done meanwhile"
    assert len(attempts_of(tmp_path)) == 2


def test_a_result_whose_process_died_before_it_was_published_counts(tmp_path):
    attempt = left_by(GONE, tmp_path)
    attempt.run.result.write_text(json.dumps(RESULT))
    assert standing(tmp_path, bury=False).state is State.WAITING
    assert standing(tmp_path).state is State.DONE
    assert json.loads((tmp_path / "result.json").read_text()) == RESULT


def test_what_a_worker_left_whole_is_published_when_it_is_ended(tmp_path):
    attempt = begin(tmp_path).attempt
    attempt.run.result.write_text(json.dumps(RESULT))
    end_attempts([tmp_path], os.getpid())
    assert standing(tmp_path).state is State.DONE
    assert json.loads((tmp_path / "result.json").read_text()) == RESULT


def test_the_next_attempt_does_not_believe_that_it_is_done(tmp_path):
    """Where a result was removed, so that it is made again."""
    first = begin(tmp_path).attempt
    first.run.mark_done("finetune")
    first.let_go()
    second = begin(tmp_path)
    second.take_over()
    assert not second.attempt.run.done("finetune")


def make_run(attempt: Attempt, name: str, *, checkpoint: bool = True) -> None:
    attempt.run.config.write_text(name)
    attempt.run.metrics.write_text(name)
    if checkpoint:
        attempt.run.checkpoints.mkdir(exist_ok=True)
        (attempt.run.checkpoints / name).touch()


def files(attempt: Attempt) -> list[str]:
    return sorted(path.name for path in attempt.folder.iterdir() if path.name not in ("lock", "attempt.json"))


def test_the_next_attempt_goes_on_from_the_last_checkpoint(tmp_path):
    make_run(left_by(GONE, tmp_path), "one")
    assert standing(tmp_path).state is State.WAITING
    second = begin(tmp_path)
    second.take_over()
    assert files(second.attempt) == ["checkpoints", "config.json", "metrics.jsonl"]
    assert files(second.before[0]) == ["failed.json"]
    (second.attempt.folder / "lock").unlink()

    third = begin(tmp_path)
    third.take_over()
    assert os.listdir(third.attempt.run.checkpoints) == ["one"]
    assert files(second.attempt) == []


def test_a_handover_that_was_cut_off_is_completed_by_the_next(tmp_path):
    first = left_by(GONE, tmp_path)
    make_run(first, "one")
    second = left_by(GONE, tmp_path)
    os.rename(first.run.config, second.run.config)
    third = begin(tmp_path)
    third.take_over()
    assert files(third.attempt) == ["checkpoints", "config.json", "metrics.jsonl"]


@pytest.mark.parametrize("traces", [("Traceback", "Traceback"), ("Traceback", ""), ("", "Traceback"), ("", "")])
def test_after_two_errors_in_a_row_an_attempt_starts_afresh(tmp_path, traces):
    for number, trace in enumerate(traces):
        claimed = begin(tmp_path)
        claimed.take_over()
        if number == 0:
            make_run(claimed.attempt, "one")
        claimed.attempt.fail("an error", trace)
        claimed.attempt.let_go()
    last = begin(tmp_path)
    last.take_over()
    afresh = traces == ("Traceback", "Traceback")
    assert files(last.attempt) == ([] if afresh else ["checkpoints", "config.json", "metrics.jsonl"])
    assert bool(list(tmp_path.glob("*/checkpoints"))) != afresh, "nobody finds them later"


def test_a_failure_is_told_once_in_one_line(tmp_path):
    attempt = begin(tmp_path).attempt
    attempt.fail("first\n  line", "Traceback", 1.5)
    attempt.fail("second")
    told = json.loads(attempt.failed.read_text())
    assert (told["error"], told["traceback"], told["seconds"]) == ("first line", "Traceback", 1.5)
    assert told["pid"] == os.getpid()
    attempt.let_go()
    assert standing(tmp_path, retries=0).state is State.FAILED
    attempt.excuse()
    assert standing(tmp_path, retries=0).state is State.WAITING
    assert json.loads(attempt.failed.read_text()) == {**told, "excused": True}


def test_a_broken_failed_json_counts_as_a_failure(tmp_path):
    attempt = begin(tmp_path).attempt
    attempt.failed.write_text("{")
    attempt.let_go()
    assert standing(tmp_path, retries=0).state is State.FAILED
    assert standing(tmp_path).error == f"{attempt.failed} is broken"
