"""BERT masking and batches that depend on what is masked, never on which rank asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from finemask_ds.data.corpus import TextTokenizer
from finemask_ds.errors import UserError

IGNORED = -100
"""The label of a token that is not to be predicted, as torch's cross entropy has it."""

_MASKING, _ORDER = 0, 1  # second word of the generators' keys: the draws of one never meet those of the other


@dataclass(frozen=True)
class MaskingTokens:
    """What masking has to know of a tokenizer: the mask's id, the vocabulary's size, the ids never masked."""

    mask_id: int
    vocab_size: int
    special_ids: tuple[int, ...]

    @classmethod
    def from_tokenizer(cls, tokenizer: TextTokenizer) -> MaskingTokens:
        """Take them from a tokenizer; one without a mask token is a UserError."""
        if tokenizer.mask_token_id is None:
            raise UserError("the tokenizer has no mask token; type a --model of the BERT or RoBERTa kind")
        return cls(tokenizer.mask_token_id, len(tokenizer), tuple(sorted(tokenizer.all_special_ids)))


def mask_tokens(
    blocks: Tensor,
    positions: Sequence[int],
    *,
    seed: int,
    step: int,
    special: MaskingTokens,
    probability: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """Mask token blocks as BERT does (Devlin et al. 2019, Section 3.1).

    Each token that is not special is chosen with `probability`, independently; of the chosen, 80 % become the
    mask token, 10 % a token drawn from the whole vocabulary, 10 % stay. As in the TAMT authors' code nothing
    makes sure that a sequence has a chosen token at all.

    Args:
        blocks: int64 [sequences, tokens].
        positions: for each sequence its position in the step's global batch. The draw for a sequence depends
            on seed, step and this position alone: not on the rank, the batch size or the other sequences.
        seed: of the masking, not negative.
        step: the optimizer step, from 1; 0 belongs to dev blocks, whose positions are their block numbers.
        special: what never is masked, and what masks.
        probability: of a token to be chosen.

    Returns:
        Input ids and labels, both int64 [sequences, tokens]; labels are -100 where nothing was chosen.
    """
    num_sequences, num_tokens = blocks.shape
    if len(positions) != num_sequences:
        raise ValueError(f"{len(positions)} positions for {num_sequences} sequences")
    draws = np.empty((num_sequences, 2, num_tokens), dtype=np.uint64)
    for row, position in zip(draws, positions, strict=True):
        row[:] = _philox(seed, _MASKING, step, position).random_raw(2 * num_tokens).reshape(2, num_tokens)
    chance = draws[:, 0] * 2.0**-64
    action = (draws[:, 1] >> np.uint64(32)) * 2.0**-32
    other = (draws[:, 1] & np.uint64(2**32 - 1)) * np.uint64(special.vocab_size) >> np.uint64(32)

    original = blocks.numpy()
    chosen = (chance < probability) & ~np.isin(original, special.special_ids)
    replaced = np.where(action < 0.8, special.mask_id, np.where(action < 0.9, other.astype(np.int64), original))
    inputs = np.where(chosen, replaced, original)
    labels = np.where(chosen, original, IGNORED)
    return torch.from_numpy(inputs), torch.from_numpy(labels)


def _philox(seed: int, purpose: int, major: int, minor: int) -> np.random.Philox:
    """A generator at the start of the stream named by the four numbers.

    Philox (Salmon et al. 2011) is counter-based: any stream is reached at once. The counter's two low words
    count within the stream. Only raw bits are taken, for they are the same in every version of numpy.
    """
    key = np.array([seed, purpose], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, minor, major], dtype=np.uint64))


def _batch(
    blocks: np.ndarray,
    rows: np.ndarray,
    positions: Sequence[int],
    tokens: MaskingTokens,
    seed: int,
    step: int,
) -> dict[str, Tensor]:
    original = torch.from_numpy(blocks[rows].astype(np.int64))
    inputs, labels = mask_tokens(original, positions, seed=seed, step=step, special=tokens)
    return {"input_ids": inputs, "labels": labels, "original_ids": original}


