"""Wall time of a run, and of its ranks together, over starts with different numbers of them."""

from __future__ import annotations

import pytest

from finemask_ds.engine.stopwatch import Stopwatch


def test_each_start_counts_its_own_ranks() -> None:
    now = Stopwatch().started
    first = Stopwatch(ranks=4, started=now - 1000)
    second = Stopwatch(ranks=2, started=now - 100)
    second.go_on(first.state())
    assert second.seconds == pytest.approx(1100, abs=1)
    assert second.rank_seconds == pytest.approx(4 * 1000 + 2 * 100, abs=10)


def test_a_checkpoint_that_does_not_tell_was_made_on_as_many() -> None:
    watch = Stopwatch(ranks=2)
    watch.go_on({"seconds": 50.0})
    assert watch.rank_seconds == pytest.approx(100, abs=1)
