"""Masked-language-model training without masks: the built-in model from scratch, an MLM head on a frozen encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from finemask_ds.config import HeadConfig, PretrainConfig, SearchConfig
from finemask_ds.data import builtin
from finemask_ds.data.collate import MaskingTokens
from finemask_ds.data.corpus import load_blocks
from finemask_ds.data.once import build_once
from finemask_ds.engine.base import Group
from finemask_ds.engine.loop import Span
from finemask_ds.engine.shared import at_work_in, hand_out, hosts_without
from finemask_ds.engine.world import World
from finemask_ds.errors import UserError
from finemask_ds.models.families import head_parameters
from finemask_ds.models.load import Pretrained, new_pretrained, save_pretrained
from finemask_ds.run import Run, atomic_write, cache_dir, content_hash
from finemask_ds.search.objectives import Objective
from finemask_ds.search.setting import Setting, Trainer, freeze_all_but


def builtin_corpus() -> Path:
    """The folder with the built-in language's text and tokenizer, generated once on this machine."""

    def build(folder: Path) -> None:
        builtin.write_corpus(folder)
        builtin.write_tokenizer(folder)

    return build_once(cache_dir() / "builtin" / f"language-{builtin.VERSION}", build)


def builtin_folder(config: PretrainConfig) -> Path:
    """Where the built-in model of this configuration is, or will be."""
    key = content_hash(str(builtin.VERSION), repr(sorted(builtin.MODEL.items())), repr(config.result_identity()))
    return cache_dir() / "builtin" / f"model-{key}"


def builtin_model(config: PretrainConfig, world: World) -> Path:
    """The folder of the built-in model, a small BERT pre-trained on the built-in language; trained where it is missing.

    Every rank takes part in the training; the first writes the folder, which appears whole by one rename, and hands it
    to the hosts that do not share its cache.
    """
    folder = builtin_folder(config)
    if world.on_first(folder.exists):
        hand_out(world, folder)
        return folder
    language = builtin_corpus()
    fresh = _fresh_builtin(config, language)
    corpus = load_blocks(str(language), fresh.tokenizer, config.seq_len, max_positions=fresh.max_positions)
    run = world.on_first(lambda: config.open_run(Path(f"{folder}.run")))
    tokens = MaskingTokens.from_tokenizer(fresh.tokenizer)
    setting = Setting(config, world, run, str(language), fresh.digest(), corpus, tokens)
    if world.is_first:
        print(f"pre-training the built-in model ({config.steps} steps, once on this machine)", flush=True)
    groups = [Group("weights", dict(fresh.model.named_parameters()), config.lr, config.weight_decay)]
    span = Span(1, config.steps, decay=config.steps, warmup=config.warmup_steps)
    with at_work_in(run, world, wait=True):
        if not world.on_first(folder.exists):
            values = train_mlm(setting, fresh.model, groups, span)
            if world.is_first:
                _save_model(_fresh_builtin(config, language), values, folder)
            world.barrier()
    hand_out(world, folder)
    return folder


def trained_head(setting: Setting) -> dict[str, Tensor] | None:
    """The MLM head for theta_0 where its checkpoint has none: trained on the frozen encoder, once for each text."""
    config = setting.search
    if not config.head_steps:
        return None
    head_config = _head_config(config)
    key = content_hash(setting.model_sha256, str(setting.corpus.provenance["key"]), repr(head_config.result_identity()))
    run, world = Run(cache_dir() / "heads" / key), setting.world
    if not world.on_first(run.head.exists):
        world.on_first(lambda: head_config.open_run(run.folder))
        with at_work_in(run, world, wait=True):
            if not world.on_first(run.head.exists):
                here = dataclasses.replace(setting, config=head_config, run=run)
                values = _train_head(here, setting.theta0(), head_config)
                if world.is_first:
                    with atomic_write(run.head, "wb") as stream:
                        stream.write(save(values))
    return load(world.on_first(run.head.read_bytes))  # The hosts need not share the cache.


def _train_head(setting: Setting, theta0: Pretrained, config: HeadConfig) -> dict[str, Tensor]:
    if setting.world.is_first:
        told = f"training an MLM head on the frozen encoder ({config.steps} steps, once: {setting.run.folder})"
        print(told, flush=True)
    groups = [Group("head", head_parameters(theta0.model), config.lr, config.weight_decay)]
    return train_mlm(setting, theta0.model, groups, Span(1, config.steps, decay=config.steps))


def train_mlm(setting: Setting, model: nn.Module, groups: Sequence[Group], span: Span) -> dict[str, Tensor]:
    """Train the groups' parameters on MLM and return their values, on the CPU."""
    setting.begin()
    freeze_all_but(model, groups)
    objective = Objective(model, "mlm")
    engine = setting.engine(objective, groups)
    is_shared = not hosts_without(setting.world, setting.run.folder)
    if setting.world.is_first and not is_shared:
        print("the hosts share no cache: this training begins again if it is stopped", flush=True)
    with setting.recorder(span.last) as recorder:
        trainer = Trainer(setting, engine, objective, recorder, keeps_checkpoints=is_shared)
        state = trainer.resume()
        trainer.run(dataclasses.replace(span, first=state["step"] + 1))
        trainer.save(span.last, {})
    return {name: value.cpu().clone() for name, value in engine.read(engine.parameters)}


def _head_config(config: SearchConfig) -> HeadConfig:
    """The search's text and batches with the head's own steps and rate; of one seed, so that searches share it."""
    names = {field.name for field in dataclasses.fields(HeadConfig)}
    shared = {key: value for key, value in dataclasses.asdict(config).items() if key in names - {"seed"}}
    return HeadConfig(**{**shared, "run": "", "lr": config.new_head_lr, "steps": config.head_steps})


def resolve_model(model: str, world: World, deepspeed: str = "") -> str:
    """The hub name or folder of a model as typed; ``builtin`` is trained where it is missing, by all ranks.

    Raises:
        UserError: where it is missing and so many ranks cannot train it.
    """
    if model != "builtin":
        return model
    config = PretrainConfig(deepspeed=deepspeed)
    if config.batch_size % world.size and not world.on_first(builtin_folder(config).exists):
        raise UserError(
            f"--model builtin is not made yet, and {world.size} ranks cannot share the {config.batch_size} sequences "
            "of each of its steps; type python launcher/pretrain.py first"
        )
    return str(builtin_model(config, world))


def _fresh_builtin(config: PretrainConfig, language: Path) -> Pretrained:
    """The built-in model before training, with the language's own start for the position embeddings."""
    fresh = new_pretrained({"model_type": "bert", **builtin.MODEL}, language, dropout=config.dropout, seed=config.seed)
    positions = dict(fresh.model.named_parameters())["bert.embeddings.position_embeddings.weight"]
    with torch.no_grad():
        positions.copy_(torch.from_numpy(builtin.initial_positions()))
    return fresh


def _save_model(pretrained: Pretrained, values: dict[str, Tensor], folder: Path) -> None:
    with torch.no_grad():
        for name, parameter in pretrained.model.named_parameters():
            parameter.copy_(values[name])
    save_pretrained(pretrained, folder)
