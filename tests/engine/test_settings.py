"""The keys of a DeepSpeed file: those that DeepSpeed reads, and those of blocks that the engine makes anew."""

from __future__ import annotations

import json
from collections.abc import KeysView
from pathlib import Path
from typing import Any, ClassVar

import pytest

from finemask_ds.engine.settings import KEYS, REMOVED, read_settings
from finemask_ds.errors import UserError


class Asked(dict[str, Any]):
    """Notes the keys that are asked for, in all of its copies."""

    keys_asked: ClassVar[set[str]] = set()

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)

    def keys(self) -> KeysView[str]:
        return self  # type: ignore[return-value]


def test_the_known_keys_are_those_that_deepspeed_reads() -> None:
    """A failure here tells that upstream reads other keys now; "bfloat16" is an old spelling, which we do not read."""
    from deepspeed.runtime import config

    config.DeepSpeedConfig(Asked(train_batch_size=1))
    removed = set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert removed == REMOVED
    assert Asked.keys_asked - removed - {"bfloat16", "sequence_parallel_size"} == KEYS


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}, '"fp16_master_weights_and_grads", which'),
        (
            {"bf16": {"enabled": True, "immediate_grad_update": True}},
            'in its "bf16" block, has "immediate_grad_update"',
        ),
        ({"fp16": {"enabled": True, "initial_scale_powr": 8}}, 'type "initial_scale_power" or remove the key'),
        ({"bf16": {"enable": True}}, 'has "enable", which would be ignored; type "enabled"'),
        ({"torch_autocast": {"enabled": True, "lower_precision_safe_modules": ["torch.nn.Linear"]}}, "safe_modules"),
        ({"data_types": {"param_dtype": "bf16"}}, '"param_dtype"'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_no_key_of_a_block_is_lost_in_silence(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"x\.json.* which would be ignored; .*remove the key$") as caught:
        read_settings(path)
    assert sentence in str(caught.value)


def test_what_asks_for_nothing_may_stand_in_a_block(tmp_path: Path) -> None:
    """As files written for transformers' Trainer, and DeepSpeed's own example, have it; or one that is off."""
    settings = {
        "fp16": {"enabled": "auto", "auto_cast": False, "loss_scale": 0, "loss_scale_window": 1000,
                 "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1},
        "bf16": {"enabled": "auto", "bf16_master_weights_and_grads": "auto"},
        "torch_autocast": {"enabled": False, "lower_precision_safe_modules": ["torch.nn.Linear"]},
        "data_types": {"grad_accum_dtype": "auto", "keep_in_fp32_modules": "auto"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto", "steps_per_print": 2000, "wall_clock_breakdown": False,
    }  # fmt: skip
    path = tmp_path / "x.json"
    path.write_text(json.dumps(settings))
    assert read_settings(path) == settings
    settings |= {
        "fp16": {"enabled": False, "auto_cast": True},
        "bf16": {"enabled": True, "immediate_grad_update": False, "check_grad_overflow": True},
    }
    path.write_text(json.dumps(settings))
    assert read_settings(path) == settings
