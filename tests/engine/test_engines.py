"""Every engine is the plain one: same values, norms, edits and restarts in each ZeRO stage, whatever the rank count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finemask_ds.engine.world import World
from tests.engine import jobs
from tests.pool import RankPool

STAGES = tuple(stage if stage == 2 else pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2, 3))
"""ZeRO stages; the quick part of the suite looks at stage 2 only."""


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
@pytest.mark.parametrize("micro", [6, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_equal_the_plain_process(
    two_ranks: RankPool, tmp_path: Path, stage: int, micro: int, max_grad_norm: float
) -> None:
    expected, metrics = jobs.trained(World(), None, tmp_path, jobs.BATCH, max_grad_norm)
    for values, seen in two_ranks.run(jobs.trained, stage, tmp_path, micro, max_grad_norm):
        for name, value in expected.items():
            torch.testing.assert_close(values[name], value, rtol=0, atol=2e-6)
        assert seen == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_an_edit_reaches_every_copy_and_the_moments_are_forgotten(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    plain = jobs.make(World(), None, tmp_path, micro=jobs.BATCH, max_grad_norm=0.5)
    plain.edit((name, torch.ones_like(value)) for name, value in plain.parameters.items())
    jobs.run_steps(World(), None, tmp_path, micro=jobs.BATCH, last=3, engine=plain)
    for ones, after_edit, moments, trained in two_ranks.run(jobs.edited, stage, tmp_path, 6):
        assert all(torch.equal(after_edit[name], ones[name]) for name in ones)
        assert moments
        assert set(moments.values()) == {0.0}
        for name, value in jobs.values(plain).items():
            torch.testing.assert_close(trained[name], value, rtol=0, atol=2e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resume_is_bit_exact(two_ranks: RankPool, tmp_path: Path, stage: int) -> None:
    for whole, continued, state in two_ranks.run(jobs.resumed, stage, tmp_path, 3):
        assert state["note"] == "x"
        assert all(torch.equal(whole[name], continued[name]) for name in whole)


def test_a_plain_resume_is_bit_exact(tmp_path: Path) -> None:
    whole, continued, _ = jobs.resumed(World(), None, tmp_path, 4)
    assert all(torch.equal(whole[name], continued[name]) for name in whole)
