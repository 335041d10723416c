"""What a fine-tuning gives away: a Hugging Face folder with its card, predictions in GLUE's format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finemask_ds.data.squad import squad_predictions
from finemask_ds.data.tasks import Task
from finemask_ds.engine.world import World
from finemask_ds.finetune.evaluate import Predictions, Split
from finemask_ds.finetune.job import Job, claim_outputs, predicted_files
from finemask_ds.models.downstream import SPAN, TaskModel
from finemask_ds.models.load import save_folder
from finemask_ds.run import Run, atomic_write, write_json


def give(job: Job, run: Run, result: Mapping[str, Any], model: TaskModel, world: World) -> None:
    """Write what ``--save_model`` and ``--predict`` ask for; ``model`` has the weights of the best dev score."""
    config, downstream = job.config, job.downstream
    world.on_first(lambda: claim_outputs(config, job.task, run))
    if config.predict:
        for name, path in predicted_files(Path(config.predict), job.task).items():
            split = job.dev if name == "dev" else job.split(name)
            predictions = split.predict(model, world)
            world.on_first(lambda: write_predictions(path, split, predictions))  # noqa: B023 - called at once
    if config.save_model:
        folder = Path(config.save_model)

        def save() -> None:
            if not folder.exists():  # else it is whole, and from before a kill
                card = model_card(job.task, result)
                save_folder(downstream.model, downstream.tokenizer, folder, README=card)

        world.on_first(save)


def write_predictions(path: Path, split: Split, predictions: Predictions) -> None:
    """Write predictions as GLUE's server takes them: index and prediction, tab-separated; of SQuAD, JSON by id."""
    if split.task.kind == SPAN:
        write_json(path, squad_predictions(split.examples, [str(text) for text in predictions]))
        return
    with atomic_write(path) as stream:
        stream.write("index\tprediction\n")
        # By the rows' own numbers: a row that could not be read has none here, and the server counts it.
        for number, written in zip(split.examples.ids, _written(split.task, predictions), strict=True):
            stream.write(f"{number}\t{written}\n")


def _written(task: Task, predictions: Predictions) -> Iterable[str]:
    """Labels as the files of the task write them; scores with three decimals, inside their range."""
    if task.kind == "regression":
        low, high = task.score_range
        return (f"{min(max(float(value), low), high):.3f}" for value in predictions)
    labels = task.written or task.labels
    return (labels[int(number)] for number in predictions)


def model_card(task: Task, result: Mapping[str, Any]) -> str:
    """A README for the hub: what the model is, what it scores, how it was made."""
    from huggingface_hub import EvalResult, ModelCardData

    figures = {name: value for name, value in result["metrics"].items() if value is not None}
    is_local = Path(result["model"]).is_dir()  # Then nobody elsewhere knows it, nor should see where it lay.
    model = Path(result["model"]).resolve().name if is_local else result["model"]
    data = ModelCardData(
        library_name="transformers", tags=["finemask_ds", "pruning", "lottery-ticket"], model_name=task.title,
        base_model=None if is_local or model == "builtin" else model,
        eval_results=[
            EvalResult(
                task_type="question-answering" if task.kind == SPAN else "text-classification", dataset_type=task.name,
                dataset_name=task.title, dataset_split="validation", metric_type=name, metric_value=round(value, 4),
            )
            for name, value in figures.items()
        ],
    )  # fmt: skip
    scores = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    what = "The full model" if result["mask"] is None else (
        f"A {result['method']} subnetwork: {result['sparsity']:.2%} of the masked weights are exactly zero "
        f"(mask sha256 {result['mask_sha256'][:16]})"
    )  # fmt: skip
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {result['method']} on {task.title}\n\n"
        f"{what}, fine-tuned from {model} on {result['train_rows']:,} rows of {task.title} by finemask_ds: "
        f"{result['steps']} steps of {result['batch_size']}, peak rate {result['lr']:g}, seed {result['seed']}.\n\n"
        f"Dev ({result['dev_rows']:,} rows), best at step {result['best_step']}: {scores}. The best of "
        f"{len(result['curve'])} looks at the dev rows is an optimistic figure; the last was "
        f"{result['last_score'] if result['last_score'] is None else round(result['last_score'], 4)}.\n"
    )
