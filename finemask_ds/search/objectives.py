"""What a search optimises: a batch goes in, named sums come out (TAMT Section 3.4.3).

Sums, not means: the loop divides by the counts of the whole step over all ranks and micro-batches, so that a step sees
the same loss however its sequences are dealt out. Legend: B sequences, T tokens, H hidden, L layers, N masked tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finemask_ds.data.collate import IGNORED
from finemask_ds.errors import UserError
from finemask_ds.models.families import family_of
from finemask_ds.models.patch import dense

OBJECTIVES: Mapping[str, tuple[str, ...]] = {
    "mlm": ("mlm_loss",),
    "kd": ("kd_loss",),
    "mlm+kd": ("mlm_loss", "kd_loss"),
}
"""Objective -> the losses that are added up."""


class Objective(nn.Module):
    """A (masked) language model under one objective; what the engines train.

    MLM reads the masked text and predicts the chosen tokens; KD reads the plain text and mimics theta_0's hidden
    states; their sum does both on the masked text, in one forward.
    """

    def __init__(self, model: nn.Module, objective: str):
        super().__init__()
        family = family_of(model.config.model_type)  # type: ignore[union-attr,arg-type]
        self.model = model
        self.losses = OBJECTIVES[objective]
        self._backbone, self._head = family.backbone, family.head

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Micro-batch -> name -> scalar sum over this micro-batch (see ``counts`` for what it is a sum of).

        ``batch`` holds input_ids (masked), original_ids and labels, each [B, T] int64.
        """
        tokens = batch["input_ids"] if "mlm_loss" in self.losses else batch["original_ids"]
        hidden = self._hidden_states(tokens)
        sums: dict[str, Tensor] = {}
        if "mlm_loss" in self.losses:
            sums |= mlm_sums(getattr(self.model, self._head), hidden[-1], batch["labels"])
        if "kd_loss" in self.losses:
            sums["kd_loss"] = kd_sum(self._teacher_states(tokens), hidden[1:])
        return sums

    def _hidden_states(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """The embedding output and each layer's output, L + 1 tensors [B, T, H]; for MLM alone the last one."""
        with_layers = "kd_loss" in self.losses
        output = getattr(self.model, self._backbone)(input_ids=tokens, output_hidden_states=with_layers)
        return output.hidden_states if with_layers else (output.last_hidden_state,)

    @torch.no_grad()
    def _teacher_states(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Layer outputs of the unpruned model in evaluation mode: the same frozen weights, read without masks."""
        was_training = self.model.training
        self.model.eval()
        try:
            with dense(self.model):
                return self._hidden_states(tokens)[1:]
        finally:
            self.model.train(was_training)


def counts(batch: Mapping[str, Tensor]) -> dict[str, int]:
    """What each sum of a micro-batch is a sum over: masked tokens, or all tokens."""
    masked = int((batch["labels"] != IGNORED).sum())
    return {"mlm_loss": masked, "mlm_accuracy": masked, "kd_loss": batch["labels"].numel()}


def mlm_sums(head: nn.Module, hidden: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Cross-entropy and hits summed over the masked tokens; the head runs on those alone.

    Args:
        head: hidden states -> logits over the vocabulary.
        hidden: [B, T, H].
        labels: [B, T] int64, ``IGNORED`` where nothing is predicted.
    """
    chosen = labels != IGNORED
    logits = head(hidden[chosen]).float()  # [N, vocabulary]
    targets = labels[chosen]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return {"mlm_loss": loss, "mlm_accuracy": (logits.detach().argmax(-1) == targets).sum().float()}


def kd_sum(teacher: tuple[Tensor, ...], student: tuple[Tensor, ...]) -> Tensor:
    """TAMT Eq. 6 summed over tokens: mean over layers of 1 - cos(H^T, H^S).

    Args:
        teacher: L tensors [B, T, H].
        student: L tensors [B, T, H].
    """
    if len(teacher) != len(student) or not teacher:
        raise UserError(f"teacher and student have {len(teacher)} and {len(student)} layers; they must be one model")
    distances = [
        (1 - F.cosine_similarity(t.float(), s.float(), dim=-1)).sum() for t, s in zip(teacher, student, strict=True)
    ]
    return torch.stack(distances).sum() / len(distances)
