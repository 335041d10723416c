"""What a search starts from: ranks, run directory, theta_0, token blocks; and the way every method trains on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from finemask_ds.config import SearchConfig, TrainingConfig
from finemask_ds.data.ahead import Batches, ahead
from finemask_ds.data.collate import DevBatches, MaskingTokens, TrainBatches
from finemask_ds.data.corpus import Corpus, load_blocks
from finemask_ds.engine.base import Batching, Engine, Group
from finemask_ds.engine.checkpoint import load_checkpoint, save_checkpoint
from finemask_ds.engine.guard import check_agreement
from finemask_ds.engine.local import LocalEngine
from finemask_ds.engine.loop import Hook, Span, evaluate, every, is_due, train
from finemask_ds.engine.memory import peak_memory_gib
from finemask_ds.engine.metrics import Recorder
from finemask_ds.engine.record import run_recorder
from finemask_ds.engine.shared import check_same, check_shared
from finemask_ds.engine.stopwatch import Stopwatch
from finemask_ds.engine.termination import Terminated
from finemask_ds.engine.world import World
from finemask_ds.errors import UserError
from finemask_ds.masks.mask import Mask
from finemask_ds.models.families import head_parameters
from finemask_ds.models.load import Pretrained, load_pretrained
from finemask_ds.models.masked import matrix_name
from finemask_ds.models.patch import read_mask
from finemask_ds.run import Run
from finemask_ds.search.objectives import Objective, counts
from finemask_ds.search.watch import Draw


@dataclass(frozen=True)
class Setting:
    """One search: its configuration resolved to things. Built by ``open_setting``; frozen."""

    config: TrainingConfig
    world: World
    run: Run
    model: str
    """Hub name or folder that the model is loaded from (never ``builtin``)."""
    model_sha256: str
    """Which theta_0 it is; see ``Pretrained.digest``."""
    corpus: Corpus
    tokens: MaskingTokens
    head: Mapping[str, Tensor] | None = field(default=None, repr=False)
    """MLM head trained on the frozen encoder where the checkpoint has none."""
    draw: Draw | None = None
    """Draws the heat map of a mask for TensorBoard; None: no heat map."""

    @property
    def search(self) -> SearchConfig:
        """The configuration of a search (training a head or the built-in model has none)."""
        assert isinstance(self.config, SearchConfig)
        return self.config

    def begin(self) -> None:
        """Note this start in the run directory, which is to be this process's own by then; collective."""
        facts = {"model": {"name": self.config.model, "sha256": self.model_sha256}, "data": self.corpus.provenance}
        self.world.on_first(lambda: self.run.write_provenance({**facts, "ranks": self.world.size}))

    def theta0(self) -> Pretrained:
        """A fresh copy of the pre-trained model, with its head, on the CPU."""
        pretrained = load_pretrained(self.model, targets=self.search.targets, dropout=self.config.dropout)
        if self.head is not None:
            pretrained.load_head(self.head)
        return pretrained

    def engine(self, module: nn.Module, groups: Sequence[Group]) -> Engine:
        """The DeepSpeed engine where a DeepSpeed file was given, otherwise the plain one."""
        return start_engine(self.config, self.world, module, groups)

    def train_batches(self) -> Batches:
        """Step -> this rank's micro-batches."""
        config, batching = self.config, batching_of(self.config, self.world)
        batches = TrainBatches(
            self.corpus.train, self.tokens, batch_size=config.batch_size, seed=config.seed, rank=self.world.rank,
            world_size=self.world.size, micro_batch_size=batching.micro_batch_size,
        )  # fmt: skip
        return ahead(batches, self.world.device)

    def dev_batches(self) -> list[dict[str, Tensor]]:
        """All dev batches, the same on every rank; masked once by (eval seed, block)."""
        size = self.config.eval_batch_size or batching_of(self.config, self.world).micro_batch_size
        batches = DevBatches(
            self.corpus.dev, self.tokens, eval_seed=self.config.eval_seed, rank=0, world_size=1, batch_size=size,
            num_blocks=self.config.dev_blocks,
        )  # fmt: skip
        return list(batches)

    def recorder(self, total_steps: int) -> Recorder:
        """Where the search's metrics go."""
        return run_recorder(self.run, self.world, total_steps)


