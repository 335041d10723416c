"""Plans on a real Slurm of two hosts: what is run, what is submitted again, and that nothing is run twice."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from finemask_ds.dispatch.attempt import attempts_of
from finemask_ds.dispatch.plan import Cell, Plan
from finemask_ds.dispatch.survey import State, survey
from tests.cluster.networks import SUPER_PATH, wait_until
from tests.cluster.slurm import Slurm
from tests.conftest import REPOSITORY
from tests.dispatch.toys import cell, diary, failure, result, starts, write_mask

END_SEC = 120.0
ONE_ARRAY = """#!/bin/sh
case "$*" in *--array=*)
    [ ! -e {mark} ] || {{ echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }}
    : >{mark} ;;
esac
exec {sbatch} "$@"
"""
WITHOUT_SACCT = ("sbatch", "squeue", "scontrol")


class Dispatcher:
    """A process that dispatches a plan, as a person on a login node would; only three of Slurm's commands are there."""

    def __init__(self, slurm: Slurm, plan: Plan, *options: object, most_tasks: int = 0, one_array: bool = False):
        folder = plan.root.parent
        programs = folder / "bin"
        programs.mkdir(exist_ok=True)
        for name in WITHOUT_SACCT:
            (programs / name).unlink(missing_ok=True)
            (programs / name).symlink_to(shutil.which(name, path=SUPER_PATH) or "")
        if most_tasks:
            (programs / "scontrol").unlink()
            (programs / "scontrol").write_text(f"#!/bin/sh\necho 'MaxArraySize            = {most_tasks}'\n")
            (programs / "scontrol").chmod(0o755)
        if one_array:
            (programs / "sbatch").unlink()
            (programs / "sbatch").write_text(
                ONE_ARRAY.format(mark=programs / "submitted", sbatch=shutil.which("sbatch"))
            )
            (programs / "sbatch").chmod(0o755)
        self.log = folder / f"dispatcher-{len(list(folder.glob('dispatcher-*')))}.log"
        with open(self.log, "wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "tests/cluster/slurm_dispatch.py", str(plan.root), *map(str, options)],
                cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
                env={**os.environ, **slurm.environment, "PATH": str(programs), "PYTHONPATH": str(REPOSITORY)},
            )  # fmt: skip

    def says(self, words: str) -> None:
        """Wait until it has."""
        wait_until(lambda: words in self.log.read_text(), END_SEC, f"{words!r} in {self.log}")

    def end(self, code: int = 0) -> str:
        """What it has printed by its end."""
        try:
            self.process.wait(END_SEC)
        finally:
            self.process.kill()
        assert self.process.returncode == code, self.log.read_text()
        return self.log.read_text()


@pytest.fixture(autouse=True)
def _empty_queue(slurm: Slurm) -> Iterator[None]:
    yield
    slurm.run(["scancel", "--user=root"])
    wait_until(lambda: not queue(slurm), 60, "Slurm's queue is empty")


def queue(slurm: Slurm) -> dict[str, str]:
    """Task -> its state, of what is in the queue."""
    told = slurm.run(["squeue", "--noheader", "--array", "--format=%F_%K %T"]).stdout
    return dict(line.split() for line in told.splitlines())


def states(plan: Plan) -> dict[str, str]:
    return {name: str(standing.state) for name, standing in survey(plan, bury=False).standings.items()}


def count(plan: Plan, state: State) -> int:
    return survey(plan, bury=False).count(state)


def places(plan: Plan) -> set[str]:
    """Hosts that run cells just now."""
    running = survey(plan, bury=False).cells(State.RUNNING)
    return {str(standing.attempts[-1].facts()["host"]) for _, standing in running}


def arrays(plan: Plan) -> list[Path]:
    """Scripts of the arrays that were submitted."""
    return [path for path in (plan.root / "slurm").glob("*.sh") if "tidy" not in path.name]


def task_of(plan: Plan, name: str) -> str:
    """The task whose log tells of a cell, as scancel wants it."""
    (log,) = [path for path in plan.logs.glob("slurm-*.log") if f"{name}: attempt" in path.read_text()]
    return log.stem.removeprefix("slurm-")


