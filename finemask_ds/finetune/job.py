"""What one fine-tuning starts from: everything is loaded and checked here, before anything is written or trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from finemask_ds.config import CellKnobs, FinetuneConfig, SweepConfig
from finemask_ds.config.knobs import check_warmup
from finemask_ds.data.examples import check_data, has_split, load_split
from finemask_ds.data.features import Features, TaskBatches, class_features
from finemask_ds.data.tasks import Examples, Task, task_named
from finemask_ds.data.windows import span_features
from finemask_ds.engine.base import Batching
from finemask_ds.engine.loop import Span
from finemask_ds.engine.precision import check_mixed_precision
from finemask_ds.engine.world import World
from finemask_ds.errors import UserError
from finemask_ds.finetune.evaluate import Split
from finemask_ds.masks.files import load_mask
from finemask_ds.masks.foreign import refuse_existing
from finemask_ds.masks.mask import Mask
from finemask_ds.models.downstream import SPAN, Downstream, load_downstream
from finemask_ds.run import Run, file_sha256, mask_file

C = TypeVar("C", bound=CellKnobs)

DEFAULT_MODEL = "bert-base-uncased"
"""TAMT Section 4.1.1."""


@dataclass(frozen=True)
class MaskFile:
    """A mask as it was found."""

    mask: Mask
    path: Path
    sha256: str
    """Of the file's bytes."""

    @classmethod
    def read(cls, name: str) -> MaskFile:
        """Read a mask file, or the mask of a run directory; UserError for anything that is none."""
        path = mask_file(name)
        return cls(load_mask(path), path, file_sha256(path))


def with_model(config: C, masks: Sequence[str]) -> C:
    """The configuration with its model named: where none is given, that of the first mask.

    Raises:
        UserError: where the mask is none.
    """
    if config.model:
        return config
    told = MaskFile.read(masks[0]).mask.provenance.get("model") if masks and masks[0] else None
    return replace(config, model=str(told or DEFAULT_MODEL))


@dataclass(frozen=True)
class Job:
    """One cell, resolved to things: frozen; built by ``open_job``."""

    config: FinetuneConfig
    """With nothing left to the task's defaults."""
    task: Task
    downstream: Downstream
    mask_file: MaskFile | None
    mask: Mask | None
    """The matrices of the mask that this task's model has."""
    train: Examples
    dev: Split
    mismatched: Split | None
    """MNLI's second dev set, where it is there."""
    batches: TaskBatches
    num_steps: int

    @property
    def inputs(self) -> dict[str, Any]:
        """What must not change under the names that the configuration has for it, by content."""
        return {
            "mask_fingerprint": self.mask_file.mask.fingerprint() if self.mask_file else None,
            "model_sha256": self.downstream.sha256,
            "data_sha256": {"train": self.train.sha256, "dev": self.dev.examples.sha256},
        }

    @property
    def span(self) -> Span:
        """All steps with their schedule."""
        assert self.config.warmup_steps is not None
        return Span(1, self.num_steps, decay=self.num_steps, warmup=self.config.warmup_steps)

    @property
    def wants_best(self) -> bool:
        """Whether the weights of the best evaluation are needed at the end, and not its scores alone."""
        return bool(self.config.save_model or self.config.predict or self.mismatched)

    def split(self, name: str) -> Split:
        """Another split of the task, to be predicted."""
        return _split(self.config, self.task, self.downstream, load_split(self.task, self.config.data, name))


def open_job(config: FinetuneConfig, world: World, *, model: str) -> Job:
    """Load and check everything that a cell needs.

    Args:
        config: the knobs.
        world: the ranks.
        model: hub name or folder for ``config.model``.

    Raises:
        UserError: unknown task, missing or malformed data, a mask for another backbone, files that would be
            overwritten; nothing has been written by then.
    """
    task = task_named(config.task)
    check_outputs(config, task, config.open_run(config.run, begin=False))
    check_mixed_precision(config.mixed_precision, world.device)
    check_data(task, config.data, [name for name in predicted_splits(task) if config.predict and name != "dev"])
    train, dev = (load_split(task, config.data, name) for name in ("train", "dev"))
    mask_file = MaskFile.read(config.mask) if config.mask else None
    downstream = load_downstream(model, kind=task.kind, labels=task.labels, dropout=config.dropout, seed=config.seed)
    mask = downstream.fitted(mask_file.mask, str(mask_file.path)) if mask_file else None
    config = resolved(config, task, downstream.max_positions)
    assert config.seq_len
    assert config.batch_size
    assert config.epochs
    check_positions(config.seq_len, replace(downstream, name=config.model))
    train = train.subset(config.num_samples, config.seed) if config.num_samples else train
    batching = Batching.of(config.batch_size, config.micro_batch_size, world.size)
    features = _features(config, task, downstream, train, training=True)
    batches = TaskBatches(
        features, batch_size=config.batch_size, seed=config.seed, rank=world.rank, world_size=world.size,
        micro_batch_size=batching.micro_batch_size,
    )  # fmt: skip
    num_steps = config.steps or config.epochs * batches.steps_per_epoch
    if config.warmup_steps is None:
        config = replace(config, warmup_steps=round(task.warmup * num_steps))
    assert config.warmup_steps is not None
    check_warmup(config.warmup_steps, num_steps, "--steps" if config.steps else "--epochs")
    mismatched = None
    if has_split(task, config.data, "dev_mismatched"):
        mismatched = _split(config, task, downstream, load_split(task, config.data, "dev_mismatched"))
    return Job(
        config, task, downstream, mask_file, mask, train, _split(config, task, downstream, dev), mismatched,
        batches, num_steps,
    )  # fmt: skip


