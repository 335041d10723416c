"""The searches under the engine's armour: in 16 bit, moved to other ranks and stages, and with ranks that disagree."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from finemask_ds.config import SearchConfig, TamtConfig
from finemask_ds.engine.world import World
from finemask_ds.errors import UserError
from finemask_ds.masks.files import load_mask
from finemask_ds.models.patch import masked_modules
from finemask_ds.run import Run
from finemask_ds.search import tamt
from finemask_ds.search.objectives import Objective
from finemask_ds.search.selection import ScoreMasks
from finemask_ds.search.setting import open_setting
from tests.engine.test_engines import STAGES
from tests.pool import RankPool
from tests.search import jobs

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def sixteen_bit(config: Any, folder: Path, stage: int, dtype: str, **more: Any) -> Any:
    """The configuration with a DeepSpeed file of its own that asks for 16 bit, also on this CPU."""
    file = folder / f"{dtype}-{stage}.json"
    file.write_text(
        json.dumps({"zero_optimization": {"stage": stage}, "torch_autocast": {"enabled": True, "dtype": dtype}, **more})
    )
    return dataclasses.replace(config, deepspeed=str(file), precision="file")


def logged(config: SearchConfig) -> list[dict[str, float]]:
    """What was logged in training; IMP's last line is of its last mask alone."""
    lines = [json.loads(line) for line in Run(Path(config.run)).metrics.read_text().splitlines()]
    return [line for line in lines if "train/mlm_loss" in line]


