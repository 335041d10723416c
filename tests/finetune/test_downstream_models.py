"""Backbone and head: the losses are Hugging Face's own, the mask check is by weights, names and shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from finemask_ds.errors import UserError
from finemask_ds.masks.mask import Mask
from finemask_ds.models.downstream import Downstream, TaskModel, counts, load_downstream
from finemask_ds.models.load import load_pretrained

KINDS = {"classification": ("a", "b", "c"), "regression": (), "span": ()}


def loaded(folder: Path, kind: str, seed: int = 1) -> Downstream:
    return load_downstream(str(folder), kind=kind, labels=KINDS[kind], dropout=0.0, seed=seed)


def batch_of(kind: str, rows: int = 5, tokens: int = 9) -> dict[str, Tensor]:
    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(5, 20, (rows, tokens)), "attention_mask": torch.ones(rows, tokens).long()}
    if kind == "span":
        return batch | {"start_positions": torch.arange(rows), "end_positions": torch.arange(rows) + 2}
    return batch | {"labels": torch.rand(rows) * 5 if kind == "regression" else torch.arange(rows) % 3}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["toy_bert", "toy_roberta"])
def test_the_loss_is_hugging_faces_own(kind: str, family: str, request: pytest.FixtureRequest) -> None:
    downstream = loaded(request.getfixturevalue(family), kind)
    batch = batch_of(kind)
    wanted = downstream.model(**batch).loss
    model = TaskModel(downstream.model, kind).train()
    weighted = batch | {"weight": torch.ones(5)}
    torch.testing.assert_close(model(weighted)["loss"] / counts(weighted)["loss"], wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_weight_zero_counts_nothing(kind: str, toy_bert: Path) -> None:
    model = TaskModel(loaded(toy_bert, kind).model, kind).train()
    batch = batch_of(kind)
    weighted = batch | {"weight": torch.tensor([1.0, 1, 1, 1, 0])}
    first = {name: tensor[:4] for name, tensor in batch.items()} | {"weight": torch.ones(4)}
    assert counts(weighted) == counts(first) == {"loss": 4}
    torch.testing.assert_close(model(weighted)["loss"], model(first)["loss"])


def test_the_seed_draws_the_head_and_leaves_the_backbone(toy_bert: Path) -> None:
    one, again, other = (dict(loaded(toy_bert, "classification", seed).model.named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    differing = {name for name in one if not torch.equal(one[name], other[name])}
    assert differing == {"classifier.weight"}


def test_every_model_of_a_checkpoint_tells_the_same_backbone(toy_bert: Path) -> None:
    expected = load_pretrained(str(toy_bert)).digest()
    assert load_pretrained(str(toy_bert), targets="authors").digest() == expected
    assert {loaded(toy_bert, kind, seed).sha256 for kind in KINDS for seed in (1, 2)} == {expected}


def test_a_pooler_is_no_part_of_a_span_model(toy_bert: Path) -> None:
    pretrained = load_pretrained(str(toy_bert), targets="authors")
    mask = Mask.random(pretrained.shapes, 0.5, seed=0).with_provenance({"model_sha256": pretrained.digest()})
    pooler = "bert.pooler.dense.weight"
    assert set(loaded(toy_bert, "classification").fitted(mask, "m")) == set(mask)
    assert set(loaded(toy_bert, "span").fitted(mask, "m")) == set(mask) - {pooler}


def test_a_mask_for_another_backbone_is_refused(toy_bert: Path, toy_roberta: Path) -> None:
    pretrained = load_pretrained(str(toy_bert))
    mask = Mask.random(pretrained.shapes, 0.5, seed=0)
    with pytest.raises(UserError, match=r"m is a mask for other .*; type --model as in the search"):
        loaded(toy_bert, "span").fitted(mask.with_provenance({"model": "other", "model_sha256": "0" * 64}), "m")
    with pytest.raises(UserError, match=r"m does not fit .*roberta"):
        loaded(toy_roberta, "span").fitted(mask, "m")


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_does_not_depend_on_the_rows_beside_it(kind: str, toy_bert: Path) -> None:
    """Nor on how wide they make the batch: micro-batches of any size are the same step."""
    model = TaskModel(loaded(toy_bert, kind).model.double(), kind).train()
    batch = batch_of(kind) | {"weight": torch.ones(5)}
    wide = {name: torch.nn.functional.pad(batch[name], (0, 7)) for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(batch | wide)["loss"], model(batch)["loss"])