def open_setting(config: SearchConfig, world: World, *, model: str, data: str) -> Setting:
    """Load what the configuration names and open the run directory.

    Args:
        config: the knobs.
        world: the ranks.
        model: hub name or folder for ``config.model``.
        data: data set or folder for ``config.data``.

    Raises:
        UserError: for anything that is missing or differs between hosts, an MLM head that is missing or one too many,
            a run directory of another configuration, or one that a host does not see.
    """
    pretrained = load_pretrained(model, targets=config.targets, dropout=config.dropout)
    _check_head(config, pretrained)
    corpus = load_blocks(data, pretrained.tokenizer, config.seq_len, max_positions=pretrained.max_positions)
    tokens = MaskingTokens.from_tokenizer(pretrained.tokenizer)
    model_sha256 = pretrained.digest()
    hashes = {f"the model {config.model}": model_sha256, f"the text {config.data}": corpus.provenance["key"]}
    check_same(world, hashes)
    run = world.on_first(lambda: config.open_run(Path(config.run) if config.run else None))
    check_shared(world, run.folder)
    if world.is_first:
        print(f"run directory {run.folder}", flush=True)
    return Setting(config, world, run, model, model_sha256, corpus, tokens)


def _check_head(config: SearchConfig, theta0: Pretrained) -> None:
    """Refuse before anything is written, so that the same run directory takes the option that is typed then.

    Raises:
        UserError: where the objective needs a head and no ``--head_steps`` says how long to train one, or where the
            checkpoint has a head already.
    """
    if theta0.has_head and config.head_steps:
        raise UserError(f"{config.model} has an MLM head already; remove --head_steps {config.head_steps}")
    if config.needs_head and not theta0.has_head and not config.head_steps:
        raise UserError(
            f"{config.model} has no MLM head to train with; type --head_steps N to train one first, as 1000"
        )


def batching_of(config: TrainingConfig, world: World) -> Batching:
    """How each optimizer step's sequences are dealt out."""
    return Batching.of(config.batch_size, config.micro_batch_size, world.size)


def start_engine(config: TrainingConfig, world: World, module: nn.Module, groups: Sequence[Group]) -> Engine:
    """Wrap ``module`` and an AdamW over ``groups`` in the engine that the configuration asks for."""
    batching = batching_of(config, world)
    engine: Engine
    if config.deepspeed:
        from finemask_ds.engine.zero import (
            ZeroEngine,
        )  # Only a run that asks for DeepSpeed pays for importing it.

        engine = ZeroEngine(
            module,
            groups,
            world,
            batching=batching,
            max_grad_norm=config.max_grad_norm,
            file=config.deepspeed,
            as_asked=config.precision == "file",
        )
    else:
        engine = LocalEngine(module, groups, batching=batching, max_grad_norm=config.max_grad_norm, world=world)
    if world.is_first:
        print(f"{engine.describe()}; {batching.describe(world.size)}", flush=True)
    return engine


def head_group(config: SearchConfig, model: nn.Module) -> Group:
    """The MLM head (transform and bias) with its own rate."""
    return Group("head", head_parameters(model), config.head_lr, config.weight_decay)


def freeze_all_but(model: nn.Module, groups: Sequence[Group]) -> None:
    """Let the groups' parameters require gradients and no others."""
    model.requires_grad_(False)
    for group in groups:
        for parameter in group.parameters.values():
            parameter.requires_grad_(True)


