"""What a step of a search must hold, send and compute, from a model's shapes: the arithmetic behind docs/scale.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from benchmarks.memory import predicted
from finemask_ds.masks.sharded import DIGITS

PERSISTENT = 100_000
"""Elements up to which ZeRO-3 keeps a parameter whole (configs/ds/zero3.json)."""
REUSE = 1_000_000_000
"""Elements between two uses up to which ZeRO-3 keeps what it has gathered (stage3_max_reuse_distance)."""
COUNTS_BYTES = 8 * sum(1 << width for _, width in DIGITS)
"""What a rank adds up for each matrix to select over pieces, where its threshold is sought from the start."""


@dataclass(frozen=True)
class Shape:
    """A BERT-like encoder with an MLM head tied to its embedding."""

    hidden: int
    layers: int
    vocabulary: int = 30_522
    positions: int = 512

    @property
    def inner(self) -> int:
        """Width of the feed-forward layers."""
        return 4 * self.hidden

    @property
    def encoder(self) -> int:
        """Weights of the encoder's matrices."""
        return self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.inner)

    @property
    def masked(self) -> int:
        """Weights under a mask: the embedding and the encoder's matrices (TAMT Section 3.2)."""
        return self.vocabulary * self.hidden + self.encoder

    @property
    def head(self) -> int:
        """Parameters of the MLM head without the tied decoder."""
        return self.hidden**2 + 3 * self.hidden + self.vocabulary

    @property
    def rest(self) -> int:
        """Positions, types, norms and biases."""
        per_layer = 4 * self.hidden + self.inner + self.hidden + 4 * self.hidden
        return (self.positions + 4) * self.hidden + self.layers * per_layer

    def sizes(self, method: str) -> dict[str, int]:
        """Elements that are masked, trained and frozen in ``tamt`` or ``imp``."""
        if method == "tamt":
            return {"masked": self.masked, "trained": self.masked + self.head, "frozen": self.masked + self.rest}
        return {"masked": self.masked, "trained": self.masked + self.head + self.rest, "frozen": 0}

    def flops(self, tokens: int, seq_len: int, masked_share: float = 0.15) -> float:
        """Of a forward and a backward: 6 for each weight and token, the decoder where a token is masked, attention."""
        products = self.encoder + masked_share * (self.vocabulary * self.hidden + self.hidden**2)
        return tokens * (6 * products + 12 * self.layers * self.hidden * seq_len)


SHAPES = {
    "BERT-base": Shape(768, 12),
    "BERT-large": Shape(1024, 24),
    "1B": Shape(2048, 19),
    "7B": Shape(4096, 34),
}


