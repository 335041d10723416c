"""Fine-tune a built-in encoder and a random one on the five built-in tasks: what pre-training is worth.

    python benchmarks/builtin_transfer.py --model FOLDER --out results/builtin_transfer.json

FOLDER is a Hugging Face checkpoint of the built-in model with its tokenizer. Every cell trains all weights with AdamW,
linear warm-up and decay; the random encoder has the same configuration and initial position embeddings. Scores are
0 to 100 on validation examples that share no text with the training examples; margins are differences of means.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from finemask_ds.data import builtin

FIELDS = {
    "acceptability": ("text",),
    "sentiment": ("text",),
    "entailment": ("premise", "hypothesis"),
    "similarity": ("first", "second"),
    "questions": ("question", "context"),
}


def encode(tokenizer: Any, task: str, examples: list[dict[str, Any]]) -> tuple[Any, torch.Tensor]:
    """Return the padded features of examples and their targets: classes, scores or [examples, 2] token positions."""
    columns = [[example[field] for example in examples] for field in FIELDS[task]]
    features = tokenizer(*columns, padding=True, return_tensors="pt")
    if task == "questions":
        tokens = [
            features.char_to_token(row, example["start"] + offset, sequence_index=1)
            for row, example in enumerate(examples)
            for offset in (0, len(example["answer"]) - 1)
        ]
        return features, torch.tensor(tokens).view(-1, 2)
    if task == "similarity":
        return features, torch.tensor([example["score"] for example in examples])
    return features, torch.tensor([example["label"] for example in examples])


def build(folder: str, task: str, pretrained: bool, seed: int) -> torch.nn.Module:
    """Return a model with a fresh head for the task on the pre-trained encoder or on a random one."""
    torch.manual_seed(seed)
    cls = AutoModelForQuestionAnswering if task == "questions" else AutoModelForSequenceClassification
    config = AutoConfig.from_pretrained(folder)
    if task != "questions":
        config.num_labels = len(builtin.TASKS[task].labels) or 1
        config.problem_type = "regression" if task == "similarity" else "single_label_classification"
    if pretrained:
        return cls.from_pretrained(folder, config=config)
    model = cls.from_config(config)
    with torch.no_grad():
        model.base_model.embeddings.position_embeddings.weight.copy_(torch.from_numpy(builtin.initial_positions()))
    return model


def batches(
    features: Any, targets: torch.Tensor, task: str, order: torch.Tensor, size: int
) -> Iterator[dict[str, Any]]:
    """Yield keyword arguments of the model for consecutive parts of an order of examples."""
    for part in order.split(size):
        batch = {name: tensor[part] for name, tensor in features.items()}
        length = int(batch["attention_mask"].sum(1).max())
        batch = {name: tensor[:, :length] for name, tensor in batch.items()}
        if task == "questions":
            yield batch | {"start_positions": targets[part, 0], "end_positions": targets[part, 1]}
        else:
            yield batch | {"labels": targets[part]}


def score(task: str, predicted: np.ndarray, wanted: np.ndarray) -> float:
    """Return the task's metric, 0 to 100."""
    metric = builtin.TASKS[task].metric
    if metric == "spearman":
        ranks = [np.unique(values, return_inverse=True)[1].astype(float) for values in (predicted, wanted)]
        order = [_mean_ranks(values) for values in ranks]
        return 100 * float(np.corrcoef(*order)[0, 1]) if predicted.std() > 0 else 0.0
    if metric == "matthews":
        spread = predicted.std() > 0 and wanted.std() > 0
        return 100 * float(np.corrcoef(predicted, wanted)[0, 1]) if spread else 0.0
    return 100 * float((predicted == wanted).reshape(len(wanted), -1).all(1).mean())


def _mean_ranks(codes: np.ndarray) -> np.ndarray:
    """Return ranks of values coded 0, 1, ... in ascending order; ties share the mean of their ranks."""
    _, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def fine_tune(folder: str, task: str, pretrained: bool, seed: int, options: argparse.Namespace) -> tuple[float, float]:
    """Return the validation score of one cell and the seconds its training took."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    num_train = options.examples or builtin.TASKS[task].num_train
    train = encode(tokenizer, task, builtin.task_examples(task, "train", num=num_train, seed=seed))
    valid = encode(tokenizer, task, builtin.task_examples(task, "valid", num=options.valid))
    model = build(folder, task, pretrained, seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01)
    steps = options.epochs * -(-num_train // options.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
    )
    started = time.perf_counter()
    for _ in range(options.epochs):
        for batch in batches(*train, task, torch.randperm(num_train), options.batch_size):
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    seconds = time.perf_counter() - started
    model.eval()
    predicted = []
    with torch.no_grad():
        for batch in batches(*valid, task, torch.arange(options.valid), 100):
            output = model(**batch)
            if task == "questions":
                predicted.append(torch.stack((output.start_logits.argmax(1), output.end_logits.argmax(1)), 1))
            else:
                predicted.append(output.logits[:, 0] if task == "similarity" else output.logits.argmax(1))
    return score(task, torch.cat(predicted).numpy(), valid[1].numpy()), seconds


def main() -> None:
    """Run every cell, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the pre-trained built-in model")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--examples", type=int, default=0, help="training examples; 0: what each task names")
    parser.add_argument("--valid", type=int, default=1000, help="validation examples of a task")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--tasks", nargs="+", default=list(builtin.TASKS), choices=list(builtin.TASKS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = []
    print(f"{'task':<14} {'metric':<12} {'pre-trained':>18} {'random':>18} {'margin':>7} {'s/cell':>7}", flush=True)
    for task in options.tasks:
        scores: dict[bool, list[float]] = {True: [], False: []}
        seconds = 0.0
        for pretrained in (True, False):
            for seed in options.seeds:
                value, seconds = fine_tune(options.model, task, pretrained, seed, options)
                scores[pretrained].append(round(value, 2))
        margin = float(np.mean(scores[True]) - np.mean(scores[False]))
        metric = builtin.TASKS[task].metric
        cells.append(
            {"task": task, "metric": metric, "pretrained": scores[True], "random": scores[False], "margin": margin}
        )
        columns = (" ".join(f"{value:.1f}" for value in scores[kind]) for kind in (True, False))
        print(
            f"{task:<14} {metric:<12} {next(columns):>18} {next(columns):>18} {margin:>7.1f} {seconds:>7.1f}",
            flush=True,
        )
    if options.out:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
        ).stdout.strip()
        record = {
            "command": " ".join(["python", *sys.argv]),
            "commit": commit,
            "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
            "cells": cells,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
