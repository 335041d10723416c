"""One cell: fine-tune a subnetwork M * theta_0, or the full model, on a downstream task (TAMT Sections 3.3 and 4.1)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from finemask_ds.config import FinetuneConfig
from finemask_ds.data.ahead import ahead
from finemask_ds.engine.base import Batching, Engine, Group
from finemask_ds.engine.checkpoint import load_checkpoint, save_checkpoint
from finemask_ds.engine.local import LocalEngine
from finemask_ds.engine.loop import every, train
from finemask_ds.engine.memory import forget_peak_memory, peak_memory_gib
from finemask_ds.engine.record import run_recorder
from finemask_ds.engine.shared import at_work_in
from finemask_ds.engine.stopwatch import Stopwatch
from finemask_ds.engine.world import World
from finemask_ds.errors import UserError
from finemask_ds.finetune.constrain import FixedMask
from finemask_ds.finetune.give import give
from finemask_ds.finetune.job import Job, open_job, outputs
from finemask_ds.finetune.progress import Curve, keep_weights, put_back
from finemask_ds.models.downstream import TaskModel, counts
from finemask_ds.provenance import collect
from finemask_ds.run import Run, read_json, write_json
from finemask_ds.signals import Interrupted, Interruption


def fine_tune(
    config: FinetuneConfig, world: World, *, model: str, interruption: Interruption | None = None
) -> dict[str, Any]:
    """Fine-tune one cell and leave its result in the run directory; a cell that is done returns it at once.

    Args:
        config: the knobs.
        world: the ranks.
        model: hub name or folder for ``config.model``.
        interruption: watched on one rank alone; see `Cell.train`.

    Returns:
        The result as in ``result.json``, with the run directory as ``run``.

    Raises:
        UserError: for bad input, before anything starts.
    """
    job = open_job(config, world, model=model)
    run = world.on_first(lambda: open_run(job, config))
    if world.on_first(lambda: run.done("finetune")):
        return {**world.on_first(lambda: run.result_of("finetune")), "run": str(run.folder)}
    with at_work_in(run, world):
        world.on_first(lambda: run.write_provenance(job.inputs))
        return _fine_tune(job, run, world, interruption or Interruption())


def _fine_tune(job: Job, run: Run, world: World, interruption: Interruption) -> dict[str, Any]:
    forget_peak_memory(world.device)
    task_model = TaskModel(job.downstream.model, job.task.kind)
    engine = start_engine(job, world, task_model)
    fixed = FixedMask(engine, job.downstream.model, job.mask) if job.mask else None
    cell = Cell(job, run, engine, task_model, interruption)
    cell.train()
    if fixed:
        fixed.check(engine)
    seconds = cell.stopwatch.seconds
    if job.wants_best:
        put_back(job.downstream.model, run.best_weights(cell.curve.best["step"]))
        if fixed:
            fixed.check(engine)
    mismatched = job.mismatched.scores(task_model, world).values if job.mismatched else None
    result = describe(job, cell.curve, seconds, peak_memory_gib(world.device))
    result |= {"mismatched": mismatched, "sparsity": fixed.sparsity() if fixed else 0.0}
    give(job, run, result, task_model, world)
    world.on_first(lambda: conclude(run, result))
    return {**result, "run": str(run.folder)}


def open_run(job: Job, config: FinetuneConfig) -> Run:
    """The run directory of a cell; another mask or other rows under the same names are refused."""
    run = config.open_run(config.run)
    before = read_json(run.provenance) if run.provenance.exists() else {}
    if any(before.get(key, value) != value for key, value in job.inputs.items()):
        raise UserError(f"{run.folder} was begun with another mask, model or data of these names; type another --run")
    if run.done("finetune") and not all(path.exists() for path in outputs(config, job.task)):
        raise UserError(f"{run.folder} is done and kept no weights; type another --run to train again and write them")
    print(f"run directory {run.folder}", flush=True)
    return run


def start_engine(job: Job, world: World, task_model: TaskModel) -> LocalEngine:
    """All weights, one rate, AdamW, through accelerate."""
    config = job.config
    assert config.batch_size
    assert config.lr is not None
    batching = Batching.of(config.batch_size, config.micro_batch_size, world.size)
    task_model.requires_grad_(True)
    weights = Group("weights", dict(task_model.named_parameters()), config.lr, config.weight_decay)
    return LocalEngine(
        task_model, [weights], batching=batching, max_grad_norm=config.max_grad_norm, world=world,
        mixed_precision=config.mixed_precision,
    )  # fmt: skip


class Cell:
    """A fine-tuning under way: the loop's hooks and what they note."""

    def __init__(self, job: Job, run: Run, engine: Engine, task_model: TaskModel, interruption: Interruption):
        self.job, self.run, self.engine, self.task_model = job, run, engine, task_model
        self.interruption = interruption
        state = load_checkpoint(run.checkpoints, engine) or {"step": 0}
        self.step, self.stopwatch = state["step"], Stopwatch(state.get("seconds", 0.0))
        self.curve = Curve(job.task.metric, state.get("curve", []))
        self._loss, self._logged = float("nan"), 0

    def train(self) -> None:
        """Take the steps that are left, evaluating and saving on the way; when asked to end, save first.

        Raises:
            Interrupted: after the step in which it was asked to end, with a checkpoint of that step.
        """
        config, last = self.job.config, self.job.num_steps
        assert config.eval_every is not None
        batches = ahead(self.job.batches, self.engine.world.device)
        with run_recorder(self.run, self.engine.world, last) as self.recorder, self.interruption.deferred():
            if self.step < last:
                train(
                    self.engine, self.task_model, batches, counts, replace(self.job.span, first=self.step + 1),
                    self.recorder, seed=config.seed,
                    hooks=[
                        every(config.eval_every, self._evaluate, last=last),
                        every(config.log_every, self._log, last=last),
                        every(config.save_every, self._save),
                        self._end_if_asked,
                    ],
                )  # fmt: skip

    def _evaluate(self, step: int) -> None:
        scores = self.job.dev.scores(self.task_model, self.engine.world)
        for name, value in scores.values.items():
            if value is not None:
                self.recorder.record_last(f"dev/{name}", value)
        self._log(step)
        is_best = self.curve.add(step, step / self.job.batches.steps_per_epoch, self._loss, scores)
        if is_best and self.job.wants_best:
            self.engine.world.on_first(lambda: keep_weights(self.job.downstream.model, self.run.best_weights(step)))

    def _log(self, step: int) -> None:
        if step == self._logged:
            return
        self.recorder.record_last("memory/peak_gib", peak_memory_gib(self.engine.world.device))
        self._loss, self._logged = self.recorder.flush(step)["train/loss"], step

    def _save(self, step: int) -> None:
        about = {"curve": self.curve.points, "seconds": self.stopwatch.seconds}
        save_checkpoint(self.run.checkpoints, self.engine, step, about)
        # Only now: a kill before the checkpoint would have needed the best of the one before.
        if self.curve.points:
            self.engine.world.on_first(lambda: self._drop_weights_but(self.curve.best))

    def _end_if_asked(self, step: int) -> None:
        if self.interruption.asked and step < self.job.num_steps:
            self._save(step)
            raise Interrupted(self.interruption.signal)

    def _drop_weights_but(self, best: Mapping[str, Any]) -> None:
        for path in self.run.best_weights(0).parent.glob("*.safetensors"):
            if path != self.run.best_weights(best["step"]):
                path.unlink()


