"""The methods that speed.py times, as a RankPool's processes run them: prepared once, then some steps at a time."""

from __future__ import annotations

import ctypes
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks import naive
from benchmarks.common import seconds_of
from finemask_ds.config import ImpConfig, SearchConfig, TamtConfig
from finemask_ds.data.ahead import Batches
from finemask_ds.engine.base import Engine, Group
from finemask_ds.engine.local import LocalEngine
from finemask_ds.engine.loop import Hook, Span, train
from finemask_ds.engine.memory import forget_peak_memory, peak_memory_gib
from finemask_ds.engine.metrics import Recorder
from finemask_ds.engine.world import World
from finemask_ds.finetune.constrain import FixedMask
from finemask_ds.masks.initialise import ranked
from finemask_ds.models.load import Pretrained
from finemask_ds.models.patch import write_mask
from finemask_ds.recipes.stages import REPOSITORY
from finemask_ds.search import imp, tamt
from finemask_ds.search.magnitude import omp_mask
from finemask_ds.search.objectives import Objective, counts
from finemask_ds.search.selection import ScoreMasks
from finemask_ds.search.setting import Setting, batching_of, freeze_all_but, head_group, open_setting
from finemask_ds.silence import silent_output

SCHEDULE_STEPS = 100_000
"""So many that the learning rates hardly fall while steps are timed."""


@dataclass(frozen=True)
class Setup:
    """What some methods are compared on."""

    group: str
    ranks: int
    threads: int
    """Of each rank."""
    stage: int | None
    """ZeRO stage; None: LocalEngine, which takes one rank."""
    flights: tuple[tuple[str, ...], ...]
    """Methods that are alive together, the first of which the others are compared with."""
    model: str
    data: str
    options: Mapping[str, Any]
    """Of every search: batch_size, seq_len and the like."""
    mask_lr: float = 1e-4
    device: str = "cpu"
    turn_steps: int = 1
    """Timed steps that a method takes in its turn."""
    rests: bool = False
    """After its turn a process gives the memory it has freed back, so that all have room; an untimed step takes it."""

    @property
    def name(self) -> str:
        """For instance ``builtin-2r-zero3``."""
        return f"{self.group}-{self.ranks}r-{'local' if self.stage is None else f'zero{self.stage}'}"

    def config(self, method: str, run: str) -> SearchConfig:
        """The knobs of a method."""
        file = "" if self.stage is None else str(REPOSITORY / f"configs/ds/zero{self.stage}.json")
        shared = {"model": self.model, "data": self.data, "run": run, "deepspeed": file, **self.options}
        if method in ("tamt-mlm", "tamt-kd", "naive"):
            objective = "kd" if method == "tamt-kd" else "mlm"
            scores = {"init": "ranked", "mask_lr": self.mask_lr, "steps": SCHEDULE_STEPS}
            return TamtConfig(objective=objective, **scores, **shared)
        return ImpConfig(**shared)


@dataclass
class Training:
    """A method that is ready to take steps."""

    engine: Engine
    objective: Objective
    hooks: list[Hook]
    batches: Batches
    seed: int
    recorder: Recorder = field(default_factory=Recorder)
    num_taken: int = 0

    def train(self, number: int) -> None:
        """Take the next steps, with all that belongs to them."""
        span = Span(self.num_taken + 1, self.num_taken + number, decay=SCHEDULE_STEPS)
        train(self.engine, self.objective, self.batches, counts, span, self.recorder, seed=self.seed, hooks=self.hooks)
        self.num_taken += number


HELD: list[Training] = []
"""The one method of this process."""


def prepare(world: World, method: str, setup: Setup, run: str) -> dict[str, int]:
    """Load the model and start its engine; the model's sizes."""
    torch.set_num_threads(setup.threads)
    with silent_output():
        config = setup.config(method, run)
        setting = open_setting(config, world, model=config.model, data=config.data)
        engine, objective, hooks = METHODS[method](setting)
    HELD.append(Training(engine, objective, hooks, setting.train_batches(), setting.config.seed))
    known = objective.model.config
    return {
        "layers": known.num_hidden_layers, "hidden": known.hidden_size, "inner": known.intermediate_size,
        "vocabulary": known.vocab_size,
    }  # fmt: skip


def take_turn(world: World, setup: Setup) -> float:
    """Take the next steps; seconds of one."""
    if setup.rests:
        HELD[0].train(1)
    world.barrier()
    seconds = seconds_of(lambda: HELD[0].train(setup.turn_steps), world.device)
    if setup.rests:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return seconds / setup.turn_steps


def forget_peak(world: World) -> None:
    """Start the peak of memory anew."""
    forget_peak_memory(world.device)


def peak_gib(world: World) -> float:
    """Most memory that this rank has used since ``forget_peak``."""
    return peak_memory_gib(world.device)


