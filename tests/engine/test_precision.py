"""Precision, batching and schedules: what a DeepSpeed file may ask for, and that 16-bit trained values are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from finemask_ds.engine.base import Batching, Group
from finemask_ds.engine.local import LocalEngine
from finemask_ds.engine.loop import Span
from finemask_ds.engine.precision import resolve_precision
from finemask_ds.engine.zero import check_settings, read_settings
from finemask_ds.errors import UserError
from tests.conftest import REPOSITORY

CPU = torch.device("cpu")


@pytest.mark.parametrize("block", ["fp16", "bf16"])
def test_a_block_that_would_cast_the_scores_is_refused(block: str) -> None:
    with pytest.raises(UserError, match="torch_autocast"):
        resolve_precision({block: {"enabled": True}}, CPU, "x.json")
    assert resolve_precision({block: {"enabled": False}}, CPU, "x.json")[0] == {}


def test_a_cpu_goes_on_in_fp32_and_says_so() -> None:
    settings, told = resolve_precision({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, CPU, "x.json")
    assert settings == {}
    assert "fp32" in told
    assert "x.json asks for bfloat16" in told
    with pytest.raises(UserError, match="float16"):
        resolve_precision({"torch_autocast": {"enabled": True, "dtype": "float16"}}, CPU, "x.json")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_shipped_files_hold_no_number_of_the_training(stage: int) -> None:
    file = REPOSITORY / f"configs/ds/zero{stage}.json"
    settings = read_settings(file)
    assert settings["zero_optimization"]["stage"] == stage
    assert settings.keys() == {"zero_optimization", "torch_autocast"}
    check_settings(settings, {"train_batch_size": ("--batch_size", 16)}, str(file))


def test_a_number_set_in_two_places_names_both(tmp_path: Path) -> None:
    ours = {"gradient_clipping": ("--max_grad_norm", 1.0)}
    check_settings({"gradient_clipping": 1.0}, ours, "x.json")
    check_settings({"gradient_clipping": "auto"}, ours, "x.json")
    with pytest.raises(UserError, match=r'x\.json fixes "gradient_clipping" to 0\.5 but --max_grad_norm is 1\.0'):
        check_settings({"gradient_clipping": 0.5}, ours, "x.json")
    with pytest.raises(UserError, match="--mask_lr"):
        check_settings({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, ours, "x.json")
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