@dataclass(frozen=True)
class Parameters:
    """Elements of a search's parameters as the wire sees them."""

    trained: int
    frozen: int
    masked: int
    matrices: int
    persistent_trained: int = 0
    """Of ``trained``, those that ZeRO-3 keeps whole."""
    persistent_frozen: int = 0
    gathered_twice: int = 0
    """What ZeRO-3 gathers a second time, for the backward."""

    @classmethod
    def of_shape(cls, shape: Shape, method: str) -> Parameters:
        """Those of a model that is too large to be at hand; its vectors, which stay whole, are not counted apart."""
        sizes = shape.sizes(method)
        per_weight = 2 if method == "tamt" else 1
        return cls(
            **sizes, matrices=1 + 6 * shape.layers, gathered_twice=max(0, per_weight * shape.encoder - REUSE // 2)
        )

    @classmethod
    def of_lists(cls, trained: Iterable[int], frozen: Iterable[int], masked: int, matrices: int) -> Parameters:
        """Those of a model at hand, so small that it is gathered once, by each parameter's number of elements."""
        trained, frozen = list(trained), list(frozen)
        return cls(
            sum(trained), sum(frozen), masked, matrices,
            sum(size for size in trained if size <= PERSISTENT), sum(size for size in frozen if size <= PERSISTENT),
        )  # fmt: skip


def wire_bytes(
    parameters: Parameters,
    method: str,
    stage: int,
    ranks: int,
    *,
    accumulation: int = 1,
    sum_bytes: int = 4,
    frozen_bytes: int = 4,
    backend: str = "gloo",
) -> dict[str, float]:
    """Bytes that all ranks together send in a step, by what they are for.

    A ring sums S bytes by sending 2 (n - 1) S and gathers them by sending (n - 1) S; scattering a sum costs NCCL as
    much as gathering, while gloo sums all of it. DeepSpeed's stages 1 and 2 sum whole gradients, though each rank
    keeps its part only.

    Args:
        parameters: of the search.
        method: ``tamt`` or ``imp``.
        stage: of ZeRO.
        ranks: n.
        accumulation: micro-batches of a step.
        sum_bytes: of an element while gradients are summed ("communication_data_type").
        frozen_bytes: of a frozen weight.
        backend: ``gloo`` or ``nccl``.
    """
    gathered = ranks - 1
    summed = 2 * gathered
    gradients = summed * sum_bytes * parameters.trained
    if stage == 0:
        return {"gradients": gradients}
    if stage < 3:
        return {
            "gradients": gradients * (accumulation if stage == 2 else 1),
            "updated values": gathered * 4 * parameters.trained,
        }
    whole = 4 * parameters.persistent_trained + frozen_bytes * parameters.persistent_frozen
    divided = 4 * parameters.trained + frozen_bytes * parameters.frozen - whole
    element = divided / max(parameters.trained + parameters.frozen, 1)
    terms = {
        "gradients": gradients * accumulation * (1 if backend == "gloo" else 0.5),
        "gathered for forward and backward": gathered * accumulation * (divided + element * parameters.gathered_twice),
        "kept whole, renewed": gathered * whole,
    }
    if method == "tamt":
        terms["selection"] = summed * COUNTS_BYTES * parameters.matrices + gathered * parameters.masked / 8
    return terms


@dataclass(frozen=True)
class Cluster:
    """What a step's time depends on; figures are of one rank."""

    flops_per_sec: float
    """That training reaches."""
    selection_sec: float
    """Of a masked weight and step: selecting, binarising, multiplying and AdamW beyond what dense training does."""
    bytes_per_sec: float
    """That a rank sends and receives at once, inside a node."""
    node_ranks: int = 1
    """Ranks of a node."""
    between_bytes_per_sec: float = 0.0
    """The same from node to node; 0: as inside."""
    collective_sec: float = 0.0
    """That a round of messages takes, however short."""

    def step_sec(
        self,
        shape: Shape,
        method: str,
        stage: int,
        ranks: int,
        tokens: int,
        seq_len: int,
        *,
        backend: str,
        width: int = 2,
    ) -> dict[str, float]:
        """Seconds of a step, ``tokens`` on each rank and ``width`` bytes a frozen weight, by part; nothing overlaps."""
        parameters = Parameters.of_shape(shape, method)
        sent = wire_bytes(parameters, method, stage, ranks, frozen_bytes=width, backend=backend)
        inside = ranks <= self.node_ranks or not self.between_bytes_per_sec
        rate = self.bytes_per_sec if inside else self.between_bytes_per_sec
        selected = shape.masked / (ranks if stage == 3 else 1)
        # A bucket holds the largest matrix (engine/settings.py); stage 3 fetches matrix by matrix, W and scores.
        rounds = 3 * parameters.matrices if stage == 3 else math.ceil(shape.masked / (shape.vocabulary * shape.hidden))
        return {
            "computing": shape.flops(tokens, seq_len) / self.flops_per_sec,
            "masks": self.selection_sec * selected * (method == "tamt"),
            "sending": sum(sent.values()) / ranks / rate,
            "waiting": self.collective_sec * rounds * math.log2(ranks),
        }


def memory_bytes(shape: Shape, method: str, stage: int, ranks: int, dtype: str = "bf16") -> Mapping[str, float]:
    """What a rank holds between steps, by name (checked in results/README.md, "Memory per rank")."""
    largest = shape.vocabulary * shape.hidden
    return predicted(stage, dtype, shape.sizes(method), ranks, largest)
