"""Loss scaling in every ZeRO stage: what overflows is skipped by all ranks, and the scale changes no number.

A factor of a power of two is exact, so that runs with other scales are equal bit for bit and need no tolerance.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from finemask_ds.engine.scaling import MAX_SKIPS_IN_A_ROW, LossScale
from finemask_ds.engine.world import World
from finemask_ds.errors import UserError
from tests.engine import jobs
from tests.engine.test_engines import STAGES
from tests.pool import RankPool, RanksFailedError

FP16: dict[str, Any] = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
BF16: dict[str, Any] = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def fp16(**keys: Any) -> dict[str, Any]:
    return {"fp16": {"enabled": True, **keys}}


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_on_one_rank_is_as_if_its_batch_had_never_been(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    """Both ranks skip, the scale halves, the schedule stands still, and the parameters agree bit for bit."""
    skipped = two_ranks.run(jobs.overflowed, stage, tmp_path, FP16, [3], [], 4)
    without = two_ranks.run(jobs.overflowed, stage, tmp_path, FP16, [], [3], 4)
    for values, metrics, scale in skipped:
        assert (scale["scale"], scale["skipped"]) == (2.0**15, 1)
        assert same(values, skipped[0][0])
        assert same(values, without[0][0])
        assert metrics == without[0][1]
    assert without[0][2] | {"scale": 2.0**15, "skipped": 1, "good_steps": 2, "overflows": 1} == skipped[0][2]


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
@pytest.mark.parametrize("stage", STAGES)
def test_no_scale_changes_an_update_or_a_norm(
    two_ranks: RankPool, tmp_path: Path, stage: int, max_grad_norm: float
) -> None:
    """Growing at every second step, dynamic or static: the same bits, so clipping and norms are of true gradients."""
    runs = {
        name: two_ranks.run(jobs.overflowed, stage, tmp_path, settings, [], [], 6, max_grad_norm)[0]
        for name, settings in {
            "dynamic": FP16,
            "growing": fp16(initial_scale_power=8, loss_scale_window=2),
            "static": fp16(loss_scale=1024),
        }.items()
    }
    values, metrics, scale = runs["dynamic"]
    assert [runs[name][2]["scale"] for name in runs] == [2.0**16, 2.0**11, 1024.0]
    assert scale["good_steps"] == 6
    for other, other_metrics, _ in runs.values():
        assert same(values, other)
        assert metrics == other_metrics
    plain = jobs.trained(World(), None, tmp_path, jobs.BATCH, max_grad_norm)
    assert metrics == pytest.approx(plain[1], rel=1e-2)
    parts = math.hypot(metrics["grad_norm/first"], metrics["grad_norm/second"])
    assert parts == pytest.approx(metrics["train/grad_norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_on_the_cpu_does_what_one_beside_the_model_does(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    """In fp32 the plain process's values and a resume bit for bit; in fp16, unclipped, the same bits and scale."""
    offload: dict[str, Any] = {"zero": {"offload_optimizer": {"device": "cpu"}}}
    plain, _ = jobs.trained(World(), None, tmp_path, jobs.BATCH, 0.5)
    for whole, continued, _ in two_ranks.run(jobs.resumed, stage, tmp_path, 3, offload):
        assert same(whole, continued)
        for name, value in plain.items():
            torch.testing.assert_close(whole[name], value, rtol=0, atol=2e-6)
    beside = two_ranks.run(jobs.overflowed, stage, tmp_path, FP16, [3], [], 4, 0.0)[0]
    elsewhere = two_ranks.run(jobs.overflowed, stage, tmp_path, {**FP16, **offload}, [3], [], 4, 0.0)
    for values, metrics, scale in elsewhere:
        assert same(values, beside[0])
        assert scale == beside[2]
        assert metrics == pytest.approx(beside[1], rel=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_the_scale_survives_a_checkpoint(two_ranks: RankPool, tmp_path: Path, stage: int) -> None:
    for whole, continued, scale, position in two_ranks.run(jobs.overflowed_and_resumed, stage, tmp_path, FP16):
        assert (scale["scale"], scale["skipped"], position) == (2.0**15, 1, 3)
        assert same(whole, continued)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_only_skips_stops_and_names_the_scale(two_ranks: RankPool, tmp_path: Path, stage: int) -> None:
    positions = list(range(1, 100))
    with pytest.raises(RanksFailedError, match=r"50 steps in a row .* loss scale is now 1; type") as failure:
        two_ranks.run(jobs.overflowed, stage, tmp_path, FP16, positions, [], 4)
    assert str(failure.value).count("50 steps in a row") >= 2  # both ranks say so


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.slow
def test_in_bf16_or_fp32_a_gradient_that_is_not_finite_stops_the_run(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    with pytest.raises(RanksFailedError, match="the loss is inf at step 3"):
        two_ranks.run(jobs.overflowed, stage, tmp_path, BF16 if stage % 2 else {}, [3], [], 4)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.slow
def test_bf16_trains_the_same_regression(two_ranks: RankPool, tmp_path: Path, stage: int) -> None:
    values, metrics, scale = two_ranks.run(jobs.overflowed, stage, tmp_path, BF16, [], [], 6)[0]
    plain_values, plain = jobs.trained(World(), None, tmp_path, jobs.BATCH, 0.5)
    assert scale == LossScale.off().state()
    assert metrics == pytest.approx(plain, rel=5e-2)
    assert metrics["train/loss"] != plain["train/loss"]  # it did compute in 16 bit
    assert all((values[name] - plain_values[name]).abs().max() < 5e-2 for name in values)


def scales(keys: dict[str, Any], overflows: str) -> list[float]:
    """The scale after each step; ``x`` is an overflow."""
    scale = LossScale.from_block(keys, "x.json")
    seen = []
    for sign in overflows:
        scale.update(overflow=sign == "x")
        seen.append(scale.scale)
    return seen


def test_the_keys_of_an_fp16_block_are_honoured() -> None:
    assert scales({"initial_scale_power": 3}, ".xx") == [8, 4, 2]
    assert scales({"initial_scale_power": 1, "min_loss_scale": 1}, "xxx") == [1, 1, 1]
    assert scales({"initial_scale_power": 2, "loss_scale_window": 2}, "..x.x..") == [4, 8, 4, 4, 2, 2, 4]
    assert scales({"loss_scale": 128}, "x..") == [128, 128, 128]
    assert scales({"loss_scale": "auto", "initial_scale_power": 3}, "x") == [4]
    assert scales({"initial_scale_power": 3, "hysteresis": 2}, "xx.xx") == [8, 4, 4, 2, 1]
    hesitant = {"initial_scale_power": 3, "hysteresis": 2, "consecutive_hysteresis": True}
    assert scales(hesitant, "x.x.xx") == [8, 8, 8, 8, 8, 4]
    for wrong in ({"loss_scale_window": 0}, {"hysteresis": "often"}, {"loss_scale": -1}):
        with pytest.raises(UserError, match=r"x\.json"):
            LossScale.from_block(wrong, "x.json")


def deepspeeds_scales(world: World, history: list[bool], hysteresis: int, refill: bool) -> list[float]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    theirs = DynamicLossScaler(2.0**16, 10**9, 1.0, hysteresis, refill, raise_error_at_min_scale=False)
    seen = []
    for overflow in history:
        theirs.update_scale(overflow)
        seen.append(theirs.cur_scale)
    return seen


@pytest.mark.parametrize("refill", [False, True])
@pytest.mark.parametrize("hysteresis", [1, 2, 3])
def test_backing_off_is_deepspeeds_own(two_ranks: RankPool, hysteresis: int, refill: bool) -> None:
    """Over a random history; DeepSpeed's doubles after one good step more than its window says, which we leave out."""
    draw = torch.Generator().manual_seed(0)
    history = (torch.rand(300, generator=draw) < 0.25).tolist()
    ours = LossScale(window=10**9, hysteresis=hysteresis, refill=refill)
    seen = []
    for overflow in history:
        ours.update(overflow=overflow)
        seen.append(ours.scale)
    assert seen == two_ranks.run(deepspeeds_scales, history, hysteresis, refill)[0]


def test_a_good_step_forgives_the_skips_before_it() -> None:
    scale = LossScale()
    for _ in range(MAX_SKIPS_IN_A_ROW - 1):
        scale.update(overflow=True)
    scale.update(overflow=False)
    assert scale.skipped == MAX_SKIPS_IN_A_ROW - 1
    for _ in range(MAX_SKIPS_IN_A_ROW - 1):
        scale.update(overflow=True)
    with pytest.raises(UserError, match="loss scale is now 1"):
        scale.update(overflow=True)
