"""A backbone with a fresh head for one downstream task: classification, regression or answer spans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finemask_ds.errors import UserError
from finemask_ds.masks.mask import Mask
from finemask_ds.models.families import Family, family_of, max_positions
from finemask_ds.models.load import backbone_sha256, check_origin, load_model

SPAN = "span"


@dataclass(frozen=True)
class Downstream:
    """A Hugging Face model for one task with its tokenizer; weights in fp32 on the CPU."""

    model: nn.Module
    tokenizer: Any
    name: str
    sha256: str
    """Which theta_0 the backbone is, as a mask's provenance names it."""

    @property
    def family(self) -> Family:
        """The table of this architecture's names."""
        return family_of(self.model.config.model_type)  # type: ignore[union-attr,arg-type]

    @property
    def max_positions(self) -> int:
        """Longest sequence in tokens."""
        return max_positions(self.model)

    def fitted(self, mask: Mask, called: str) -> Mask:
        """The mask's matrices that this model has: a pooler is no part of a span model.

        Args:
            mask: of the backbone.
            called: the mask's file, for messages.

        Raises:
            UserError: where it is a mask for another backbone, by its own word or by its names and shapes.
        """
        check_origin(mask, called, self.name, self.sha256)
        shapes = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        places = {name: self.family.place(name) for name in mask}
        fitted = mask.only(
            name for name in mask if name in shapes or (place := places[name]) is None or place.role != "pooler"
        )
        try:
            fitted.check({name: shapes[name] for name in fitted if name in shapes})
        except UserError as error:
            raise UserError(f"{called} does not fit {self.name} ({error}); type --model as in the search") from error
        return fitted


def load_downstream(name: str, *, kind: str, labels: Sequence[str], dropout: float | None, seed: int) -> Downstream:
    """Load a backbone and draw a head for a task on it.

    Args:
        name: hub name or folder.
        kind: ``classification``, ``regression`` or ``span``.
        labels: class names; empty unless a classification.
        dropout: of hidden states, attention and head; None: as the checkpoint says.
        seed: of the head's draw (and of a pooler that the checkpoint lacks).

    Raises:
        UserError: unknown model or family, or a checkpoint without safetensors.
    """
    auto, options = "AutoModelForQuestionAnswering", dict[str, Any]()
    if dropout is not None:
        options |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"), dropout)
    if kind != SPAN:
        auto, id2label = "AutoModelForSequenceClassification", dict(enumerate(labels or ["score"]))
        options |= {
            "num_labels": len(labels) or 1,
            "problem_type": "regression" if kind == "regression" else "single_label_classification",
            "id2label": id2label, "label2id": {label: number for number, label in id2label.items()},
        }  # fmt: skip
    model, tokenizer, _ = load_model(name, auto, options, seed=seed)
    return Downstream(model, tokenizer, name, backbone_sha256(model))


class TaskModel(nn.Module):
    """A downstream model as the training loop wants it: sums over rows in training, logits in evaluation."""

    losses = ("loss",)

    def __init__(self, model: nn.Module, kind: str):
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a batch of features.

        Args:
            batch: input_ids, attention_mask and, where the tokenizer gives them, token_type_ids, int64 [rows, tokens];
                in training also weight, float [rows] (0: a row that only fills up), and labels [rows], int64 classes or
                float scores, or start_positions and end_positions, int64 [rows].

        Returns:
            In training ``loss``: the weighted sum over rows of cross entropy (of a span the mean of start's and end's,
            over the row's own tokens) or squared error. In evaluation ``logits``, fp32: [rows, classes], [rows, 1] or
            [rows, tokens, 2].
        """
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
        output = self.model(**inputs)
        if self.kind == SPAN:
            logits = torch.stack([output.start_logits, output.end_logits], dim=-1).float()
        else:
            logits = output.logits.float()
        if not self.training:
            return {"logits": logits}
        return {"loss": (self._row_losses(logits, batch) * batch["weight"]).sum()}

    def _row_losses(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        if self.kind == "regression":
            return (logits[:, 0] - batch["labels"]).square()
        if self.kind != SPAN:
            return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        # The papers' code pads every window to its longest and learns never to name padding; here windows are padded
        # to the longest beside them, and what is beside them must not matter.
        logits = logits.masked_fill(batch["attention_mask"][..., None] == 0, -torch.inf)
        start = nn.functional.cross_entropy(logits[:, :, 0], batch["start_positions"], reduction="none")
        end = nn.functional.cross_entropy(logits[:, :, 1], batch["end_positions"], reduction="none")
        return (start + end) / 2


def counts(batch: Mapping[str, Tensor]) -> dict[str, int]:
    """How many rows the loss of a batch is over."""
    return {"loss": int(batch["weight"].sum())}