class EpochOrders:
    """The order of the rows in each epoch: `orders(epoch)` is a permutation, int64 [rows], drawn from (seed, epoch)."""

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows, self.seed = num_rows, seed
        self._latest: dict[int, np.ndarray] = {}

    def __call__(self, epoch: int) -> np.ndarray:
        """The permutation of one epoch; the last two are kept, for a batch may reach into the next epoch."""
        if epoch not in self._latest:
            keys = _philox(self.seed, _ORDER, epoch, 0).random_raw(self.num_rows)
            before = dict(list(self._latest.items())[-1:])
            self._latest = {**before, epoch: np.argsort(keys, kind="stable")}
        return self._latest[epoch]


def rank_share(batch_size: int, world_size: int, micro_batch_size: int) -> int:
    """Rows of a global batch that one rank takes; micro-batches of 0 are the rank's rows at once.

    Raises:
        UserError: the batch cannot be cut evenly into ranks and micro-batches.
    """
    if batch_size < 1 or batch_size % (world_size * max(micro_batch_size, 1)):
        raise UserError(
            f"--batch_size {batch_size} is not ranks x micro-batch x accumulation, {world_size} x "
            f"{max(micro_batch_size, 1)} x n; type a multiple of {world_size * max(micro_batch_size, 1)}"
        )
    return batch_size // world_size


class TrainBatches:
    """The training batches of one rank: `batches(step)` for steps from 1, in any order.

    Each epoch is a permutation of all blocks drawn from (seed, epoch); the epochs follow one another without
    a gap and are cut into global batches. A rank takes the contiguous positions [rank * b, (rank + 1) * b) of
    the global batch, in contiguous micro-batches, so that 2 ranks x b, 1 rank x 2b and 2 micro-batches of b
    are the same sequences with the same masks.

    Args:
        blocks: integers [blocks, tokens], possibly memory-mapped.
        tokens: what masking has to know of the tokenizer.
        batch_size: sequences per optimizer step over all ranks.
        seed: of the order and the masking.
        rank, world_size: which share to take.
        micro_batch_size: sequences per forward on this rank; 0: all of the rank's at once.

    Raises:
        UserError: the batch cannot be cut evenly into ranks and micro-batches, or there are no blocks.
    """

    def __init__(
        self,
        blocks: np.ndarray,
        tokens: MaskingTokens,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int = 0,
    ) -> None:
        if len(blocks) == 0:
            raise UserError("there are no training blocks; give more text by --data")
        share = rank_share(batch_size, world_size, micro_batch_size)
        self.blocks, self.tokens, self.batch_size, self.seed = blocks, tokens, batch_size, seed
        self.micro_batch_size = micro_batch_size or share
        self.positions = range(rank * share, (rank + 1) * share)
        self._orders = EpochOrders(len(blocks), seed)

    def __call__(self, step: int) -> list[dict[str, Tensor]]:
        """This rank's micro-batches at `step`: input_ids, labels, original_ids, int64 [sequences, tokens]."""
        if step < 1:
            raise ValueError(f"steps count from 1, not {step}")
        epochs, offsets = np.divmod((step - 1) * self.batch_size + np.array(self.positions), len(self.blocks))
        rows = np.array([self._orders(int(epoch))[at] for epoch, at in zip(epochs, offsets, strict=True)])
        batches = []
        for start in range(0, len(rows), self.micro_batch_size):
            part = slice(start, start + self.micro_batch_size)
            batches.append(_batch(self.blocks, rows[part], self.positions[part], self.tokens, self.seed, step))
        return batches


class DevBatches:
    """The dev batches of one rank: each block is masked by (eval_seed, block number) alone, ever the same.

    Rank r takes the blocks r, r + world_size, r + 2 world_size and so on of the first `num_blocks` (0: all).
    Ranks may get different numbers of batches, even none, and the last batch may be smaller: sum losses and
    token counts over ranks, do not average averages.
    """

    def __init__(
        self,
        blocks: np.ndarray,
        tokens: MaskingTokens,
        *,
        eval_seed: int,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int,
        num_blocks: int = 0,
    ) -> None:
        self.blocks, self.tokens, self.eval_seed, self.batch_size = blocks, tokens, eval_seed, batch_size
        self.rows = range(len(blocks))[: num_blocks or None][rank::world_size]

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.rows), self.batch_size):
            rows = self.rows[start : start + self.batch_size]
            yield _batch(self.blocks, np.array(rows), rows, self.tokens, self.eval_seed, 0)