@pytest.mark.slow
def test_an_array_runs_every_cell_once_wherever_there_is_room(slurm: Slurm, tmp_path: Path) -> None:
    """In a folder whose name Slurm and a shell would both like to expand."""
    folder = tmp_path / 'it\'s 100% x; $(touch oops) "a"'
    plan = Plan.write(folder / "plan", [cell(f"cell-{number}", seconds=1) for number in range(6)])
    setup = tmp_path / "set up.sh"
    setup.write_text("export FROM_SETUP='a b'\n")
    options = ("--slots", 3, "--job_setup", setup, "--job_options", "gres=gpu:1", "cpus_per_task=1", "comment=a; b 'c'")
    output = Dispatcher(slurm, plan, *options).end()
    assert "6 to run on Slurm, 3 at a time\n" in output
    assert output.endswith("6 of 6 cells are done, 0 failed\n")
    assert len(arrays(plan)) == 1
    results = [result(plan, one.id) for one in plan.cells]
    assert [len(starts(plan, one.id)) for one in plan.cells] == [1] * 6
    moments = sorted((int(at), word) for one in plan.cells for word, _, at in diary(plan, one.id))
    alive = [sum(1 if word == "start" else -1 for _, word in moments[: end + 1]) for end in range(len(moments))]
    assert max(alive) == 3, "as many at a time as asked for"
    assert {one["environment"]["SLURMD_NODENAME"] for one in results} == set(slurm.hosts.names)
    for one in results:
        told = one["environment"]
        assert told["CUDA_VISIBLE_DEVICES"] in ("0", "1")
        assert (told["FROM_SETUP"], told["OMP_NUM_THREADS"]) == ("a b", "1")
        assert not [name for name in told if name.endswith(("RANK", "PROCID", "NTASKS"))], "one of several it is not"
    assert sorted(path.name for path in plan.logs.iterdir()) == [
        f"slurm-{task_of(plan, one.id)}.log" for one in plan.cells
    ]
    assert not list(tmp_path.rglob("oops"))
    assert not (REPOSITORY / "oops").exists()


@pytest.mark.slow
def test_every_bad_end_of_a_task_is_told_and_the_rest_finishes(slurm: Slurm, tmp_path: Path) -> None:
    mask = write_mask(tmp_path / "mask.safetensors")
    gone = Cell.of({"task": "mrpc", "mask": str(mask)})
    names = ("dies", "cancelled", "held", "never", "good")
    ends = {"dies": {"do": "die", "on": [1]}, "cancelled": {"do": "hold"}, "held": {"do": "hold"}}
    plan = Plan.write(tmp_path / "plan", [gone, *(cell(name, **ends.get(name, {})) for name in names)], retries=1)
    mask.unlink()
    dispatcher = Dispatcher(slurm, plan, "--slots", 2)
    wait_until(lambda: starts(plan, "cancelled") and starts(plan, "held"), 60, "both slots are held")
    job = task_of(plan, "held").partition("_")[0]
    assert queue(slurm)[f"{job}_4"] == "PENDING"
    slurm.run(["scancel", f"{job}_4", task_of(plan, "cancelled")])
    wait_until(lambda: len(starts(plan, "cancelled")) == 2, 60, "it is submitted again")
    (plan.root / "go").touch()
    output = dispatcher.end()
    assert states(plan) == {gone.id: "failed", **dict.fromkeys(names, "done")}
    assert failure(plan, gone.id, 2)["error"].startswith(f"there is no mask file {mask}: ")
    told = {name: failure(plan, name, 1)["error"] for name in ("dies", "cancelled", "never")}
    # Whoever finds it first says why: the dispatcher, or another worker of that node on its look for a free cell.
    assert told.pop("dies") in (
        f"Slurm's job {job}_1 ended as FAILED without leaving a word: killed, or its node is gone",
        *(f"the worker on {name} fell silent: it was killed, or its host is gone" for name in slurm.hosts.names),
    )
    assert told == {
        "cancelled": f"Slurm's job {job}_2 ended as CANCELLED: somebody has cancelled it",
        "never": f"Slurm's job {job}_4 has left the queue before it had begun the cell",
    }
    assert all(f"{name}: failed, attempt 1 of 2, tried again: {error} (" in output for name, error in told.items())
    assert "dies: failed, attempt 1 of 2, tried again: " in output
    assert result(plan, "dies")["checkpoints"] == ["step-attempt-1"], "handed over"
    assert [result(plan, name)["attempt"] for name in names] == [2, 2, 1, 2, 1]


