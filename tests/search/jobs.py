"""What the ranks of a pool run in the search tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from finemask_ds.config import ImpConfig, SearchConfig, TamtConfig
from finemask_ds.engine.checkpoint import Shards
from finemask_ds.engine.damage import newest_step
from finemask_ds.engine.world import World
from finemask_ds.errors import UserError
from finemask_ds.masks.files import load_mask
from finemask_ds.masks.mask import Mask
from finemask_ds.models.masked import Masked
from finemask_ds.run import Run, read_json
from finemask_ds.search import imp
from finemask_ds.search.objectives import Objective
from finemask_ds.search.selection import select_trained
from finemask_ds.search.setting import Trainer, open_setting
from finemask_ds.session import search
from tests.pool import RankPool

TINY = {
    "seq_len": 16, "batch_size": 8, "dropout": 0.0, "log_every": 5, "watch_every": 5, "eval_every": 10,
    "save_every": 5, "dev_blocks": 12,
}  # fmt: skip


def stage_file(stage: int) -> str:
    return str(Path(__file__).parents[2] / f"configs/ds/zero{stage}.json")


def tamt(folder: Path, model: Path, text: Path, stage: int | None = None, **more: Any) -> TamtConfig:
    options = {**TINY, "init": "ranked", "mask_lr": 1e-3, "steps": 20, **more}
    return TamtConfig(model=str(model), data=str(text), run=str(folder), deepspeed=_file(stage), **options)


def imp_config(folder: Path, model: Path, text: Path, stage: int | None = None, **more: Any) -> ImpConfig:
    options = {**TINY, "lr": 1e-3, "interval_steps": 6, "sparsity": 0.3, **more}
    return ImpConfig(model=str(model), data=str(text), run=str(folder), deepspeed=_file(stage), **options)


def either(method: str, folder: Path, model: Path, text: Path, stage: int | None = None, **more: Any) -> SearchConfig:
    """IMP, or TAMT on both objectives."""
    if method == "imp":
        return imp_config(folder, model, text, stage, **more)
    return tamt(folder, model, text, stage, objective="mlm+kd", **more)


def _file(stage: int | None) -> str:
    return "" if stage is None else stage_file(stage)


def found(world: World, config: SearchConfig) -> dict[str, Any]:
    return search(config, world)


def found_plainly(world: World, config: SearchConfig) -> dict[str, Any]:
    """The same without what makes it fast: W * M made in each forward, each selection from nothing, no kernels."""

    def from_nothing(*args: Any, near: Mapping[str, float] | None = None, **options: Any) -> Any:
        return select_trained(*args, **options)

    with (
        mock.patch.object(Masked, "product", return_value=None),
        mock.patch("finemask_ds.search.selection.select_trained", from_nothing),
        mock.patch("finemask_ds.search.selection.has_kernels", return_value=False),
        mock.patch("finemask_ds.masks.binarize.has_kernels", return_value=False),
    ):
        return search(config, world)


def losses(config: SearchConfig) -> list[dict[str, float]]:
    """The losses in a run's log, of training and of evaluation."""
    lines = [json.loads(line) for line in Run(Path(config.run)).metrics.read_text().splitlines()]
    found = [{key: value for key, value in line.items() if key.endswith("_loss") or key == "step"} for line in lines]
    return [line for line in found if len(line) > 1]


def find(config: SearchConfig, pool: RankPool | None = None) -> dict[str, Any]:
    """The result of a search by a pool's ranks, or by this process."""
    return search(config) if pool is None else pool.run(found, config)[0]


def last_values(config: SearchConfig) -> dict[str, Tensor]:
    """The trained values of the newest checkpoint."""
    folder = Path(config.run) / "checkpoints"
    return checkpoint_values(folder / f"step-{newest_step(folder)}")


def checkpoint_values(folder: Path) -> dict[str, Tensor]:
    """The trained values of one checkpoint, whole."""
    with Shards(folder, read_json(folder / "state.json")) as shards:
        return {name: shards.whole("values", name) for name in shards.shapes}


class KilledError(Exception):
    """Stands for a kill."""


def killed_after(world: World, config: SearchConfig, step: int) -> None:
    """Run a search until the checkpoint of ``step`` is written and a few steps further, then die."""
    run = Trainer.run

    def dying_run(self: Trainer, span: Any, **options: Any) -> None:
        def die(now: int) -> None:
            if now == step + 2:
                raise KilledError

        run(self, span, **{**options, "after_step": [*options.get("after_step", ()), die]})

    with mock.patch.object(Trainer, "run", dying_run):
        try:
            search(config, world)
        except KilledError:
            return
    raise AssertionError("the search was not killed")


def failed(world: World, config: SearchConfig) -> str:
    """The sentence that a search fails with on this rank."""
    try:
        search(config, world)
    except UserError as error:
        return str(error)
    raise AssertionError("the search did not fail")


def rewound(world: World, config: ImpConfig, to_theta0: bool) -> dict[str, Any]:
    """Train some steps, prune, rewind; what the engine holds then, and after more steps."""
    setting = open_setting(config, world, model=config.model, data=config.data)
    theta0, mask, groups = imp.start(setting, config)
    weights = {name: value.detach().clone() for name, value in imp.backbone_parameters(theta0).items()}
    objective = Objective(theta0.model, "mlm")
    engine = setting.engine(objective, groups)
    trainer = Trainer(setting, engine, objective, setting.recorder(8))
    trainer.run(imp.Span(1, 4, decay=8))
    trained = {name: value.clone() for name, value in engine.read(engine.parameters)}
    mask = imp.prune(engine, mask, 0.5, "local")
    imp.write_mask(theta0.model, mask)
    imp.rewind(engine, weights, mask, to_theta0=to_theta0)
    after = {name: value.clone() for name, value in engine.read(engine.parameters)}
    moments = [float(tensor.abs().max()) for state in engine.optimizer_state().values() for tensor in state.values()]
    trainer.run(imp.Span(1, 4, decay=8))
    later = {name: value.clone() for name, value in engine.read(engine.parameters)}
    return {
        "theta0": weights, "trained": trained, "mask": dict(mask), "after": after, "moments": moments, "later": later,
    }  # fmt: skip


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def mask_of(config: SearchConfig) -> Mask:
    """The mask that a search has left."""
    return load_mask(Run(Path(config.run)).mask)
