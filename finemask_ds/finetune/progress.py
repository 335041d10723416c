"""Dev scores along a fine-tuning: the curve, the best, the last; and the weights of the best where they are wanted."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import nn

from finemask_ds.data.metrics import Scores
from finemask_ds.run import atomic_write


@dataclass
class Curve:
    """Evaluations in order, as JSON values; the best is the first with the highest score."""

    metric: str
    points: list[dict[str, Any]] = field(default_factory=list)

    def add(self, step: int, epoch: float, train_loss: float | None, scores: Scores) -> bool:
        """Note an evaluation; whether it is the best so far. An undefined score is below every other."""
        before = self.best if self.points else None
        point = {"step": step, "epoch": epoch, "train_loss": train_loss, "metrics": scores.values}
        self.points.append({**point, "undefined": scores.undefined})
        return before is None or self._rank(self.points[-1]) > self._rank(before)

    @property
    def best(self) -> dict[str, Any]:
        """The best evaluation so far; there must be one."""
        return max(self.points, key=self._rank)

    def _rank(self, point: dict[str, Any]) -> float:
        value = point["metrics"][self.metric]
        return float("-inf") if value is None else value


def keep_weights(model: nn.Module, path: Path) -> None:
    """Write a model's weights, atomically."""
    with atomic_write(path, "wb") as stream:
        stream.write(save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}))


def put_back(model: nn.Module, path: Path) -> None:
    """Give a model the weights that ``keep_weights`` wrote."""
    model.load_state_dict(load_file(path))
