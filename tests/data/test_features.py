"""Features against the tokenizers' own, and batches that depend on the step alone, never on the ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finemask_ds.data.collate import EpochOrders
from finemask_ds.data.features import Features, TaskBatches, class_features, task_dev_batches
from finemask_ds.data.tasks import TASKS, Answer, Examples
from finemask_ds.data.windows import span_features
from finemask_ds.errors import UserError
from tests.data.tokenizers_for_tests import byte_bpe
from tests.toys import sentences

FIRST = [*sentences(9), "", "a [SEP] cat [MASK]", "東京 Zoë"]
SECOND = [*sentences(8, seed=1), "", "", " ".join(sentences(4, seed=2)), "red"]


@pytest.fixture(scope="module")
def tokenizers(toy_bert: Path, toy_roberta: Path) -> dict[str, PreTrainedTokenizerFast]:
    folders = {"bert": toy_bert, "roberta": toy_roberta}
    return {kind: AutoTokenizer.from_pretrained(folder) for kind, folder in folders.items()}


def examples(second: bool, targets: list[int] | list[float] | None) -> Examples:
    ids = [str(number) for number in range(len(FIRST))]
    return Examples(ids, FIRST, SECOND if second else None, targets, sha256="")


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("seq_len", [6, 12, 128])
def test_rows_are_what_the_tokenizer_itself_gives(tokenizers, kind, second, seq_len):
    tokenizer = tokenizers[kind]
    task = TASKS["mrpc" if second else "cola"]
    features = class_features(task, examples(second, [0, 1] * 6), tokenizer, seq_len)
    batch = features.batch(range(len(features)))
    # split_special_tokens: what looks like [SEP] in a sentence is text.
    own = tokenizer(
        FIRST, SECOND if second else None, max_length=seq_len, truncation="longest_first", padding="longest",
        split_special_tokens=True, return_tensors="pt",
    )  # fmt: skip
    tokenizer.backend_tokenizer.encode_special_tokens = False
    assert features.lengths.max() <= seq_len
    assert {"input_ids", "attention_mask"} <= set(own) == set(batch) - {"labels", "weight"}
    assert ("token_type_ids" in batch) == (kind == "bert")
    for key, value in own.items():
        assert batch[key].dtype == torch.int64
        assert torch.equal(batch[key], value), key
    assert batch["labels"].tolist() == [0, 1] * 6
    assert batch["labels"].dtype == torch.int64
    assert torch.equal(batch["weight"], torch.ones(12))


def test_the_tokenizer_given_is_left_as_it_was(tokenizers):
    tokenizer = tokenizers["bert"]
    before = tokenizer.backend_tokenizer.to_str(), tokenizer.backend_tokenizer.encode_special_tokens
    class_features(TASKS["cola"], examples(False, None), tokenizer, 12)
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer.backend_tokenizer.encode_special_tokens) == before


def test_nothing_but_real_tokens_is_kept(tokenizers):
    features = class_features(TASKS["stsb"], examples(True, None), tokenizers["bert"], 128)
    own = tokenizers["bert"](FIRST, SECOND, split_special_tokens=True)
    assert features.input_ids.dtype == np.int32
    assert features.token_type_ids.dtype == np.int8
    assert features.input_ids.tolist() == [token for ids in own["input_ids"] for token in ids]
    assert not features.targets
    assert "labels" not in features.batch([0])


def test_scores_are_floats_and_no_rows_are_no_features(tokenizers):
    scores = [number / 4 for number in range(12)]
    features = class_features(TASKS["stsb"], examples(True, scores), tokenizers["roberta"], 32)
    assert features.batch([3, 1])["labels"].tolist() == [0.75, 0.25]
    assert features.batch([3, 1])["labels"].dtype == torch.float32
    nothing = class_features(TASKS["cola"], Examples([], [], None, [], sha256=""), tokenizers["bert"], 32)
    assert len(nothing) == len(nothing.input_ids) == len(task_dev_batches(nothing, 4)) == 0
    with pytest.raises(UserError, match="no training rows"):
        TaskBatches(nothing, batch_size=4, seed=0)


def test_what_cannot_be_features_is_a_sentence(tokenizers):
    with pytest.raises(UserError, match=r"--seq_len 4 leaves no room for the text of MRPC .*; type 5 or more"):
        class_features(TASKS["mrpc"], examples(True, None), tokenizers["bert"], 4)
    with pytest.raises(UserError, match=r"puts no \[CLS\] before a text; type a --model of the BERT or RoBERTa kind"):
        class_features(TASKS["cola"], examples(False, None), byte_bpe(), 32)
    with pytest.raises(ValueError, match="squad is a span task"):
        class_features(TASKS["squad"], examples(True, None), tokenizers["bert"], 32)


def test_a_vocabulary_without_padding_is_filled_with_what_is_hidden(tokenizers):
    bert = tokenizers["bert"]
    without = SimpleNamespace(
        cls_token_id=bert.cls_token_id, pad_token_id=None, backend_tokenizer=bert.backend_tokenizer,
        model_input_names=["input_ids"],
    )  # fmt: skip
    batch = class_features(TASKS["cola"], examples(False, None), without, 32).batch(range(12))
    assert set(batch) == {"input_ids", "attention_mask", "weight"}
    assert not batch["input_ids"][batch["attention_mask"] == 0].any()


def numbered(num_rows: int) -> Features:
    """Row r has a token r + 1 and then up to six others."""
    lengths = np.random.default_rng(num_rows).integers(1, 8, num_rows)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.full(bounds[-1], 10_000, dtype=np.int32)
    ids[bounds[:-1]] = np.arange(num_rows) + 1
    return Features(ids, None, bounds, {"labels": np.arange(num_rows)}, pad_id=0)


def counted_rows(batches: list[dict[str, Tensor]]) -> list[int]:
    """The rows of micro-batches in order, without fillings; what they hold is checked on the way."""
    for batch in batches:
        assert torch.equal(batch["labels"], batch["input_ids"][:, 0] - 1)
        assert torch.equal(batch["attention_mask"], (batch["input_ids"] != 0).long())
        assert batch["attention_mask"].any(dim=0).all()  # padded no further than the longest
        assert batch["weight"].dtype == torch.float32
    return [row for batch in batches for row in batch["labels"][batch["weight"] == 1].tolist()]


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_each_step_has_the_same_rows_for_every_number_of_ranks_and_micro_batches(data):
    num_rows = data.draw(st.integers(1, 40), "rows")
    world_size = data.draw(st.sampled_from([1, 2, 3, 4]), "ranks")
    micro = data.draw(st.sampled_from([1, 2, 3]), "micro-batch")
    batch_size = world_size * micro * data.draw(st.integers(1, 4), "micro-batches")
    features, seed = numbered(num_rows), data.draw(st.integers(0, 3), "seed")
    alone = TaskBatches(features, batch_size=batch_size, seed=seed)
    ranks = [
        TaskBatches(
            features, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, micro_batch_size=micro
        )
        for rank in range(world_size)
    ]
    assert alone.steps_per_epoch == -(-num_rows // batch_size)
    for epoch in range(2):
        seen = []
        for index in range(alone.steps_per_epoch):
            step = epoch * alone.steps_per_epoch + index + 1
            (whole,) = alone(step)
            shares = [batches(step) for batches in ranks]
            assert len({len(share) for share in shares}) == 1
            assert all(len(batch["labels"]) <= micro for share in shares for batch in share)
            for batch in (batch for share in shares for batch in share):
                weights = batch["weight"].tolist()
                assert weights == [1.0] * len(weights) or weights == [0.0]
            rows = [row for share in shares for row in counted_rows(share)]
            order = EpochOrders(num_rows, seed)(epoch)[index * batch_size : (index + 1) * batch_size]
            assert sorted(rows) == sorted(counted_rows([whole])) == sorted(order.tolist())
            for share in shares:
                real = [batch["attention_mask"][batch["weight"] == 1] for batch in share]
                lengths = [length for mask in real for length in mask.sum(1).tolist()]
                assert lengths == sorted(lengths), "rows of one length together pad least"
            seen += rows
        assert sorted(seen) == list(range(num_rows))


def test_steps_can_be_asked_for_in_any_order_and_epochs_differ():
    batches = TaskBatches(numbered(50), batch_size=8, seed=1)
    assert batches.steps_per_epoch == 7
    forward = [counted_rows(batches(step)) for step in range(1, 22)]
    backward = [counted_rows(batches(step)) for step in range(21, 0, -1)]
    assert forward == backward[::-1]
    assert [len(rows) for rows in forward[:8]] == [8] * 6 + [2, 8]
    assert len({tuple(forward[epoch]) for epoch in (0, 7, 14)}) == 3
    assert counted_rows(TaskBatches(numbered(50), batch_size=8, seed=2)(1)) != forward[0]
    with pytest.raises(ValueError, match="steps count from 1"):
        batches(0)


def test_the_order_is_pinned():
    """The same on every machine and every version of numpy; a change here changes every result."""
    assert EpochOrders(10, 1)(0).tolist() == [0, 6, 5, 3, 4, 9, 7, 8, 2, 1]
    assert counted_rows(TaskBatches(numbered(10), batch_size=5, seed=1)(1)) == sorted(
        [0, 6, 5, 3, 4], key=lambda row: numbered(10).lengths[row]
    )


def test_a_rank_without_rows_gets_a_filling_that_counts_nothing():
    shares = [TaskBatches(numbered(9), batch_size=8, seed=0, rank=rank, world_size=4, micro_batch_size=1)(2)
              for rank in range(4)]  # fmt: skip
    weights = [[batch["weight"].tolist() for batch in share] for share in shares]
    assert weights == [[[1.0]], [[0.0]], [[0.0]], [[0.0]]]
    for share in shares[1:]:
        assert torch.equal(share[0]["input_ids"], shares[0][0]["input_ids"])


def test_a_batch_that_cannot_be_shared_out_is_a_sentence():
    with pytest.raises(UserError, match=r"--batch_size 10 is not .*, 4 x 2 x n; type a multiple of 8"):
        TaskBatches(numbered(9), batch_size=10, seed=0, world_size=4, micro_batch_size=2)


@pytest.mark.parametrize("batch_size", [1, 4, 13, 50])
def test_dev_batches_hold_every_row_once_by_length_and_say_which(batch_size):
    features = numbered(13)
    batches = task_dev_batches(features, batch_size)
    assert len(batches) == -(-13 // batch_size)
    rows = torch.cat([batch["row"] for batch in batches])
    assert rows.dtype == torch.int64
    assert counted_rows(batches) == rows.tolist()
    assert rows.tolist() == sorted(range(13), key=lambda row: features.lengths[row])


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_windows_make_batches_with_positions(tokenizers, kind):
    contexts = [" ".join(sentences(number)) for number in (1, 6)]
    answers = [(Answer(context.split()[-2], context.rindex(context.split()[-2])),) for context in contexts]
    squad = Examples(["a", "b"], ["the cat ?", "dog ?"], contexts, answers, sha256="")
    features = span_features(TASKS["squad"], squad, tokenizers[kind], 64, 16, training=True)
    assert len(features) > 2
    batches = TaskBatches(features, batch_size=2, seed=0)
    seen = []
    for step in range(1, batches.steps_per_epoch + 1):
        (batch,) = batches(step)
        for key in ("start_positions", "end_positions"):
            assert batch[key].dtype == torch.int64
            assert (batch[key] < batch["attention_mask"].sum(dim=1)).all()
        seen += list(zip(batch["start_positions"].tolist(), batch["end_positions"].tolist(), strict=True))
    expected = zip(features.targets["start_positions"], features.targets["end_positions"], strict=True)
    assert sorted(seen) == sorted((int(start), int(end)) for start, end in expected)
    assert any(pair != (0, 0) for pair in seen)
    dev = span_features(TASKS["squad"], squad, tokenizers[kind], 64, 16, training=False)
    keys = {"input_ids", "attention_mask", "weight", "row"} | ({"token_type_ids"} if kind == "bert" else set())
    assert all(set(batch) == keys for batch in task_dev_batches(dev, 2))
