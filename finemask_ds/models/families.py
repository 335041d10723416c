"""Which matrices are prunable, by role, and where the MLM head stands: the one table of layer names.

A new family built like BERT, its MLM head one module, is one more row of ``FAMILIES``: the patterns of its matrices,
the attributes of its backbone and head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from finemask_ds.errors import UserError

LAYER_ROLES = ("Q", "K", "V", "AO", "FI", "FO")
"""Query, key, value, attention output, FFN in, FFN out: the matrices of a Transformer layer (TAMT Section 3.2)."""

TARGETS = {
    "paper": ("Emb", *LAYER_ROLES),
    "authors": ("Emb", *LAYER_ROLES, "pooler"),
    "bert-tickets": (*LAYER_ROLES, "pooler"),
}
"""Roles that each choice of ``--targets`` prunes: 73, 74 and 73 matrices in BERT-base."""


class Place(NamedTuple):
    """Where a matrix stands: its role and its layer (None outside the layers)."""

    role: str
    layer: int | None


@dataclass(frozen=True)
class Family:
    """Names of one architecture of Hugging Face ``...ForMaskedLM`` models."""

    backbone: str
    """Attribute of the encoder, also the prefix of its parameters' names."""
    head: str
    """Attribute of the MLM head: everything from hidden states to vocabulary logits."""
    decoder: str
    """Path of the decoder whose weight is tied to the word embedding."""
    embedding: str
    """Path of the word embedding."""
    roles: Mapping[str, str]
    """Role -> name of the weight inside the backbone, with ``{layer}`` where it repeats."""
    pads_positions: bool = False
    """Whether positions start after the padding token's number, so that so many rows are lost (RoBERTa: 512 of 514)."""

    @property
    def layers(self) -> str:
        """Path of the list of layers inside the backbone."""
        return self.roles["Q"].partition(".{layer}")[0]

    def within_layer(self, role: str) -> str:
        """Path inside its layer of the module whose weight has this role."""
        return self.roles[role].partition("{layer}.")[2].removesuffix(".weight")

    def place(self, name: str) -> Place | None:
        """The place of the parameter called ``name``, None where it is not prunable."""
        for role, pattern in self.roles.items():
            expression = re.escape(f"{self.backbone}.{pattern}").replace(re.escape("{layer}"), r"(\d+)")
            if match := re.fullmatch(expression, name):
                return Place(role, int(match[1]) if match.groups() else None)
        return None


_BERT_ROLES = {
    "Emb": "embeddings.word_embeddings.weight",
    "Q": "encoder.layer.{layer}.attention.self.query.weight",
    "K": "encoder.layer.{layer}.attention.self.key.weight",
    "V": "encoder.layer.{layer}.attention.self.value.weight",
    "AO": "encoder.layer.{layer}.attention.output.dense.weight",
    "FI": "encoder.layer.{layer}.intermediate.dense.weight",
    "FO": "encoder.layer.{layer}.output.dense.weight",
    "pooler": "pooler.dense.weight",
}

_ROBERTA = Family(
    "roberta", "lm_head", "lm_head.decoder", "roberta.embeddings.word_embeddings", _BERT_ROLES, pads_positions=True
)

FAMILIES: Mapping[str, Family] = {
    "bert": Family("bert", "cls", "cls.predictions.decoder", "bert.embeddings.word_embeddings", _BERT_ROLES),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}
"""``config.model_type`` -> names."""


def family_of(model_type: str) -> Family:
    """The family of a Hugging Face ``config.model_type``.

    Raises:
        UserError: for an unknown family, naming the known ones and where to add one.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"model family {model_type!r} is unknown; known are {', '.join(FAMILIES)}; "
            "a new one that is built like them, its MLM head a module of its own, is a row of FAMILIES in "
            "finemask_ds/models/families.py"
        )
    return FAMILIES[model_type]


def prunable(model: nn.Module, targets: str = "paper") -> dict[str, Place]:
    """Parameter name -> place of every matrix that ``targets`` prunes, in the order of ``named_parameters``.

    Raises:
        UserError: where a wanted role matches no matrix of the model.
    """
    family, wanted = family_of(model.config.model_type), TARGETS[targets]  # type: ignore[union-attr,arg-type]
    places = {
        name: place for name, _ in model.named_parameters() if (place := family.place(name)) and place.role in wanted
    }
    if missing := set(wanted) - {place.role for place in places.values()}:
        raise UserError(f"--targets {targets} wants {', '.join(sorted(missing))}, which this model does not have")
    return places


def max_positions(model: nn.Module) -> int:
    """Longest sequence in tokens."""
    config: Any = model.config
    offset = config.pad_token_id + 1 if family_of(config.model_type).pads_positions else 0
    return config.max_position_embeddings - offset


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of the MLM head: transform and bias; the decoder's matrix is the embedding's, or stays."""
    family = family_of(model.config.model_type)  # type: ignore[union-attr,arg-type]
    return {
        name: parameter for name, parameter in model.named_parameters()
        if not name.startswith(f"{family.backbone}.") and name != f"{family.decoder}.weight"
    }  # fmt: skip
