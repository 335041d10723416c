"""Workers as processes."""

from __future__ import annotations

import os

import pytest

from finemask_ds.dispatch.process import end, has_ended, reap, spawn
from finemask_ds.lock import lives
from tests.dispatch.toys import until

LEAVES_A_CHILD = "sleep 600 & echo $! >child.part; mv child.part child"


@pytest.mark.parametrize(("script", "code"), [(LEAVES_A_CHILD, 0), (f"{LEAVES_A_CHILD}; wait", -15)])
def test_children_of_a_worker_end_with_it_even_where_it_had_ended_unseen(tmp_path, script, code):
    worker = spawn(["bash", "-c", script], tmp_path / "log", os.environ, tmp_path)
    until(lambda: (tmp_path / "child").exists() and has_ended(worker) == (code == 0))
    child = int((tmp_path / "child").read_text())
    assert lives(child)
    end([worker], grace_sec=10)
    until(lambda: not lives(child))
    assert reap(worker) == code
