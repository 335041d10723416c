"""From rows of a task to the tokens of a batch: one compact store for every task, and the batches drawn from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from finemask_ds.data.collate import EpochOrders, rank_share
from finemask_ds.data.tasks import Examples, Task
from finemask_ds.data.text import plain_backend
from finemask_ds.errors import UserError

TEXTS_AT_ONCE = 4096  # handed to the tokenizer: enough for all its threads, few enough to hold


class PairTokenizer(Protocol):
    """What is used of a `transformers.PreTrainedTokenizerFast`."""

    cls_token_id: int | None
    pad_token_id: int | None
    model_input_names: list[str]

    @property
    def backend_tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` inside."""


@dataclass(frozen=True)
class Features:
    """Token ids of rows of any lengths, end to end and without padding, and what is to be predicted from each."""

    input_ids: np.ndarray
    """int32 [tokens]; row r is ``bounds[r]`` to ``bounds[r + 1]``."""
    token_type_ids: np.ndarray | None
    """int8 [tokens]; None where the model has no token types (RoBERTa)."""
    bounds: np.ndarray
    """int64 [rows + 1]."""
    targets: Mapping[str, np.ndarray]
    """Key of a batch -> [rows]: int64 classes or positions, float32 scores; empty where the split has none."""
    pad_id: int

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return np.diff(self.bounds)

    def batch(self, rows: Sequence[int] | np.ndarray, *, weight: float = 1.0) -> dict[str, Tensor]:
        """Some rows, padded on the right to the longest of them.

        Returns:
            input_ids, attention_mask and, where there are any, token_type_ids, int64 [rows, longest]; the targets,
            int64 or float32 [rows]; weight, float32 [rows], which is `weight` throughout.
        """
        rows = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths[rows]
        columns = np.arange(lengths.max())
        real = columns < lengths[:, None]
        tokens = (self.bounds[rows][:, None] + columns)[real]

        def padded(values: np.ndarray, filling: int) -> Tensor:
            table = np.full(real.shape, filling, dtype=np.int64)
            table[real] = values[tokens]
            return torch.from_numpy(table)

        batch = {"input_ids": padded(self.input_ids, self.pad_id), "attention_mask": torch.from_numpy(real).long()}
        if self.token_type_ids is not None:
            batch["token_type_ids"] = padded(self.token_type_ids, 0)
        batch |= {key: torch.from_numpy(values[rows]) for key, values in self.targets.items()}
        return {**batch, "weight": torch.full((len(rows),), weight, dtype=torch.float32)}


def class_features(task: Task, examples: Examples, tokenizer: PairTokenizer, seq_len: int) -> Features:
    """Tokenise the one or two texts of each row of a classification or a regression.

    What is longer than `seq_len` tokens, special ones included, loses the ends of its texts, the longer one's first.
    Special tokens never arise from text: "[SEP]" in a sentence is the characters it consists of.

    Raises:
        UserError: `seq_len` leaves no room for text, or the tokenizer is of another kind than BERT's and RoBERTa's.
    """
    if task.kind not in ("classification", "regression"):
        raise ValueError(f"{task.name} is a {task.kind} task")
    backend, has_types = own_backend(tokenizer), uses_token_types(tokenizer)
    is_pair = examples.second is not None
    room = seq_len - backend.num_special_tokens_to_add(is_pair)
    if room < 1 + is_pair:
        raise UserError(f"--seq_len {seq_len} leaves no room for the text of {task.title} between special tokens; "
                        f"type {seq_len - room + 1 + is_pair} or more")  # fmt: skip
    backend.enable_truncation(seq_len, strategy="longest_first")
    store = FeatureStore(has_types)
    for part in parts(len(examples), TEXTS_AT_ONCE):
        texts: Any = examples.first[part]
        if examples.second is not None:
            texts = list(zip(texts, examples.second[part], strict=True))
        encodings = backend.encode_batch_fast(texts)
        store.add([encoding.ids for encoding in encodings], [encoding.type_ids for encoding in encodings])
    targets = {}
    if examples.targets is not None:
        dtype = np.int64 if task.kind == "classification" else np.float32
        targets["labels"] = np.array(examples.targets, dtype=dtype)
    return Features(*store.arrays(), targets, pad_id(tokenizer))


def own_backend(tokenizer: PairTokenizer) -> Any:
    """See `plain_backend`.

    Raises:
        UserError: it does not put a [CLS] before what it reads, so that no head would know where to look.
    """
    backend = plain_backend(tokenizer)
    if tokenizer.cls_token_id is None or backend.encode("").ids[:1] != [tokenizer.cls_token_id]:
        raise UserError("the tokenizer puts no [CLS] before a text; type a --model of the BERT or RoBERTa kind")
    return backend


