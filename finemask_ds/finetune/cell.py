"""A cell of a plan, as a worker runs it: options in, result.json out; and what it will cost."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finemask_ds.config import FinetuneConfig
from finemask_ds.engine.loop import Span, train
from finemask_ds.engine.metrics import Recorder
from finemask_ds.engine.world import this_process
from finemask_ds.finetune.constrain import FixedMask
from finemask_ds.finetune.evaluate import Split
from finemask_ds.finetune.job import Job, open_job, with_model
from finemask_ds.finetune.train import fine_tune, start_engine
from finemask_ds.models.downstream import TaskModel, counts
from finemask_ds.search.dense import resolve_model
from finemask_ds.signals import Interruption

MEASURED_STEPS = 3
MEASURED_BATCHES = 2


def run_cell(options: Mapping[str, Any], folder: Path, interruption: Interruption) -> None:
    """Fine-tune the cell of these options of launcher/finetune.py; it leaves ``folder/result.json``.

    Raises:
        Interrupted: when asked to end; under way it first saves where it stands.
    """
    config, world = _config({**options, "run": str(folder)}), this_process()
    fine_tune(config, world, model=resolve_model(config.model, world), interruption=interruption)


def measure_cell(options: Mapping[str, Any]) -> float:
    """Seconds that a cell will take, from its own first steps and a few dev batches; nothing is written."""
    started = time.perf_counter()
    config, world = _config(options), this_process()
    job = open_job(config, world, model=resolve_model(config.model, world))
    task_model = TaskModel(job.downstream.model, job.task.kind)
    engine = start_engine(job, world, task_model)
    if job.mask:
        FixedMask(engine, job.downstream.model, job.mask)
    loading_sec = time.perf_counter() - started
    marks = [time.perf_counter()]
    measured = min(MEASURED_STEPS, job.num_steps)
    train(
        engine, task_model, job.batches, counts, Span(1, measured, decay=job.num_steps), Recorder(),
        seed=job.config.seed, hooks=[lambda step: marks.append(time.perf_counter())],
    )  # fmt: skip
    # The first step also allocates the moments.
    step_sec = (marks[-1] - marks[1]) / (measured - 1) if measured > 1 else marks[1] - marks[0]
    return loading_sec + job.num_steps * step_sec + _num_evaluations(job) * _evaluation_sec(job.dev, task_model)


def _config(options: Mapping[str, Any]) -> FinetuneConfig:
    config = FinetuneConfig(**options)
    return with_model(config, [config.mask])


def _num_evaluations(job: Job) -> int:
    every = job.config.eval_every
    return -(-job.num_steps // every) if every else 1


def _evaluation_sec(dev: Split, model: TaskModel) -> float:
    """Seconds of a look at all dev rows, from a few of its batches spread over their lengths."""
    num_batches = -(-len(dev.features) // dev.batch_size)
    started = time.perf_counter()
    looked = dev.try_out(model, MEASURED_BATCHES)
    return (time.perf_counter() - started) * num_batches / looked
