"""The traps of DeepSpeed that the engine leans on or works around: a failure here tells that upstream mended one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from finemask_ds.engine.world import World
from tests.pool import RankPool


def _start(module: nn.Module, stage: int, **settings: Any) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        **settings,
    }
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=module, optimizer=torch.optim.AdamW(trained, lr=0.1), config=config)
    return engine


def _step(engine: Any) -> None:
    engine.backward(engine(torch.ones(2, 4)).sum())
    engine.step()


def _seeded_linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 4)


def default_clipping(world: World) -> float:
    return _start(_seeded_linear(), 2).gradient_clipping()


def test_clipping_is_on_by_default(two_ranks: RankPool) -> None:
    """Hence the engine always writes "gradient_clipping"."""
    assert two_ranks.run(default_clipping) == [1.0, 1.0]


def plain_edit(world: World, stage: int) -> float:
    """How far a parameter is from where an edit put it, one tiny step after the edit."""
    module = _seeded_linear()
    engine = _start(module, stage)
    _step(engine)
    with torch.no_grad():
        module.weight.data.copy_(torch.full((4, 4), 100.0))
    _step(engine)
    return float((module.weight - 100).abs().max())


@pytest.mark.parametrize("stage", [1, 2])
def test_a_plain_edit_is_undone_by_the_next_step(two_ranks: RankPool, stage: int) -> None:
    """Hence ``edit`` refreshes the fp32 masters."""
    assert min(two_ranks.run(plain_edit, stage)) > 50


def gathered_edit(world: World, modifier_rank: int | None, refresh: bool) -> float:
    import deepspeed

    module = _seeded_linear()
    engine = _start(module, 3, zero_optimization={"stage": 3, "stage3_param_persistence_threshold": 0})
    with torch.no_grad(), deepspeed.zero.GatheredParameters([module.weight], modifier_rank=modifier_rank):
        module.weight.copy_(torch.full((4, 4), 100.0))
    if refresh:
        engine.optimizer.refresh_fp32_params()
    _step(engine)
    with deepspeed.zero.GatheredParameters([module.weight]):
        return float((module.weight - 100).abs().max())


def test_in_stage_3_an_edit_without_modifier_rank_or_refresh_is_lost(two_ranks: RankPool) -> None:
    """Hence ``edit`` uses both."""
    assert min(two_ranks.run(gathered_edit, None, True)) > 50
    assert min(two_ranks.run(gathered_edit, 0, False)) > 50
    assert max(two_ranks.run(gathered_edit, 0, True)) < 1


class _OwnLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The scores are gathered while their own module runs, so they are read here.
        return super().forward(x) + 0 * self.scores.sum()


class _PlainLinearReader(nn.Module):
    """Reads the scores of an exact nn.Linear while it is gathered."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.inner.scores = nn.Parameter(torch.full((4, 4), 0.0100003))
        self.seen: float = 0.0
        self.inner.register_forward_hook(self._look)

    def _look(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.seen = float(module.scores.detach().float().max())  # type: ignore[operator,union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.inner.scores.sum()  # type: ignore[operator]


def scores_seen(world: World, own_class: bool) -> float:
    inner = _OwnLinear(4, 4) if own_class else nn.Linear(4, 4)
    module = _PlainLinearReader(inner)
    engine = _start(
        module, 3, torch_autocast={"enabled": True, "dtype": "bfloat16"},
        zero_optimization={"stage": 3, "stage3_param_persistence_threshold": 0},
    )  # fmt: skip
    engine(torch.ones(2, 4))
    return module.seen


def test_scores_on_an_exact_linear_are_gathered_in_16_bit(two_ranks: RankPool) -> None:
    """Hence the masked modules are classes of their own."""
    exact = torch.tensor(0.0100003).item()
    assert all(seen != exact for seen in two_ranks.run(scores_seen, False))
    assert all(seen == exact for seen in two_ranks.run(scores_seen, True))


def shipped_fp16(world: World, stage: int, overflow: bool) -> tuple[float, float]:
    """The loss scale after three steps with DeepSpeed's own scaler, and the gradient norm that it tells."""
    module = _seeded_linear()
    engine = _start(
        module, stage, torch_autocast={"enabled": True, "dtype": "float16"}, gradient_clipping=1.0,
        zero_optimization={"stage": stage, "stage3_param_persistence_threshold": 0},
    )  # fmt: skip
    for _ in range(3):
        engine.backward(engine(torch.ones(2, 4)).sum() * (torch.inf if overflow else 1.0))
        engine.step()
    return engine.optimizer.torch_autocast_gradscaler.get_scale(), float(engine.get_global_grad_norm())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_own_fp16_scale_never_backs_off_and_its_norms_are_scaled(two_ranks: RankPool, stage: int) -> None:
    """Hence the engine installs a scale of its own; a true norm here is about 9."""
    for scale, _ in two_ranks.run(shipped_fp16, stage, True):
        assert scale == 2.0**16
    for _, norm in two_ranks.run(shipped_fp16, stage, False):
        assert norm > 1e5


class _Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.first * x).sum()


def set_moment(world: World) -> str:
    """What DeepSpeed's own setter of moments says in stage 3 where two ranks do not divide five elements."""
    from deepspeed.utils import safe_set_full_optimizer_state

    module = _Reader()
    engine = _start(module, 3, zero_optimization={"stage": 3, "stage3_param_persistence_threshold": 0})
    engine.backward(engine(torch.ones(5)))
    engine.step()
    try:
        safe_set_full_optimizer_state(module.first, torch.arange(5.0), "exp_avg")
    except RuntimeError as error:
        return str(error)
    return ""


def test_deepspeed_cannot_set_moments_of_sizes_that_the_ranks_do_not_divide(two_ranks: RankPool) -> None:
    """Hence checkpoints write into the flat partitions by themselves (``Piece``)."""
    assert any(two_ranks.run(set_moment))
