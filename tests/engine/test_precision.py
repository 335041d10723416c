"""Precision, batching and schedules: what a DeepSpeed file may ask for, and that 16-bit trained values are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finemask_ds.engine.base import Batching, Group
from finemask_ds.engine.local import LocalEngine
from finemask_ds.engine.loop import Span
from finemask_ds.engine.precision import resolve_precision
from finemask_ds.engine.scaling import LossScale
from finemask_ds.engine.settings import check_numbers, check_settings, read_settings, size_buckets
from finemask_ds.engine.world import World
from finemask_ds.engine.zero import ZeroEngine
from finemask_ds.errors import UserError
from tests.conftest import REPOSITORY
from tests.engine import jobs
from tests.engine.test_engines import STAGES
from tests.pool import RankPool

CPU = torch.device("cpu")


@pytest.mark.parametrize(("block", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_block_that_would_cast_the_scores_is_translated_and_told(block: str, dtype: torch.dtype) -> None:
    asked = {block: {"enabled": True, "initial_scale_power": 4}}
    settings, precision = resolve_precision(asked, CPU, "x.json", as_asked=True)
    name = str(dtype).removeprefix("torch.")
    assert settings == {"torch_autocast": {"enabled": True, "dtype": name, "lower_precision_safe_modules": []}}
    assert precision.compute == dtype
    assert f'its "{block}" block' in precision.told
    assert "\n" not in precision.told
    assert precision.loss_scale == (LossScale(scale=16.0) if block == "fp16" else LossScale.off())
    assert resolve_precision({block: {"enabled": False}}, CPU, "x.json")[0] == {}


def test_a_cpu_goes_on_in_fp32_and_says_so() -> None:
    for name in ("bfloat16", "float16"):
        asked = {"torch_autocast": {"enabled": True, "dtype": name}}
        settings, precision = resolve_precision(asked, CPU, "x.json")
        assert settings == {}
        assert precision.compute == torch.float32
        assert precision.loss_scale == LossScale.off()
        assert f"compute in fp32: x.json asks for {name}" in precision.told
        settings, precision = resolve_precision(asked, CPU, "x.json", as_asked=True)
        assert settings["torch_autocast"]["dtype"] == name
        assert precision.loss_scale.is_on == (name == "float16")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"torch_autocast": {"enabled": True, "dtype": "float8"}}, 'type "float16" or "bfloat16"'),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "keep one of the two"),
        ({"fp16": {"enabled": True}, "torch_autocast": {"enabled": True}}, "keep one of the two"),
    ],
)
def test_two_precisions_or_an_unknown_one_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=rf"x\.json .*{told}"):
        resolve_precision(settings, CPU, "x.json")


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs/ds").glob("*.json")), ids=lambda file: file.stem)
def test_shipped_files_hold_no_number_of_the_training(file: Path) -> None:
    settings = read_settings(file)
    assert settings["zero_optimization"]["stage"] == int(file.stem[4])
    assert settings.keys() == {"zero_optimization", "communication_data_type", "torch_autocast"}
    assert ("offload_optimizer" in settings["zero_optimization"]) == ("offload" in file.stem)
    assert settings["torch_autocast"]["dtype"] == ("float16" if "fp16" in file.stem else "bfloat16")
    assert f"`{file.name}`" in (file.parent / "README.md").read_text()
    check_settings(settings, str(file))


def test_buckets_hold_the_largest_trained_parameter() -> None:
    settings: dict[str, Any] = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 7, "allgather_bucket_size": "auto"}
    }
    size_buckets(settings, nn.Linear(3, 5).parameters())
    assert settings["zero_optimization"] == {
        "stage": 2, "reduce_bucket_size": 7, "allgather_bucket_size": 16, "stage3_prefetch_bucket_size": 16,
    }  # fmt: skip


class Weight(nn.Module):
    """Its own gradient is one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"loss": self.weight.sum()}


def summed_gradient(world: World, stage: int, folder: Path, settings: dict[str, Any]) -> float | str:
    """Norm of a gradient of 1 + 2 ** -12 on each rank, which bf16 cannot hold."""
    module = Weight()
    file = jobs.settings_file(folder, stage, **settings)
    groups, batching = [Group("weight", {"weight": module.weight}, 1e-3)], Batching(1, 1)
    try:
        engine = ZeroEngine(module, groups, world, batching=batching, max_grad_norm=0.0, file=file, as_asked=True)
    except UserError as error:
        return str(error)
    engine.backward(engine.forward({})["loss"] * (1 + 2**-12))
    return engine.step({"weight": 1e-3}).norm


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_summed_in_fp32_or_in_the_type_asked_for(two_ranks: RankPool, tmp_path: Path, stage: int) -> None:
    exact, bf16 = 2 * (1 + 2**-12), {"communication_data_type": "bf16"}
    autocast = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    for settings in ({}, {"communication_data_type": "fp32"}, autocast):
        assert two_ranks.run(summed_gradient, stage, tmp_path, settings) == [exact, exact]
    assert two_ranks.run(summed_gradient, stage, tmp_path, bf16) == [2.0, 2.0]
    unknown = two_ranks.run(summed_gradient, stage, tmp_path, {"communication_data_type": "int8"})
    assert all('type "fp32", "fp16" or "bf16"' in str(told) for told in unknown)
    both = two_ranks.run(summed_gradient, stage, tmp_path, {**bf16, **autocast})
    if stage == 3:
        assert all("would gather the scores in 16 bit" in str(told) for told in both)
    else:
        assert both == [2.0, 2.0]


