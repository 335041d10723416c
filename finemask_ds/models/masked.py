"""Modules that compute with W * M: a linear map and an embedding whose weight is masked in the forward pass.

Legend: W weight, M mask (bool), S scores (fp32), all of one shape [rows, columns]. One mechanism serves all methods:
TAMT freezes W and learns S, IMP trains W under a fixed M, evaluation has neither gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finemask_ds.masks.binarize import masked, masked_rows, masked_weight
from finemask_ds.masks.select import places


class Masked(nn.Module):
    """A module whose ``weight`` is read through a mask.

    The weight parameter is the original module's own object, so tied decoders, names and optimizers still see it.
    It is a class of its own and no nn.Linear: DeepSpeed reduces parameters that hang directly on an nn.Linear in the
    autocast type, and in ZeRO-3 gathers them so, which would round the scores (tests/engine/test_traps.py).
    """

    mask: Tensor

    def __init__(self, weight: Tensor, mask: Tensor, scores: Tensor | None):
        super().__init__()
        self.weight = weight
        self.scores = None if scores is None else nn.Parameter(scores.to(torch.float32).clone())
        # Not persistent: a mask follows from the scores (TAMT) or is stored as a mask file (IMP), never twice.
        self.register_buffer("mask", mask.clone(), persistent=False)
        self.is_dense = False
        self.keeps_product = False
        """Whether W * M is kept from one forward to the next; for a frozen W that lies whole on every rank."""
        self._product: Tensor | None = None

    def effective_weight(self) -> Tensor:
        """W * M, or W while the model is dense (the teacher); shape and dtype of W."""
        if self.is_dense:
            return self.weight
        return masked_weight(self.weight, self.scores, self.mask, self.product())

    def product(self) -> Tensor | None:
        """The W * M that is kept, made where it is missing; None where none is to be kept."""
        if self.keeps_product and self._product is None:
            self._product = masked_weight(self.weight.detach(), None, self.mask)
        return self._product

    def set_mask(self, mask: Tensor) -> None:
        """Put other bits in, in place: bool of the weight's shape; W * M, where it is kept, follows in what differs."""
        mask = mask.to(self.mask.device)
        if self._product is not None:
            changed = places((mask ^ self.mask).flatten())
            self._product.view(-1)[changed] = masked(self.weight.detach().flatten()[changed], mask.flatten()[changed])
        self.mask.copy_(mask)


class MaskedLinear(Masked):
    """``F.linear`` with a masked weight [out, in]."""

    def __init__(self, linear: nn.Linear, mask: Tensor, scores: Tensor | None = None):
        super().__init__(linear.weight, mask, scores)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(x, self.effective_weight(), self.bias)


class MaskedEmbedding(Masked):
    """``F.embedding`` with a masked table [vocabulary, hidden]."""

    def __init__(self, embedding: nn.Embedding, mask: Tensor, scores: Tensor | None = None):
        super().__init__(embedding.weight, mask, scores)
        self.padding_idx = embedding.padding_idx

    def forward(self, token_ids: Tensor) -> Tensor:
        """[...] int64 -> [..., hidden]."""
        if self.is_dense:
            return F.embedding(token_ids, self.weight, self.padding_idx)
        return masked_rows(self.weight, self.scores, self.mask, token_ids, self.padding_idx)


class TiedDecoder(nn.Module):
    """The MLM decoder that reads the masked embedding, for IMP where one matrix is trained and pruned as one."""

    def __init__(self, embedding: MaskedEmbedding, bias: nn.Parameter):
        super().__init__()
        # In a tuple, so that the embedding is not registered a second time as this module's child.
        self._embedding = (embedding,)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocabulary]."""
        return F.linear(x, self._embedding[0].effective_weight(), self.bias)


def scores_name(matrix: str) -> str:
    """Name of the scores of a matrix: ``...query.weight`` -> ``...query.scores``."""
    return matrix.removesuffix("weight") + "scores"


def matrix_name(parameter: str) -> str:
    """Name of the matrix that a trained parameter belongs to: ``...query.scores`` -> ``...query.weight``."""
    return parameter.removesuffix("scores") + "weight" if parameter.endswith(".scores") else parameter