@dataclass
class Trainer:
    """Trains one objective inside a setting, with the hooks that every method wants."""

    setting: Setting
    engine: Engine
    objective: Objective
    recorder: Recorder
    masked: Pretrained | None = None
    """The model under masks, whose ranks must agree on them; None where plain weights are trained."""
    keeps_checkpoints: bool = True
    """False where the hosts share no folder for them."""
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    _logged: int = field(default=0, init=False)

    def resume(self) -> dict[str, Any]:
        """Continue from the newest checkpoint; its state, or ``{"step": 0}`` where there is none."""
        kept = load_checkpoint(self.setting.run.checkpoints, self.engine) if self.keeps_checkpoints else None
        state = kept or {"step": 0}
        self.stopwatch.go_on(state)
        return state

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint after ``step``; the seed and the data position are all that its draws depend on."""
        about = {"seed": self.setting.config.seed, **self.stopwatch.state()}
        if self.keeps_checkpoints:
            save_checkpoint(self.setting.run.checkpoints, self.engine, step, {**state, **about})

    def run(
        self,
        span: Span,
        *,
        after_step: Sequence[Hook] = (),
        hooks: Sequence[Hook] = (),
        watch: Sequence[Hook] = (),
        state: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """Train the steps of ``span``.

        Args:
            span: steps and schedule.
            after_step: part of every step.
            hooks: run after every step.
            watch: run now and then, to record what is dear to look at.
            state: what a checkpoint holds beside values and moments.
        """
        config, dev = self.setting.config, self.setting.dev_batches()
        roles = self._roles()
        world = self.engine.world
        with world.termination.training():
            train(
                self.engine, self.objective, self.setting.train_batches(), counts, span, self.recorder,
                seed=config.seed,
                after_step=after_step,
                hooks=[
                    *hooks,
                    every(config.agree_every, self._agree),
                    every(config.eval_every, lambda step: self._evaluate(dev), last=span.last),
                    *(every(config.watch_every, self._apart(hook), last=span.last) for hook in watch),
                    every(config.log_every, self._log, last=span.last),
                    every(config.save_every, lambda step: self.save(step, state())),
                ],
                watched=lambda step: roles if is_due(config.watch_every, step, last=span.last) else {},
                before_stop=lambda step: self.save(step, state()),
                terminated=lambda step: self._terminate(step, state()),
            )  # fmt: skip
            # The loop tells after a step of what came before it; the last one may hold a long evaluation.
            if any(world.gather(world.termination.asked)):
                self._terminate(span.last, state())

    def _terminate(self, step: int, state: Mapping[str, Any]) -> NoReturn:
        """A rank was asked to end: log and save where all ranks stand now, and end them all."""
        self._log(step)
        self.save(step, state)
        folder = self.setting.run.checkpoints
        kept = f"checkpoint at step {step} in {folder}" if self.keeps_checkpoints else f"step {step} is lost"
        raise Terminated(f"{kept}; the same command goes on")

    def _roles(self) -> dict[str, list[str]]:
        """Role (Q, K, ... or ``other``) -> names of the trained parameters whose gradient norm is logged under it."""
        if self.masked is None:
            return {}
        roles = defaultdict(list)
        for name in self.engine.parameters:
            place = self.masked.places.get(matrix_name(name))
            roles[place.role if place else "other"].append(name)
        return dict(roles)

    def _agree(self, step: int) -> None:
        self.engine.check_precision()
        if self.masked is not None and self.engine.world.size > 1:
            check_agreement(self.engine.world, Mask(read_mask(self.masked.model)).digest(), step)

    def _evaluate(self, dev: Sequence[Mapping[str, Tensor]]) -> None:
        with self.stopwatch.paused(), self.engine.evaluation():
            for name, value in evaluate(self.engine.forward, self.engine.world, dev, counts).items():
                self.recorder.record_last(f"dev/{name}", value)

    def _apart(self, hook: Hook) -> Hook:
        """The hook, whose time is none of the search's."""

        def run(step: int) -> None:
            with self.stopwatch.paused():
                hook(step)

        return run

    def _log(self, step: int) -> None:
        if step == self._logged:
            return
        self._logged = step
        self.recorder.record_last("memory/peak_gib", peak_memory_gib(self.engine.world.device))
        self.recorder.flush(step)
