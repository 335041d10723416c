"""Sparsity over time."""

from __future__ import annotations

import pytest

from finemask_ds.masks.schedule import cubic, ladder


def test_the_ladder_climbs_in_exact_decimals():
    assert ladder(0.7) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert ladder(0.9)[2] == 0.3
    assert ladder(0.8, start=0.2, step=0.3) == [0.2, 0.5, 0.8]


@pytest.mark.parametrize(
    ("target", "rungs"),
    [(0.25, [0.1, 0.2, 0.25]), (0.05, [0.05]), (0.1, [0.1]), (0.0, [0.0]), ((sum := 0.1 + 0.2), [0.1, 0.2, sum])],
)
def test_the_last_rung_is_the_target(target, rungs):
    assert ladder(target) == rungs


def test_a_ladder_has_to_climb():
    with pytest.raises(ValueError, match="positive"):
        ladder(0.5, step=0.0)


def test_cubic_is_zhu_and_gupta():
    schedule = [cubic(step, 0.8, begin=100, end=200) for step in (0, 100, 150, 200, 300)]
    assert schedule == pytest.approx([0.0, 0.0, 0.8 * (1 - 0.5**3), 0.8, 0.8], abs=1e-15)
    assert cubic(100, 0.8, begin=100, end=200, initial=0.3) == pytest.approx(0.3)
    assert [cubic(step, 0.8, begin=10, end=10) for step in (9, 10)] == [0.0, 0.8]