def test_a_number_set_in_two_places_names_both(tmp_path: Path) -> None:
    ours = {"gradient_clipping": ("--max_grad_norm", 1.0)}
    check_numbers({"gradient_clipping": 1.0}, ours, "x.json")
    check_numbers({"gradient_clipping": "auto"}, ours, "x.json")
    with pytest.raises(UserError, match=r'x\.json fixes "gradient_clipping" to 0\.5 but --max_grad_norm is 1\.0'):
        check_numbers({"gradient_clipping": 0.5}, ours, "x.json")
    with pytest.raises(UserError, match="--mask_lr"):
        check_settings({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, "x.json")
    with pytest.raises(UserError, match="does not exist"):
        read_settings(tmp_path / "none.json")
    (tmp_path / "list.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="one JSON object"):
        read_settings(tmp_path / "list.json")


def test_16_bit_trained_values_are_refused() -> None:
    module = nn.Linear(2, 2).bfloat16()
    groups = [Group("mask", dict(module.named_parameters()), 1e-3)]
    with pytest.raises(UserError, match="must stay fp32"):
        LocalEngine(module, groups, batching=Batching(1, 1), max_grad_norm=1.0)


def test_a_step_is_dealt_out_whole_or_refused() -> None:
    assert Batching.of(16, 0, 2) == Batching(8, 1)
    assert Batching.of(16, 2, 2) == Batching(2, 4)
    for batch, micro, ranks in ((16, 3, 2), (7, 0, 2), (1, 0, 2)):
        with pytest.raises(UserError, match="type a multiple of"):
            Batching.of(batch, micro, ranks)


def test_the_schedule_is_hugging_faces_linear_one() -> None:
    """First step at the full rate, linear to zero; a restarted schedule counts from its origin."""
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = get_linear_schedule_with_warmup(optimizer, 0, 10)
    for step in range(1, 11):
        assert Span(1, 10, decay=10).factor(step) == pytest.approx(theirs.get_last_lr()[0])
        assert Span(21, 30, decay=10, origin=20).factor(step + 20) == Span(1, 10, decay=10).factor(step)
        optimizer.step()
        theirs.step()
    assert [Span(1, 10, decay=10, warmup=3).factor(step) for step in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert Span(1, 12, decay=10).factor(12) == 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"zero_optimization": {"stage": "two"}}, 'asks for ZeRO stage "two"; type 0, 1, 2 or 3'),
        ({"zero_optimization": True}, 'has "zero_optimization": true; it must be a block'),
        ({"torch_autocast": True}, 'has "torch_autocast": true; it must be a block'),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "would round the scores"),
        ({"amp": {"enabled": True}}, 'has an "amp" block; remove it'),
        ({"data_types": {"grad_accum_dtype": "fp16"}}, 'has "grad_accum_dtype": "fp16"; type "fp32"'),
        (
            {"zero_optimisation": {"stage": 3}},
            'has "zero_optimisation", which would be ignored; type "zero_optimization"',
        ),
        ({"comunication_data_type": "bf16"}, 'type "communication_data_type" or remove the key'),
        ({"my_remark": "of mine"}, 'has "my_remark", which would be ignored; remove the key'),
        ({"bfloat16": {"enabled": True}}, 'has "bfloat16", which would be ignored; type "bf16"'),
        ({"elasticity": {"enabled": False}}, 'has "elasticity", which DeepSpeed has removed; remove the key'),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "DeepSpeed refuses a key (MiCS ZeRO-3 sharding"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}},
            'has "offload_optimizer" to "nvme", from which no checkpoint can be written; type "cpu"',
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, 'has "offload_param" to "nvme"'),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, 'DeepSpeed refuses "offload_optimizer"'),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "every step needs the norm; remove the key"),
        ({"gradient_allreduce_op": "sum"}, 'has "gradient_allreduce_op": "sum"; type "mean"'),
        ({"zero_optimization": {"stage": 2, "reduce_skatter": True}}, 'DeepSpeed refuses "reduce_skatter"'),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "perhaps"}}, 'DeepSpeed refuses "overlap_comm"'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_file_cannot_ask_for_is_a_sentence(
    two_ranks: RankPool, tmp_path: Path, settings: dict[str, object], sentence: str
) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(settings))
    told = two_ranks.run(refused, str(path))
    assert all(str(path) in one and sentence in one for one in told), told


def refused(world: World, file: str) -> str:
    """What the engine says of a file."""
    module = nn.Linear(2, 2)
    groups = [Group("mask", dict(module.named_parameters()), 1e-3)]
    try:
        ZeroEngine(module, groups, world, batching=Batching(1, 1), max_grad_norm=1.0, file=file)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_small_gradients_of_micro_batches_do_not_vanish(two_ranks: RankPool, tmp_path: Path, stage: int) -> None:
    """1e-8 is below what fp16 can hold; DeepSpeed would add gradients up in what "data_types" says."""
    exact = two_ranks.run(added_up, stage, tmp_path, {})
    assert exact == two_ranks.run(added_up, stage, tmp_path, {"data_types": {"grad_accum_dtype": "auto"}})
    assert exact[0] > 1e-8


def added_up(world: World, stage: int, folder: Path, settings: dict[str, object]) -> float:
    """The norm of the gradient of two micro-batches, each of 1e-8 for one weight."""
    path = folder / f"{world.rank}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}, **settings}))
    module = Scaled()
    groups = [Group("mask", dict(module.named_parameters()), 1e-3)]
    engine = ZeroEngine(module, groups, world, batching=Batching(1, 2), max_grad_norm=0.0, file=str(path))
    for _ in range(2):
        engine.backward(engine.forward({"x": torch.full((1,), 1e-8)})["loss"] / 2)
    return engine.step({"mask": 0.0}).norm


class Scaled(nn.Module):
    """A weight times a number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * batch["x"]).sum()}
