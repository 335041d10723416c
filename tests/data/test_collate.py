"""Masking and batches: BERT's shares, and independence of ranks, batch sizes and micro-batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from finemask_ds.data.collate import IGNORED, DevBatches, MaskingTokens, TrainBatches, mask_tokens
from finemask_ds.errors import UserError
from tests.data.tokenizers_for_tests import byte_bpe, wordpiece

TOKENS = MaskingTokens(mask_id=4, vocab_size=1000, special_ids=(0, 1, 2, 3, 4))


def some_blocks(number: int, length: int = 16, seed: int = 0) -> np.ndarray:
    blocks = np.random.default_rng(seed).integers(5, 1000, (number, length)).astype(np.uint16)
    blocks[:, 0], blocks[:, -1] = 2, 3
    return blocks


def binomial_bound(trials: int, share: float) -> float:
    """Five standard deviations of a share: exceeded once in two million."""
    return 5 * math.sqrt(share * (1 - share) / trials)


@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_shares_are_those_of_bert(probability):
    blocks = torch.from_numpy(some_blocks(2000, 128).astype(np.int64))
    inputs, labels = mask_tokens(blocks, range(2000), seed=3, step=1, special=TOKENS, probability=probability)
    chosen = labels != IGNORED
    candidates = 2000 * 126
    assert abs(chosen.sum().item() / candidates - probability) < binomial_bound(candidates, probability)
    assert torch.equal(labels[chosen], blocks[chosen])
    assert torch.equal(inputs[~chosen], blocks[~chosen])
    number = int(chosen.sum())
    masked = (inputs == TOKENS.mask_id) & chosen
    kept = (inputs == blocks) & chosen
    replaced = chosen & ~masked & ~kept
    for part, share in ((masked, 0.8 + 0.1 / 1000), (kept, 0.1 + 0.1 / 1000), (replaced, 0.1 * 998 / 1000)):
        assert abs(part.sum().item() / number - share) < binomial_bound(number, share)
    drawn = torch.bincount(inputs[replaced], minlength=1000).double()
    drawn = torch.cat([drawn[:4], drawn[5:]])  # the mask's own id counts as masked
    chi_squared = ((drawn - drawn.mean()) ** 2 / drawn.mean()).sum().item()
    assert abs(chi_squared - 998) < 5 * math.sqrt(2 * 998)  # the whole vocabulary, evenly


def test_choices_at_neighbouring_positions_steps_and_seeds_are_unrelated():
    blocks = torch.full((1, 4096), 7)
    draws = [
        (mask_tokens(blocks, [position], seed=seed, step=step, special=TOKENS)[1] != IGNORED).double().flatten()
        for seed, step, position in [(1, 1, 0), (1, 1, 1), (1, 2, 0), (2, 1, 0), (1, 0, 1)]
    ]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(5, dtype=torch.float64)
    assert correlation.abs().max() < 5 / math.sqrt(4096)


@pytest.mark.parametrize("make", [wordpiece, byte_bpe])
def test_special_tokens_are_never_chosen(make):
    tokenizer = make()
    tokens = MaskingTokens.from_tokenizer(tokenizer)
    assert tokens.mask_id == tokenizer.mask_token_id
    assert tokens.vocab_size == len(tokenizer)
    blocks = torch.tensor([tokens.special_ids * 40])
    inputs, labels = mask_tokens(blocks, [0], seed=0, step=1, special=tokens, probability=1.0)
    assert torch.equal(inputs, blocks)
    assert (labels == IGNORED).all()


def test_a_tokenizer_without_a_mask_token_is_refused():
    tokenizer = wordpiece()
    tokenizer.mask_token = None
    with pytest.raises(UserError, match="no mask token"):
        MaskingTokens.from_tokenizer(tokenizer)


def test_the_draw_of_a_sequence_depends_on_its_position_alone():
    blocks = torch.from_numpy(some_blocks(8).astype(np.int64))
    inputs, labels = mask_tokens(blocks, range(8), seed=5, step=9, special=TOKENS)
    for order in ([3], [6, 1], [7, 6, 5, 4, 3, 2, 1, 0]):
        again = mask_tokens(blocks[order], order, seed=5, step=9, special=TOKENS)
        assert torch.equal(again[0], inputs[order])
        assert torch.equal(again[1], labels[order])


def test_the_draws_are_pinned():
    """The same on every machine and every version of numpy; a change here changes every result."""
    _, labels = mask_tokens(torch.arange(5, 45)[None], [2], seed=1, step=3, special=TOKENS)
    assert labels[labels != IGNORED].tolist() == [6, 11, 38, 42]


def joined(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys() == {"input_ids", "labels", "original_ids"}
    for key in left:
        assert left[key].dtype == torch.int64
        assert torch.equal(left[key], right[key])


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 4), (1, 2), (2, 0), (2, 3), (4, 1), (12, 1)])
def test_ranks_and_micro_batches_see_what_one_rank_sees(world_size, micro_batch_size):
    blocks = some_blocks(31)
    whole = TrainBatches(blocks, TOKENS, batch_size=12, seed=7, rank=0, world_size=1)
    parts = [
        TrainBatches(blocks, TOKENS, batch_size=12, seed=7, rank=rank, world_size=world_size,
                     micro_batch_size=micro_batch_size)
        for rank in range(world_size)
    ]  # fmt: skip
    for step in (1, 2, 3, 6, 2):  # 31 blocks: the third batch reaches into the next epoch; and back again
        micro_batches = [batch for part in parts for batch in part(step)]
        expected = micro_batch_size or 12 // world_size
        assert {len(batch["input_ids"]) for batch in micro_batches} == {expected}
        assert_same(joined(micro_batches), whole(step)[0])


@pytest.mark.parametrize(("num_blocks", "batch_size"), [(12, 4), (10, 4), (3, 8), (1, 4)])
def test_every_epoch_takes_each_block_once_in_its_own_order(num_blocks, batch_size):
    blocks = np.arange(100, 100 + num_blocks)[:, None].astype(np.uint16)
    batches = TrainBatches(blocks, TOKENS, batch_size=batch_size, seed=0)
    seen = torch.cat([batches(step)[0]["original_ids"] for step in range(1, 5 * num_blocks + 1)]).flatten()
    epochs = seen[: len(seen) // num_blocks * num_blocks].reshape(-1, num_blocks)
    assert torch.equal(epochs.sort(dim=1).values, torch.from_numpy(blocks.astype(np.int64)).T.expand_as(epochs))
    if num_blocks >= 10:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == len(epochs)


def test_the_same_block_is_masked_anew_in_each_epoch():
    batches = TrainBatches(some_blocks(1, 128), TOKENS, batch_size=1, seed=0)
    assert not torch.equal(batches(1)[0]["labels"], batches(2)[0]["labels"])


def test_another_seed_is_another_order_and_another_masking():
    first, second = (TrainBatches(some_blocks(50), TOKENS, batch_size=8, seed=seed)(1)[0] for seed in (1, 2))
    assert not torch.equal(first["original_ids"], second["original_ids"])
    assert not torch.equal(first["labels"] == IGNORED, second["labels"] == IGNORED)


def test_a_batch_that_cannot_be_shared_out_is_a_sentence():
    with pytest.raises(UserError, match=r"--batch_size 10 is not .*, 4 x 2 x n; type a multiple of 8"):
        TrainBatches(some_blocks(9), TOKENS, batch_size=10, seed=0, world_size=4, micro_batch_size=2)
    with pytest.raises(UserError, match="no training blocks"):
        TrainBatches(some_blocks(0), TOKENS, batch_size=1, seed=0)


@pytest.mark.parametrize("num_blocks", [0, 5, 100])
def test_dev_batches_are_the_same_for_every_number_of_ranks(num_blocks):
    blocks = some_blocks(13)

    def sequences(world_size: int, batch_size: int) -> dict[int, dict[str, torch.Tensor]]:
        found = {}
        for rank in range(world_size):
            part = DevBatches(blocks, TOKENS, eval_seed=1, rank=rank, world_size=world_size,
                              batch_size=batch_size, num_blocks=num_blocks)  # fmt: skip
            batches = list(part)
            assert len(batches) == len(part)
            for row in range(len(joined(batches)["labels"]) if batches else 0):
                sequence = {key: value[row] for key, value in joined(batches).items()}
                found[hash(tuple(sequence["original_ids"].tolist()))] = sequence
        return found

    alone = sequences(1, 4)
    assert len(alone) == min(num_blocks or 13, 13)
    for world_size, batch_size in ((1, 1), (2, 4), (3, 2), (20, 4)):
        shared_out = sequences(world_size, batch_size)
        assert shared_out.keys() == alone.keys()
        for key in alone:
            assert_same(shared_out[key], alone[key])


def test_dev_masking_does_not_change_between_evaluations_nor_coincide_with_training():
    blocks = some_blocks(4, 128)
    dev = DevBatches(blocks, TOKENS, eval_seed=1, batch_size=4)
    assert_same(next(iter(dev)), next(iter(dev)))
    inputs, _ = mask_tokens(torch.from_numpy(blocks.astype(np.int64)), range(4), seed=1, step=1, special=TOKENS)
    assert not torch.equal(next(iter(dev))["input_ids"], inputs)