def matmul_rate(world: World, size: int = 16_384) -> float:
    """FLOP/s of a large product of bf16 matrices on this device, the median of 20."""
    left, right = (torch.randn(size, size, device=world.device, dtype=torch.bfloat16) for _ in range(2))
    times = [seconds_of(lambda: left @ right, world.device) for _ in range(25)]
    return 2 * size**3 / statistics.median(times[5:])


Ready = tuple[Engine, Objective, list[Hook]]


def dense(setting: Setting) -> Ready:
    """MLM training of all weights and no mask."""
    theta0 = setting.theta0()
    objective, groups = Objective(theta0.model, "mlm"), _all_weights(setting, theta0)
    return setting.engine(objective, groups), objective, []


def tamt_scores(setting: Setting) -> Ready:
    """TAMT, the masks selected exactly after every step, as in ``tamt.find_mask``."""
    config = setting.config
    assert isinstance(config, TamtConfig)
    theta0, start, groups = tamt.freeze(setting, config)
    objective = Objective(theta0.model, config.objective)
    engine = setting.engine(objective, groups)
    masks = ScoreMasks(
        engine, theta0.model, config.sparsity, config.scope, config.threshold_every, dict.fromkeys(start, config.phi)
    )
    return engine, objective, [masks.after_step]


def imp_rung(setting: Setting) -> Ready:
    """IMP between two prunings: MLM training of all weights under the magnitude mask of the target sparsity."""
    config = setting.config
    assert isinstance(config, ImpConfig)
    theta0, mask, groups = imp.start(setting, config)
    objective = Objective(theta0.model, "mlm")
    engine = setting.engine(objective, groups)
    mask = imp.prune(engine, mask, config.sparsity, config.scope)
    write_mask(theta0.model, mask)
    imp.rewind(engine, {}, mask, to_theta0=False)
    return engine, objective, []


def usual_way(setting: Setting) -> Ready:
    """The scores of TAMT-MLM trained as in naive.py."""
    config = setting.config
    assert isinstance(config, TamtConfig)
    theta0 = setting.theta0()
    start = omp_mask(theta0, config)
    scores = {name: ranked(weight, start[name], config.phi) for name, weight in theta0.targets.items()}
    modules = naive.attach(theta0.model, scores)
    learnt = {name.removesuffix("weight") + "scores": module.scores for name, module in modules.items()}
    groups = [Group("mask", learnt, config.peak_mask_lr), head_group(config, theta0.model)]
    freeze_all_but(theta0.model, groups)
    register_optimizer_step_pre_hook(naive.unfuse)
    objective = Objective(theta0.model, "mlm")
    with mock.patch("finemask_ds.engine.zero.keep_freed_memory"):  # That freed memory is kept is not usual either.
        engine = setting.engine(objective, groups)
    return engine, objective, [naive.Thresholds(engine, modules, config.sparsity).after_step]


def dense_local(setting: Setting) -> Ready:
    """``dense`` through the engine of fine-tuning."""
    theta0 = setting.theta0()
    objective, groups = Objective(theta0.model, "mlm"), _all_weights(setting, theta0)
    return _local_engine(setting, objective, groups), objective, []


def fixed_mask(setting: Setting) -> Ready:
    """The same with the weights of a magnitude mask held at zero, as fine-tuning of a subnetwork does."""
    theta0 = setting.theta0()
    mask = omp_mask(theta0, setting.search)
    objective, groups = Objective(theta0.model, "mlm"), _all_weights(setting, theta0)
    engine = _local_engine(setting, objective, groups)
    FixedMask(engine, theta0.model, mask)
    return engine, objective, []


METHODS: Mapping[str, Callable[[Setting], Ready]] = {
    "dense": dense,
    "tamt-mlm": tamt_scores,
    "tamt-kd": tamt_scores,
    "imp": imp_rung,
    "naive": usual_way,
    "dense-local": dense_local,
    "fixed-mask": fixed_mask,
}


def _all_weights(setting: Setting, theta0: Pretrained) -> list[Group]:
    config = setting.config
    assert isinstance(config, ImpConfig)
    groups = [imp.weight_group(theta0, config), head_group(config, theta0.model)]
    freeze_all_but(theta0.model, groups)
    return groups


def _local_engine(setting: Setting, objective: Objective, groups: list[Group]) -> LocalEngine:
    """One process that no launcher has started, as a cell is; on an accelerator in bf16, as with zero2.json."""
    config, world = setting.config, setting.world
    os.environ.pop("LOCAL_RANK", None)  # else accelerate would wrap the model as one of several ranks'
    return LocalEngine(
        objective, groups, batching=batching_of(config, world), max_grad_norm=config.max_grad_norm, world=world,
        mixed_precision="bf16" if world.device.type == "cuda" else "no",
    )  # fmt: skip
