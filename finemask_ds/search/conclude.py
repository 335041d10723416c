"""The last stage of every search: score the mask alike for all methods and write what the run leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from finemask_ds.engine.loop import evaluate
from finemask_ds.engine.metrics import write_hyperparameters
from finemask_ds.engine.world import World
from finemask_ds.masks.files import load_mask, save_mask
from finemask_ds.masks.mask import Mask
from finemask_ds.models.load import Pretrained
from finemask_ds.models.patch import attach, detach
from finemask_ds.run import atomic_write, write_json
from finemask_ds.search.magnitude import omp_mask
from finemask_ds.search.objectives import Objective, counts
from finemask_ds.search.outcome import Outcome, mask_provenance
from finemask_ds.search.setting import Setting


def conclude(setting: Setting, outcome: Outcome) -> dict[str, Any]:
    """Score the outcome, write mask, head and result, mark the search as done and return the result.

    Dev losses are those of theta_0 * M with theta_0's own head and unmasked decoder, whatever the method trained, so
    that all methods are measured alike; with the trained head beside them.
    """
    theta0, mask, run = setting.theta0(), outcome.mask, setting.run
    mask.check(theta0.shapes)
    dev = setting.dev_batches()
    has_head = theta0.has_head or setting.head is not None
    result = {
        "method": setting.search.method,
        "model": setting.search.model,
        "data": setting.search.data,
        "target_sparsity": setting.search.sparsity,
        "steps": outcome.steps,
        "seconds": outcome.seconds,
        "ranks": setting.world.size,
        "engine": outcome.engine,
        **_figures(setting, theta0, mask, setting.search.sparsity, dev, mlm=has_head),
        "dev_dense": dev_losses(theta0, None, dev, setting.world, mlm=has_head),
        "dev_trained_head": None,
    }
    on_the_way = setting.world.on_first(lambda: [(path.name, load_mask(path)) for path in run.masks_on_the_way()])
    result["snapshots"] = [
        {
            "mask": f"masks/{name}", **{key: kept.provenance[key] for key in ("steps", "seconds", "target_sparsity")},
            **_figures(setting, theta0, kept, kept.provenance["target_sparsity"], dev, mlm=has_head),
        }
        for name, kept in on_the_way
        if kept.provenance["steps"] < outcome.steps
    ]  # fmt: skip
    if outcome.head is not None:
        theta0.load_head(outcome.head)
        result["dev_trained_head"] = dev_losses(theta0, mask, dev, setting.world, mlm=True)
    setting.world.on_first(lambda: _write(setting, outcome, result))
    return result


def _figures(
    setting: Setting,
    theta0: Pretrained,
    mask: Mask,
    target_sparsity: float,
    dev: Sequence[Mapping[str, Tensor]],
    *,
    mlm: bool,
) -> dict[str, Any]:
    """What is measured of every mask alike: the OMP of distances is the paper's, whatever the mask was ranked over."""
    omp = omp_mask(theta0, replace(setting.search, sparsity=target_sparsity, scope="local"))
    losses = dev_losses(theta0, mask, dev, setting.world, mlm=mlm)
    return {"sparsity": mask.sparsity(), "distance_from_omp": mask.distance(omp), "dev": losses}


def dev_losses(
    theta0: Pretrained, mask: Mask | None, batches: Sequence[Mapping[str, Tensor]], world: World, *, mlm: bool
) -> dict[str, float | None]:
    """MLM loss and masked-token accuracy on masked text, and KD loss on plain text, of theta_0 under ``mask``.

    Args:
        theta0: a plain model, in evaluation mode; plain again afterwards.
        mask: None for the unpruned model.
        batches: all dev batches, the same on every rank.
        world: the ranks that share the work.
        mlm: False where there is no MLM head to predict with; MLM figures are then None.
    """
    theta0.model.to(world.device).eval()
    if mask is not None:
        attach(theta0.model, mask)
    tasks = [Objective(theta0.model, name) for name in (("mlm", "kd") if mlm else ("kd",))]

    def forward(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        on_device = {key: tensor.to(world.device) for key, tensor in batch.items()}
        return {name: value for task in tasks for name, value in task(on_device).items()}

    try:
        losses: dict[str, float | None] = {"mlm_loss": None, "mlm_accuracy": None}
        return losses | evaluate(forward, world, batches, counts)
    finally:
        detach(theta0.model)
        theta0.model.to("cpu")


def _write(setting: Setting, outcome: Outcome, result: Mapping[str, Any]) -> None:
    run = setting.run
    provenance = mask_provenance(setting, outcome.steps, setting.search.sparsity)
    if outcome.head is not None:
        with atomic_write(run.head, "wb") as stream:
            stream.write(save(dict(outcome.head)))
    save_mask(run.mask, outcome.mask.with_provenance(provenance))
    write_json(run.result, result)
    final = {**result["dev"], **{key: result[key] for key in ("sparsity", "distance_from_omp", "seconds")}}
    figures = {name: value for name, value in final.items() if value is not None}
    write_hyperparameters(run.tensorboard, setting.search.result_identity(), figures)
    hours = outcome.rank_seconds / 3600
    on_gpu = setting.world.device.type == "cuda"
    run.update_provenance({"gpu_hours": hours} if on_gpu else {"core_hours": hours * torch.get_num_threads()})
    run.mark_done("search", result)
