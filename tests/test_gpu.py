"""What only an accelerator can show: fp16 and bf16 at speed, fused AdamW, NCCL. One rank; `pytest -m gpu`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from finemask_ds.masks.files import load_mask
from finemask_ds.masks.mask import Mask
from finemask_ds.run import Run
from finemask_ds.search.reconstruction import reconstruct
from tests.engine import jobs as engine_jobs
from tests.engine.test_checkpoints import contents
from tests.finetune.test_cell import cell
from tests.pool import RankPool
from tests.search import jobs
from tests.search.test_armour import DTYPES, assert_held, dtypes, logged, sixteen_bit
from tests.search.test_fast import assert_equal_bits
from tests.search.test_fast import config as fast_config
from tests.search.test_reconstruction import dev_blocks, opened
from tests.search.test_selection import selected

pytestmark = pytest.mark.gpu

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def gpu_rank() -> Iterator[RankPool]:
    if not torch.cuda.is_available():
        pytest.skip("needs an accelerator, and torch sees none on this machine")
    pool = RankPool(1, device="cuda")
    yield pool
    pool.close()


@pytest.mark.parametrize("method", ["tamt", "imp"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("stage", STAGES)
def test_a_16_bit_search_finds_about_what_fp32_finds(
    gpu_rank: RankPool, toy_bert: Path, toy_text: Path, tmp_path: Path, stage: int, dtype: str, method: str
) -> None:
    """With the shipped precision setting: an accelerator has fast 16-bit arithmetic, so nothing falls back."""
    (tmp_path / "fp32.json").write_text(f'{{"zero_optimization": {{"stage": {stage}}}}}')
    plain = jobs.either(method, tmp_path / "plain", toy_bert, toy_text)
    plain = dataclasses.replace(plain, deepspeed=str(tmp_path / "fp32.json"))
    low = {"fp16": {"enabled": False, "initial_scale_power": 4}}  # Nothing overflows: both see the same batches.
    config = sixteen_bit(jobs.either(method, tmp_path / "run", toy_bert, toy_text), tmp_path, stage, dtype, **low)
    config = dataclasses.replace(config, precision="fast")
    expected, result = jobs.find(plain, gpu_rank), jobs.find(config, gpu_rank)
    assert result["sparsity"] == expected["sparsity"]
    assert result["dev"]["mlm_loss"] == pytest.approx(expected["dev"]["mlm_loss"], rel=0.05)
    lines = logged(config)
    assert all(("scale/loss_scale" in line) == (dtype == "float16") for line in lines)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert [line["train/mlm_loss"] for line in lines] != [line["train/mlm_loss"] for line in logged(plain)]
    assert load_mask(Run(tmp_path / "run").mask).jaccard(load_mask(Run(tmp_path / "plain").mask)) > 0.8


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_matrices_are_16_bit_and_everything_learnt_is_fp32(
    gpu_rank: RankPool, toy_bert: Path, toy_text: Path, tmp_path: Path, stage: int, dtype: str
) -> None:
    config = sixteen_bit(jobs.tamt(tmp_path / "run", toy_bert, toy_text, objective="kd"), tmp_path, stage, dtype)
    (held,) = gpu_rank.run(dtypes, config)
    assert_held(held, DTYPES[dtype])


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_skips_and_halves(gpu_rank: RankPool, tmp_path: Path, stage: int) -> None:
    fp16 = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
    ((values, metrics, scale),) = gpu_rank.run(engine_jobs.overflowed, stage, tmp_path, fp16, [3], [], 4)
    ((without, _, _),) = gpu_rank.run(engine_jobs.overflowed, stage, tmp_path, fp16, [], [3], 4)
    assert (scale["scale"], scale["skipped"]) == (2.0**15, 1)
    assert math.isfinite(metrics["train/grad_norm"])
    for name, value in values.items():
        torch.testing.assert_close(value, without[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_holds_and_restores_every_bit(gpu_rank: RankPool, tmp_path: Path, stage: int) -> None:
    gpu_rank.run(engine_jobs.saved, stage, tmp_path, engine_jobs.BATCH, 3)
    gpu_rank.run(engine_jobs.moved, stage, tmp_path, engine_jobs.BATCH, tmp_path / "again")
    before, after = contents(tmp_path / "checkpoints/step-3"), contents(tmp_path / "again/step-3")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_selection_on_the_device_is_that_of_whole_matrices(
    gpu_rank: RankPool, toy_bert: Path, toy_text: Path, tmp_path: Path, scope: str
) -> None:
    config = jobs.tamt(tmp_path / "run", toy_bert, toy_text, 3, objective="kd", batch_size=12)
    right = {"masks": True, "thresholds": True, "within": True, "binarized": True}
    assert gpu_rank.run(selected, config, scope) == [right]


@pytest.mark.parametrize("dtype", ["fp32", *DTYPES])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_search_by_the_kernels_is_that_of_the_plain_path(
    gpu_rank: RankPool, toy_bert: Path, toy_text: Path, tmp_path: Path, scope: str, dtype: str
) -> None:
    """The first steps bit for bit: one whose sums an accelerator adds in another order may fall otherwise later."""
    configs = [fast_config(tmp_path / way, toy_bert, toy_text, scope=scope, steps=2) for way in ("fast", "plain")]
    if dtype != "fp32":
        configs = [dataclasses.replace(sixteen_bit(one, tmp_path, 2, dtype), precision="fast") for one in configs]
    else:
        (tmp_path / "fp32.json").write_text('{"zero_optimization": {"stage": 2}}')
        configs = [dataclasses.replace(one, deepspeed=str(tmp_path / "fp32.json")) for one in configs]
    gpu_rank.run(jobs.found, configs[0])
    gpu_rank.run(jobs.found_plainly, configs[1])
    assert_equal_bits(*configs)


def test_a_mask_by_reconstruction_is_about_the_one_that_a_cpu_finds(
    toy_bert: Path, toy_text: Path, tmp_path: Path
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an accelerator, and torch sees none on this machine")
    setting = opened(jobs.tamt(tmp_path / "run", toy_bert, toy_text))
    theta0, blocks = setting.theta0(), dev_blocks(setting)
    start = Mask.random(theta0.shapes, 0.7, seed=1)
    here, there = (reconstruct(theta0, blocks, start, torch.device(device)) for device in ("cpu", "cuda"))
    masks = [Mask({name: size >= 1 for name, size in sizes.items()}) for sizes in (here, there)]
    assert masks[0].jaccard(masks[1]) > 0.8
    assert all(size.device.type == "cpu" for size in there.values())


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_cell_on_the_device_keeps_its_zeros_and_learns(
    toy_bert: Path, toy_tasks: Path, toy_mask: Path, tmp_path: Path, precision: str
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an accelerator, and torch sees none on this machine")
    more = {"mask": str(toy_mask), "mixed_precision": precision, "steps": 60, "eval_every": 20}
    result = cell(toy_bert, toy_tasks, tmp_path / "run", "cola", **more)
    losses = [point["train_loss"] for point in result["curve"]]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert result["sparsity"] >= 0.69