@pytest.mark.slow
def test_a_node_that_loses_its_power_in_the_middle_costs_no_result(slurm: Slurm, tmp_path: Path) -> None:
    cells = [cell(f"cell-{number}", **({} if number < 4 else {"do": "hold"})) for number in range(20)]
    plan = Plan.write(tmp_path / "plan", cells, retries=0)
    dispatcher = Dispatcher(slurm, plan)
    wait_until(
        lambda: count(plan, State.DONE) == 4 and "node2" in places(plan), 60, "a part is done, a part runs there"
    )
    slurm.hosts.power_off("node2")
    (plan.root / "go").touch()
    output = dispatcher.end()
    assert output.endswith("20 of 20 cells are done, 0 failed\n")
    assert len(arrays(plan)) == 1, "Slurm itself starts anew what ran there"
    attempts = Counter(result(plan, one.id)["attempt"] for one in plan.cells)
    assert set(attempts) == {1, 2}, "some were under way there"
    for one in plan.cells:
        told = result(plan, one.id)
        assert (told["task"], told["score"]) == ("mrpc", 0.5)
        assert [word for word, *_ in diary(plan, one.id)].count("end") == 1
        assert len(list(plan.folder(one).glob("attempt-*/result.json"))) == 1
        # At once, not when its silence is noticed: then it would have been a failure.
        assert not any(attempt.failure() for attempt in attempts_of(plan.folder(one)))


@pytest.mark.slow
def test_the_queue_outlives_its_dispatcher_and_the_next_one_finds_it(slurm: Slurm, tmp_path: Path) -> None:
    plan = Plan.write(tmp_path / "plan", [cell(f"cell-{number}", do="hold") for number in range(6)], retries=0)
    first = Dispatcher(slurm, plan)
    first.says("Slurm: 6 tasks in the queue, some wait for ")
    wait_until(lambda: sum(len(starts(plan, one.id)) for one in plan.cells) == 4, 60, "two nodes are full")
    first.process.send_signal(signal.SIGINT)
    output = first.end(code=130)
    job = task_of(plan, "cell-0").partition("_")[0]
    assert (
        f"job(s) {job} stay in Slurm's queue and the same command finds them again; scancel {job} ends them" in output
    )
    assert Counter(queue(slurm).values()) == {"RUNNING": 4, "PENDING": 2}
    with stopped_controller(slurm):
        others = [Dispatcher(slurm, plan) for _ in range(2)]
        others[0].says("4 running elsewhere, 2 to run on Slurm")
        others[0].process.kill()
        others[1].says("finemask: Slurm does not answer (")
        (plan.root / "go").touch()
    for other in (others[1], Dispatcher(slurm, plan)):
        assert other.end().endswith("6 of 6 cells are done, 0 failed\n")
    assert len(arrays(plan)) == 1
    assert [starts(plan, one.id) for one in plan.cells] == [["1"]] * 6


@contextlib.contextmanager
def stopped_controller(slurm: Slurm) -> Iterator[None]:
    """While the block runs, slurmctld answers nobody."""
    pid = (slurm.folder / "slurmctld.pid").read_text().strip()
    slurm.hosts.run("head", ["kill", "-STOP", pid])
    try:
        yield
    finally:
        slurm.hosts.run("head", ["kill", "-CONT", pid])


@pytest.mark.slow
def test_more_cells_than_an_array_may_have_tasks(slurm: Slurm, tmp_path: Path) -> None:
    plan = Plan.write(tmp_path / "plan", [cell(f"cell-{number}", do="hold") for number in range(5)])
    dispatcher = Dispatcher(slurm, plan, "--slots", 3, most_tasks=2)
    wait_until(lambda: sum(len(starts(plan, one.id)) for one in plan.cells) == 3, 60, "the slots are full")
    assert sorted(queue(slurm).values()) == ["RUNNING"] * 3, "the rest waits outside"
    (plan.root / "go").touch()
    assert dispatcher.end().endswith("5 of 5 cells are done, 0 failed\n")
    sizes = [len(re.findall(r"cell-\d", path.read_text().split("\n")[1])) for path in arrays(plan)]
    assert sum(sizes) == 5
    assert max(sizes) == 2


@pytest.mark.slow
def test_who_does_not_wait_leaves_a_small_job_that_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    cells = [cell("bad", do="fail"), cell("dies", do="die", on=[1]), cell("good")]
    plan = Plan.write(tmp_path / "plan", cells, retries=1)
    output = Dispatcher(slurm, plan, "--wait", "no").end()
    assert " stay in Slurm's queue and job " in output
    wait_until(lambda: not queue(slurm), 90, "nothing is left in the queue")
    assert states(plan) == {"bad": "failed", "dies": "done", "good": "done"}
    assert starts(plan, "bad") == ["1", "2"], "as often as the plan allows, though each look starts from nothing"
    logs = sorted(plan.logs.glob("slurm-tidy-*.log"), key=lambda path: path.stat().st_mtime)
    assert len(logs) == len(arrays(plan)) == 2
    assert logs[-1].read_text().endswith("2 of 3 cells are done, 1 failed\n")