def check_tasks(config: SweepConfig, tasks: Sequence[Task]) -> None:
    """Check that the rows of a sweep are there, as many as are asked for, and steps enough to reach the peak rate.

    Raises:
        UserError: naming the knob, for the first task that lacks something.
    """
    for task in tasks:
        check_data(task, config.data, ["train", "dev"])
    for task in tasks if any(config.num_samples) or config.warmup_steps else ():
        train = load_split(task, config.data, "train")
        for num_samples in config.num_samples:
            if num_samples:
                train.check_subset(num_samples, task.title)
            if config.warmup_steps and not config.steps and task.kind != SPAN:  # whose rows are several windows each
                num_rows = num_samples or len(train)
                steps = -(-num_rows // (config.batch_size or task.batch_size)) * (config.epochs or task.epochs)
                check_warmup(config.warmup_steps, steps, f"--epochs on {num_rows} rows of {task.title}")


def check_cells(config: SweepConfig, folder: str) -> None:
    """Check the sequence length and every mask of a sweep against its backbone.

    Args:
        config: the sweep's.
        folder: hub name or folder to load ``config.model`` from.

    Raises:
        UserError: what would end the first cell that needs it.
    """
    if not (config.masks or config.seq_len):
        return
    downstream = load_downstream(folder, kind="regression", labels=(), dropout=None, seed=0)
    downstream = replace(downstream, name=config.model)
    if config.seq_len:
        check_positions(config.seq_len, downstream)
    for found in map(MaskFile.read, config.masks):
        downstream.fitted(found.mask, str(found.path))


def check_positions(seq_len: int, downstream: Downstream) -> None:
    """Check that the model has a position for every token.

    Raises:
        UserError: naming ``--seq_len``.
    """
    if seq_len > downstream.max_positions:
        raise UserError(
            f"--seq_len {seq_len} is more than the {downstream.max_positions} positions of {downstream.name}; "
            f"type at most --seq_len {downstream.max_positions}"
        )


def resolved(config: FinetuneConfig, task: Task, max_positions: int) -> FinetuneConfig:
    """The configuration with the task's own hyper-parameters where none are given."""
    defaults = {name: getattr(task, name) for name in ("epochs", "batch_size", "lr", "eval_every")}
    defaults["seq_len"] = min(task.seq_len, max_positions)
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return replace(config, task=task.name, **missing)


def outputs(config: FinetuneConfig, task: Task) -> dict[Path, str]:
    """What a cell writes outside its run directory -> the knob that names it."""
    wanted = {Path(config.save_model): "--save_model"} if config.save_model else {}
    if config.predict:
        wanted |= dict.fromkeys(predicted_files(Path(config.predict), task).values(), "--predict")
    return wanted


def check_outputs(config: FinetuneConfig, task: Task, run: Run) -> None:
    """Refuse to overwrite what is at the names of `outputs`, unless it is from this run.

    Raises:
        UserError: naming the knob to change.
    """
    own = run.result_of("outputs")["paths"] if run.done("outputs") else []
    for path, argument in outputs(config, task).items():
        if path.absolute() in (run.folder.absolute(), *run.folder.absolute().parents):
            raise UserError(f"{path} is where the run itself goes, {run.folder}; type another {argument}")
        if str(path.absolute()) not in own:
            refuse_existing(path, argument)


def claim_outputs(config: FinetuneConfig, task: Task, run: Run) -> None:
    """Note in the run directory what it is about to write elsewhere, so that a kill in between leaves it its own."""
    check_outputs(config, task, run)  # once more: between then and now lies the training
    run.mark_done("outputs", {"paths": [str(path.absolute()) for path in outputs(config, task)]})


def predicted_splits(task: Task) -> tuple[str, ...]:
    """What ``--predict`` predicts: the test rows; of SQuAD, whose test set is hidden, and built-in tasks, dev."""
    if not task.folder:
        return ("dev",)
    return ("test", "test_mismatched") if "test_mismatched" in (task.files or {}) else ("test",)


def predicted_files(file: Path, task: Task) -> dict[str, Path]:
    """Split -> where its predictions go; MNLI's second file has ``-mm`` in its name, as GLUE wants MNLI-mm.tsv."""
    first, *second = predicted_splits(task)
    stem = file.stem.removesuffix("-m")
    return {first: file} | {split: file.with_name(f"{stem}-mm{file.suffix}") for split in second}


def _features(
    config: FinetuneConfig, task: Task, downstream: Downstream, examples: Examples, *, training: bool
) -> Features:
    assert config.seq_len
    if task.kind == SPAN:
        stride = min(task.doc_stride, config.seq_len // 3)
        return span_features(task, examples, downstream.tokenizer, config.seq_len, stride, training=training)
    return class_features(task, examples, downstream.tokenizer, config.seq_len)


def _split(config: FinetuneConfig, task: Task, downstream: Downstream, examples: Examples) -> Split:
    features = _features(config, task, downstream, examples, training=False)
    return Split(task, examples, features, config.eval_batch_size)