@pytest.mark.parametrize("method", ["tamt", "imp"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.slow
def test_a_16_bit_search_finds_about_what_fp32_finds(
    two_ranks: RankPool, toy_bert: Path, toy_text: Path, tmp_path: Path, stage: int, dtype: str, method: str
) -> None:
    plain_config = jobs.either(method, tmp_path / "plain", toy_bert, toy_text)
    plain = jobs.find(plain_config)
    low = {"fp16": {"enabled": False, "initial_scale_power": 4}}  # Nothing overflows: both see the same batches.
    config = sixteen_bit(jobs.either(method, tmp_path / "run", toy_bert, toy_text), tmp_path, stage, dtype, **low)
    result = jobs.find(config, two_ranks)
    assert result["sparsity"] == plain["sparsity"]
    assert result["dev"]["mlm_loss"] == pytest.approx(plain["dev"]["mlm_loss"], rel=0.05)
    masks = [load_mask(Run(folder).mask) for folder in (tmp_path / "plain", tmp_path / "run")]
    assert masks[0].jaccard(masks[1]) > 0.8
    lines = logged(config)
    assert all(("scale/loss_scale" in line) == (dtype == "float16") for line in lines)
    assert not any(line.get("scale/skipped_steps") for line in lines)
    losses = [[line["train/mlm_loss"] for line in logged(run)] for run in (config, plain_config)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]  # it did compute in 16 bit


def dtypes(world: World, config: TamtConfig) -> dict[str, set[torch.dtype]]:
    """What the parameters of a model under learnt masks are held in, once an engine runs; and its moments."""
    setting = open_setting(config, world, model=config.model, data=config.data)
    theta0, _, groups = tamt.freeze(setting, config)
    engine = setting.engine(Objective(theta0.model, "kd"), groups)
    modules = masked_modules(theta0.model).values()
    state = engine.optimizer_state()
    return {
        "scores": {module.scores.dtype for module in modules if module.scores is not None},
        "weights": {module.weight.dtype for module in modules},
        "frozen vectors": {value.dtype for name, value in theta0.model.named_parameters() if name.endswith("bias")},
        "masters": {piece.leaf.dtype for piece in engine.pieces},
        "moments": {tensor.dtype for piece in engine.pieces for tensor in state.get(piece.leaf, {}).values()},
    }


def assert_held(held: dict[str, set[torch.dtype]], weights: torch.dtype) -> None:
    """Frozen matrices in 16 bit, all else in fp32; some engines have no moments before the first step."""
    assert held.pop("weights") == {weights}
    assert held.pop("moments") in ({torch.float32}, set())
    assert set(map(frozenset, held.values())) == {frozenset({torch.float32})}


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_matrices_are_16_bit_and_everything_learnt_is_fp32(
    two_ranks: RankPool, toy_bert: Path, toy_text: Path, tmp_path: Path, stage: int, dtype: str
) -> None:
    config = sixteen_bit(jobs.tamt(tmp_path / "run", toy_bert, toy_text, objective="kd"), tmp_path, stage, dtype)
    for held in two_ranks.run(dtypes, config):
        assert_held(held, DTYPES[dtype])


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_killed_fp16_run_goes_on_bit_for_bit(
    two_ranks: RankPool, toy_bert: Path, toy_text: Path, tmp_path: Path, stage: int
) -> None:
    """With a scale so high that it overflows at first: the steps skipped, the scale and the data position come back."""
    high = {"fp16": {"enabled": False, "initial_scale_power": 30, "loss_scale_window": 4}}

    def config(name: str) -> TamtConfig:
        made = jobs.tamt(tmp_path / name, toy_bert, toy_text)
        return sixteen_bit(made, tmp_path, stage, "float16", **high)

    two_ranks.run(jobs.found, config("whole"))
    two_ranks.run(jobs.killed_after, config("killed"), 10)
    two_ranks.run(jobs.found, config("killed"))
    one, two = (jobs.last_values(config(name)) for name in ("whole", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    drop = ("speed", "memory", "time")
    lines = [
        [{key: value for key, value in line.items() if not key.startswith(drop)} for line in logged(config(name))]
        for name in ("whole", "killed")
    ]
    assert lines[0] == lines[1]
    assert lines[0][-1]["scale/skipped_steps"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tamt", "imp"])
def test_a_killed_run_goes_on_elsewhere(
    pools: dict[int, RankPool], toy_bert: Path, toy_text: Path, tmp_path: Path, method: str
) -> None:
    """From two ranks in stage 2 to three in stage 3 to one plain process: the mask of the run that never moved."""

    def config(name: str, stage: int | None) -> Any:
        return jobs.either(method, tmp_path / name, toy_bert, toy_text, stage, batch_size=12, save_every=3)

    whole = jobs.find(config("whole", None))
    pools[2].run(jobs.killed_after, config("moved", 2), 6)
    pools[3].run(jobs.killed_after, config("moved", 3), 9)
    moved = jobs.find(config("moved", None))
    assert moved["dev"] == pytest.approx(whole["dev"], rel=1e-4)
    one, two = (load_mask(Run(tmp_path / name).mask) for name in ("whole", "moved"))
    assert one.distance(two) < 1e-3


def led_astray(world: World, config: TamtConfig) -> str:
    """Run a search in which one rank's mask loses a bit at step 7."""
    after_step = ScoreMasks.after_step

    def astray(self: ScoreMasks, step: int) -> None:
        after_step(self, step)
        if step == 7 and world.rank == 1:
            module = next(iter(masked_modules(self.model).values()))
            module.mask[0, 0] ^= True

    with mock.patch.object(ScoreMasks, "after_step", astray):
        return jobs.failed(world, config)


def test_ranks_whose_masks_differ_stop(two_ranks: RankPool, toy_bert: Path, toy_text: Path, tmp_path: Path) -> None:
    config = jobs.tamt(tmp_path / "run", toy_bert, toy_text, 2, agree_every=7)
    for told in two_ranks.run(led_astray, config):
        assert "embeddings.weight on rank 1 is not that of rank 0 at step 7 (1 of 13 matrices differ)" in told


@pytest.mark.parametrize("kind", ["score", "moment"])
def test_a_16_bit_score_anywhere_stops_the_run(toy_bert: Path, toy_text: Path, tmp_path: Path, kind: str) -> None:
    config = jobs.tamt(tmp_path / "run", toy_bert, toy_text, agree_every=4)
    after_step = ScoreMasks.after_step

    def rounded(self: ScoreMasks, step: int) -> None:
        after_step(self, step)
        if step == 4:
            scores = next(iter(self.engine.parameters.values()))
            if kind == "moment":
                state = self.engine.optimizer_state()[scores]
                state["exp_avg"] = state["exp_avg"].bfloat16()
            else:
                scores.data = scores.data.half()

    with mock.patch.object(ScoreMasks, "after_step", rounded):
        with pytest.raises(UserError, match=r"became torch\.(float16|bfloat16)"):
            jobs.find(config)


def test_what_is_watched_is_in_the_log_and_in_tensorboard(
    two_ranks: RankPool, toy_bert: Path, toy_text: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = sixteen_bit(jobs.tamt(tmp_path / "run", toy_bert, toy_text), tmp_path, 2, "float16")
    result = jobs.find(config, two_ranks)
    board = EventAccumulator(str(Run(tmp_path / "run").tensorboard), size_guidance={"scalars": 0})
    board.Reload()
    tags = board.Tags()
    roles = ("Q", "K", "V", "AO", "FI", "FO", "Emb")
    assert {"scale/loss_scale", "scale/skipped_steps", *(f"grad_norm/{role}" for role in (*roles, "other"))} <= set(
        tags["scalars"]
    )
    assert {f"mask/margin/{role}" for role in roles} <= set(tags["histograms"])
    for line in logged(config):
        parts = [value**2 for name, value in line.items() if name.startswith("grad_norm/")]
        assert sum(parts) ** 0.5 == pytest.approx(line["train/grad_norm"], rel=1e-3)
    assert board.Scalars("final/mlm_loss")[0].value == pytest.approx(result["dev"]["mlm_loss"])
    plugins = board.summary_metadata
    assert {"_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"} <= set(plugins)
    assert b"mask_lr" in plugins["_hparams_/session_start_info"].plugin_data.content
