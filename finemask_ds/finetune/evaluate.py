"""What a model predicts for the rows of a split, and what that scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from finemask_ds.data.features import Features, task_dev_batches
from finemask_ds.data.metrics import Scores, score
from finemask_ds.data.spans import decode_spans
from finemask_ds.data.tasks import Examples, Task
from finemask_ds.data.windows import SpanFeatures
from finemask_ds.engine.world import World
from finemask_ds.models.downstream import TaskModel

Predictions = Sequence[int] | Sequence[float] | Sequence[str]


@dataclass(frozen=True)
class Split:
    """The rows of one split, and their features, to be predicted."""

    task: Task
    examples: Examples
    features: Features
    batch_size: int

    def scores(self, model: TaskModel, world: World) -> Scores:
        """Every metric of the task on these rows; the same on all ranks."""
        assert self.examples.targets is not None
        return score(self.task, self.predict(model, world), self.examples.targets)

    @torch.no_grad()
    def predict(self, model: TaskModel, world: World) -> Predictions:
        """A class number, a score or the text of the answer for each row, in the order of the rows.

        Args:
            model: on the world's device; its mode, training or evaluation, is as before afterwards.
            world: the ranks, which take the batches in turns; all of them get all predictions.
        """
        was_training = model.training
        model.eval()
        try:
            own = [_logits(model, batch, world) for batch in self._batches()[world.rank :: world.size]]
        finally:
            model.train(was_training)
        by_row: dict[int, Any] = {}
        for part in world.gather(own):
            for rows, logits in part:
                by_row |= zip(rows.tolist(), logits, strict=True)
        ordered = [by_row[row] for row in range(len(by_row))]
        if isinstance(self.features, SpanFeatures):
            starts, ends = ([window[:, side] for window in ordered] for side in (0, 1))
            return decode_spans(self.features, starts, ends, self.examples)
        if self.task.kind == "regression":
            return [float(logits[0]) for logits in ordered]
        return [int(logits.argmax()) for logits in ordered]

    @torch.no_grad()
    def try_out(self, model: TaskModel, num_batches: int) -> int:
        """Run up to so many batches, spread over the rows' lengths, for their time alone; how many there were."""
        batches = self._batches()
        chosen = batches[:: max(1, len(batches) // num_batches)][:num_batches]
        model.eval()
        device = next(model.parameters()).device
        for batch in chosen:
            _logits(model, batch, World(device=device))
        return len(chosen)

    def _batches(self) -> list[dict[str, Tensor]]:
        return task_dev_batches(self.features, self.batch_size)


def _logits(model: TaskModel, batch: dict[str, Tensor], world: World) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Row numbers of a batch, int64 [rows], and the logits of each row (of span tasks, each window)."""
    on_device = {name: tensor.to(world.device) for name, tensor in batch.items() if name != "row"}
    return batch["row"].numpy(), model(on_device)["logits"].cpu().numpy()
