"""What `finemask status` shows, in a pipe and on a terminal; and what importing dispatch costs."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from finemask_ds.cli import main
from finemask_ds.dispatch.attempt import attempts_of, claim
from finemask_ds.dispatch.plan import Cell, Plan
from finemask_ds.dispatch.status import show_status
from finemask_ds.errors import UserError
from finemask_ds.run import write_json
from tests.conftest import REPOSITORY
from tests.dispatch.toys import WAIT_SEC

SHOW = """
import sys
from pathlib import Path
from finemask_ds.dispatch.status import show_status
show_status(Path(sys.argv[1]))
print("torch" in sys.modules)
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """One cell done, one running, one failed for good, one that will be tried again, two waiting."""
    names = ["done", "running", "failed", "again", "waiting", "also"]
    cells = [Cell(name, {"task": "mrpc" if name < "f" else "cola", "seed": 1}, "omp") for name in names]
    plan = Plan.write(tmp_path / "plan", cells, retries=1)
    done, running, failed, again = map(plan.folder, cells[:4])
    write_json(done / "result.json", {"task": "mrpc", "score": 0.5, "seconds": 100})
    assert claim(running, "cola", [])
    for folder, times in ((failed, 2), (again, 1)):
        for _ in range(times):
            claimed = claim(folder, "cola", attempts_of(folder), "logs/slot-0.log")
            assert claimed is not None
            claimed.attempt.fail("the loss is [red]NaN[/red]\x1b[2J", "Traceback")
            claimed.attempt.let_go()
    return plan


def shown(plan: Plan) -> str:
    stream = io.StringIO()
    show_status(plan.root, console=Console(file=stream))
    return stream.getvalue()


def test_a_pipe_gets_one_plain_table(plan):
    output = shown(plan)
    rows = {tuple(line.split()) for line in output.splitlines()}
    assert ("task", "method", "done", "running", "failed", "waiting", "cells") in rows
    assert ("mrpc", "omp", "1", "-", "-", "2", "3") in rows
    assert ("cola", "omp", "-", "1", "1", "1", "3") in rows
    assert ("total", "1", "1", "1", "3", "6") in rows
    assert re.search(r"1 of 6 cells are done, 1 running, about \d+ min \d+ s left\n", output)
    assert re.search(rf"\n  running: on {os.uname().nodename}, pid {os.getpid()} for \d+ s\n", output)
    path = plan.folder(plan.cells[2]) / "attempt-2" / "failed.json"
    assert f"failed: the loss is [red]NaN[/red]\\x1b[2J ({path}, log logs/slot-0.log)" in output
    assert "again, tried again: the loss is" in output
    assert "\x1b" not in output, "what a program printed does not reach the terminal as commands"
    assert max(map(len, output.splitlines())) > 80, "long lines are not cut in a pipe"


def test_a_plan_that_nobody_works_on_says_so(plan):
    (attempt,) = attempts_of(plan.folder(plan.cells[1]))
    attempt.let_go()
    assert "1 of 6 cells are done; nothing runs: dispatch again to go on, unless they wait in Slurm's queue\n" in shown(
        plan
    )


def test_asked_to_it_gives_failed_cells_new_attempts_and_the_plan_no_new_cells(plan, capsys):
    before = (plan.root / "plan.json").read_bytes()
    assert main(["status", str(plan.root), "--retry"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("failed cells that wait for a worker again: 1\n")
    assert ("total", "1", "1", "-", "4", "6") in {tuple(line.split()) for line in output.splitlines()}
    assert (plan.root / "plan.json").read_bytes() == before
    assert main(["status", str(plan.root), "--retry"]) == 0
    assert capsys.readouterr().out.startswith("failed cells that wait for a worker again: 0\n")


def test_looking_changes_nothing(plan):
    lock = plan.folder(plan.cells[1]) / "attempt-1" / "lock"
    os.utime(lock, (0, 0))
    before = sorted(plan.root.rglob("*"))
    shown(plan)
    assert sorted(plan.root.rglob("*")) == before


@pytest.mark.slow
def test_a_terminal_gets_a_live_table_until_all_is_done(plan):
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", SHOW, plan.root], stdout=slave, cwd=REPOSITORY, env={
        **os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"})  # fmt: skip
    os.close(slave)
    read_until(master, b"1 of 6 cells are done")
    for cell in plan.cells:
        write_json(plan.folder(cell) / "result.json", {"task": cell.task, "score": 0.5})
    read_until(master, b"6 of 6 cells are done")
    read_until(master, b"False")
    assert process.wait(WAIT_SEC) == 0
    os.close(master)


def read_until(terminal: int, expected: bytes) -> None:
    output = b""
    while expected not in output:
        assert select.select([terminal], [], [], WAIT_SEC)[0], output
        piece = os.read(terminal, 1)  # no more than is looked for
        assert piece, output
        output += piece


def test_a_folder_without_a_plan_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"holds no plan\.json"):
        show_status(tmp_path)


def test_no_module_of_dispatch_imports_torch():
    files = (REPOSITORY / "finemask_ds" / "dispatch").glob("[!_]*.py")
    modules = ["finemask_ds.commands.sweep", *(f"finemask_ds.dispatch.{path.stem}" for path in files)]
    assert len(modules) > 5
    code = f"import sys, {', '.join(modules)}; print('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert process.stdout == "False\n"