@pytest.mark.slow
def test_who_does_not_wait_leaves_a_small_job_after_what_others_have_submitted_too(
    slurm: Slurm, tmp_path: Path
) -> None:
    """Once, whoever comes, while that is in the queue; also where the next array is refused."""
    plan = Plan.write(tmp_path / "plan", [cell(f"cell-{number}", do="hold") for number in range(2)])
    first = Dispatcher(slurm, plan)
    wait_until(lambda: all(starts(plan, one.id) for one in plan.cells), 60, "both run")
    first.process.send_signal(signal.SIGINT)
    assert " and the same command finds them again; " in first.end(code=130)
    left = r"^job\(s\) (\d+) stay in Slurm's queue and job (\d+) goes on after them; scancel \1 \2 ends them$"
    told = [re.findall(left, Dispatcher(slurm, plan, "--wait", "no").end(), re.M) for _ in range(2)]
    assert len(told[0]) == 1
    assert told[0] == told[1]
    assert len(list((plan.root / "slurm").glob("*tidy*.sh"))) == 1
    slurm.run(["scancel", told[0][0][1]])
    told += [re.findall(left, Dispatcher(slurm, plan, "--wait", "no").end(), re.M) for _ in range(2)]
    assert told[2][0][0] == told[0][0][0]
    assert told[2] != told[1], "where somebody has cancelled the small job alone, there is another"
    assert told[2] == told[3]

    more = Plan.write(tmp_path / "more" / "plan", [cell(f"cell-{number}", do="hold") for number in range(3)])
    refused = Dispatcher(slurm, more, "--wait", "no", most_tasks=2, one_array=True).end(code=1)
    assert "finemask: sbatch refuses the job (QOSMaxSubmitJobPerUserLimit" in refused
    assert re.findall(left, refused, re.M)
    (tmp_path / "more" / "bin" / "submitted").unlink()  # so that the small job, which finds it on its PATH, may submit
    for one in (plan, more):
        (one.root / "go").touch()
    wait_until(lambda: not queue(slurm), 90, "nothing is left in the queue")
    for one, done in ((plan, "2 of 2 cells are done, 0 failed"), (more, "3 of 3 cells are done, 0 failed")):
        assert any(done in path.read_text() for path in one.logs.glob("slurm-tidy-*.log"))


@pytest.mark.slow
def test_a_script_that_cannot_begin_a_cell_ends_the_dispatcher(slurm: Slurm, tmp_path: Path) -> None:
    setup = tmp_path / "setup.sh"
    setup.write_text("echo no such module >&2; exit 3\n")
    plan = Plan.write(tmp_path / "plan", [cell("one"), cell("two")])
    told = Dispatcher(slurm, plan, "--job_setup", setup).end(code=1).splitlines()[-1]
    assert told.startswith("finemask: none of the 2 tasks of Slurm's job ")
    assert " has begun its cell (FAILED): it was cancelled, or --job_setup or --job_options is at fault; see " in told
    assert [log.read_text() for log in plan.logs.iterdir()] == ["no such module\n"] * 2
    for options, words in (("partition=none", "invalid partition specified: none"), ("frob=1", "unrecognized option")):
        told = Dispatcher(slurm, plan, "--job_options", options).end(code=1).splitlines()[-1]
        assert told.startswith("finemask: sbatch refuses the job (")
        assert words in told
    assert states(plan) == {"one": "waiting", "two": "waiting"}
    assert not queue(slurm)
    assert Dispatcher(slurm, plan).end().endswith("2 of 2 cells are done, 0 failed\n")


@pytest.mark.slow
def test_a_full_disk_is_told_and_the_same_command_goes_on(slurm: Slurm, small_disk: Path) -> None:
    plan = Plan.write(small_disk / "plan", [cell("held", do="hold"), cell("next")], retries=1)
    options = ("--job_options", "nodelist=node2", "--slots", 1)
    dispatcher = Dispatcher(slurm, plan, *options)
    wait_until(lambda: starts(plan, "held"), 60, "a cell runs")
    fill(small_disk / "ballast")
    (plan.root / "go").touch()
    assert dispatcher.end(code=1).splitlines()[-1].startswith(f"finemask: the disk is full at {plan.root}/")
    assert states(plan) == {"held": "waiting", "next": "waiting"}
    (small_disk / "ballast").unlink()
    assert Dispatcher(slurm, plan, *options).end().endswith("2 of 2 cells are done, 0 failed\n")
    assert states(plan) == {"held": "done", "next": "done"}


@pytest.fixture
def small_disk(slurm: Slurm, tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB that node2 and this process see."""
    disk = tmp_path / "small"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=True)
    try:
        slurm.hosts.power_off("node2")
        slurm.hosts.mend()  # a host sees what was mounted before its start
        slurm.mend()
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with open(path, "wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(4096))