def describe(job: Job, curve: Curve, seconds: float, peak_gib: float) -> dict[str, Any]:
    """A cell's result as JSON values: figures as fractions (1 is perfect), seconds, GiB, hashes, versions."""
    config, best, last, made = job.config, curve.best, curve.points[-1], collect()
    told = job.mask_file.mask.provenance if job.mask_file else {"method": "full"}
    return {
        "kind": "finetune", "task": job.task.name, "metric": curve.metric,
        "score": best["metrics"][curve.metric], "last_score": last["metrics"][curve.metric],
        "undefined": best["undefined"].get(curve.metric), "best_step": best["step"], "steps": job.num_steps,
        "metrics": best["metrics"], "last_metrics": last["metrics"], "curve": curve.points,
        "model": config.model, **job.inputs,
        "mask": str(job.mask_file.path) if job.mask_file else None,
        "mask_sha256": job.mask_file.sha256 if job.mask_file else None,
        "method": told.get("method", "imported"), "mask_seed": told.get("seed"), "search_steps": told.get("steps"),
        "target_sparsity": told.get("target_sparsity"),
        "seed": config.seed, "num_samples": config.num_samples,
        "train_rows": len(job.train), "dev_rows": len(job.dev.examples), "dropped_rows": job.train.dropped_rows,
        "data": config.data or ("builtin" if job.task.is_builtin else "hub"),
        "epochs": config.epochs if config.steps is None else None, "batch_size": config.batch_size, "lr": config.lr,
        "warmup_steps": config.warmup_steps, "seq_len": config.seq_len, "eval_every": config.eval_every,
        "mixed_precision": config.mixed_precision, "dropout": config.dropout, "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "hyper_parameters": job.task.source,
        "seconds": seconds, "peak_memory_gib": peak_gib, "versions": made["versions"], "code": made["code"],
    }  # fmt: skip


def conclude(run: Run, result: Mapping[str, Any]) -> None:
    """Write the result last, and drop what only an unfinished cell needs."""
    write_json(run.result, result)
    run.mark_done("finetune", result)
    for folder in (run.checkpoints, run.best_weights(0).parent):
        shutil.rmtree(folder, ignore_errors=True)