def uses_token_types(tokenizer: PairTokenizer) -> bool:
    """Whether the tokenizer's model tells a pair's two texts apart by token types."""
    return "token_type_ids" in tokenizer.model_input_names


def pad_id(tokenizer: PairTokenizer) -> int:
    """The token to fill up with; the attention mask hides it, so where there is none any will do."""
    return tokenizer.pad_token_id or 0


def parts(number: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover the first `number` places in order."""
    return (slice(start, start + size) for start in range(0, number, size))


class FeatureStore:
    """Collects the tokens of rows as arrays, so that the lists of a whole data set are never held at once."""

    def __init__(self, has_types: bool) -> None:
        self.has_types = has_types
        self.ids: list[np.ndarray] = []
        self.types: list[np.ndarray] = []
        self.lengths: list[int] = []

    def add(self, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]]) -> None:
        """Append rows: their token ids and token types."""
        self.lengths += [len(row) for row in ids]
        self.ids.append(flat(ids, np.int32))
        if self.has_types:
            self.types.append(flat(types, np.int8))

    def arrays(self) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """``input_ids``, ``token_type_ids`` and ``bounds`` of `Features`."""
        bounds = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)]).astype(np.int64)
        types = np.concatenate([np.empty(0, np.int8), *self.types]) if self.has_types else None
        return np.concatenate([np.empty(0, np.int32), *self.ids]), types, bounds


def flat(rows: Iterable[Iterable[int]], dtype: type[np.integer]) -> np.ndarray:
    """The integers of all rows, end to end."""
    return np.fromiter(chain.from_iterable(rows), dtype)


class TaskBatches:
    """The training batches of one rank: `batches(step)` for steps from 1, in any order.

    Each epoch is a permutation of all rows drawn from (seed, epoch) and cut into global batches, the last of which
    has what is left. A rank takes the contiguous positions [rank * b, (rank + 1) * b) of the global batch and cuts
    them, the shortest rows first, into micro-batches, so that 2 ranks x b, 1 rank x 2b and 2 micro-batches of b are the
    same rows.

    All ranks make the same number of micro-batches at a step, for every forward is a collective in ZeRO-3: where the
    last batch of an epoch has no row left for one, it is one row of that batch with weight 0.

    Args:
        features: the rows (windows, where the task is a span task).
        batch_size: rows per optimizer step over all ranks.
        seed: of the order.
        rank, world_size: which share to take.
        micro_batch_size: rows per forward on this rank; 0: all of the rank's at once.

    Raises:
        UserError: the batch cannot be cut evenly into ranks and micro-batches, or there are no rows.
    """

    def __init__(
        self,
        features: Features,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int = 0,
    ) -> None:
        if len(features) == 0:
            raise UserError("there are no training rows; give a training file with rows in it by --data")
        self.share = rank_share(batch_size, world_size, micro_batch_size)
        self.features, self.batch_size, self.rank = features, batch_size, rank
        self.micro_batch_size = micro_batch_size or self.share
        self.steps_per_epoch = -(-len(features) // batch_size)
        self._orders = EpochOrders(len(features), seed)

    def __call__(self, step: int) -> list[dict[str, Tensor]]:
        """This rank's micro-batches at `step`, each as `Features.batch` makes it; weight is 1, or 0 in a filling."""
        if step < 1:
            raise ValueError(f"steps count from 1, not {step}")
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        rows = self._orders(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        mine = rows[self.rank * self.share : (self.rank + 1) * self.share]
        # A step is a sum over its rows, so their order is free: rows of one length in one micro-batch pad least.
        mine = mine[np.argsort(self.features.lengths[mine], kind="stable")]
        # No rank has more rows than the first one.
        micro_batches = [mine[part] for part in parts(min(self.share, len(rows)), self.micro_batch_size)]
        return [
            self.features.batch(micro) if len(micro) else self.features.batch(rows[:1], weight=0.0)
            for micro in micro_batches
        ]


def task_dev_batches(features: Features, batch_size: int) -> list[dict[str, Tensor]]:
    """All rows, the shortest first so that little is padded; "row", int64 [rows], tells which row is where."""
    order = np.argsort(features.lengths, kind="stable")
    batches = []
    for part in parts(len(features), batch_size):
        batches.append({**features.batch(order[part]), "row": torch.from_numpy(order[part])})
    return batches
