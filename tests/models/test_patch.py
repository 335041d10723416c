"""A patched model is the plain one where nothing is pruned, and W * M everywhere where something is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finemask_ds.errors import UserError
from finemask_ds.masks.mask import Mask
from finemask_ds.models.load import Pretrained, load_pretrained
from finemask_ds.models.patch import (
    attach,
    dense,
    detach,
    masked_modules,
    read_mask,
    tie_decoder_to_masked_embedding,
    untie_decoder,
    write_mask,
)

TOKENS = torch.tensor([[2, 6, 9, 12, 4, 15, 3], [2, 30, 8, 7, 21, 5, 3]])


@pytest.fixture(params=["toy_bert", "toy_roberta"])
def pretrained(request: pytest.FixtureRequest) -> Pretrained:
    return load_pretrained(str(request.getfixturevalue(request.param)), dropout=0.0)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def half(pretrained: Pretrained) -> Mask:
    return Mask.random(pretrained.shapes, 0.5, seed=3)


def test_full_masks_give_the_plain_logits(pretrained: Pretrained) -> None:
    plain = logits(pretrained.model)
    attach(pretrained.model, Mask.full_like(pretrained.shapes))
    assert torch.equal(logits(pretrained.model), plain)


def test_a_masked_model_is_the_model_with_zeros_and_an_unmasked_decoder(pretrained: Pretrained) -> None:
    plain, mask, names = (
        logits(pretrained.model),
        half(pretrained),
        [n for n, _ in pretrained.model.named_parameters()],
    )
    attach(pretrained.model, mask)
    masked = logits(pretrained.model)
    with dense(pretrained.model):
        assert torch.equal(logits(pretrained.model), plain)
    assert torch.equal(logits(pretrained.model), masked)
    detach(pretrained.model)
    assert torch.equal(logits(pretrained.model), plain)
    assert [n for n, _ in pretrained.model.named_parameters()] == names
    untie_decoder(pretrained.model)
    with torch.no_grad():
        for name, weight in pretrained.targets.items():
            weight.mul_(mask[name])
    assert torch.equal(logits(pretrained.model), masked)


def test_a_decoder_tied_to_the_masked_embedding_is_the_tied_model_with_zeros(pretrained: Pretrained) -> None:
    mask = half(pretrained)
    attach(pretrained.model, mask)
    tie_decoder_to_masked_embedding(pretrained.model)
    masked = logits(pretrained.model)
    detach(pretrained.model)
    with torch.no_grad():
        for name, weight in pretrained.targets.items():
            weight.mul_(mask[name])
    torch.testing.assert_close(logits(pretrained.model), masked, rtol=0, atol=1e-6)
    decoder = pretrained.model.get_submodule(pretrained.family.decoder)
    assert decoder.weight is pretrained.model.get_submodule(pretrained.family.embedding).weight


def test_gradients_are_those_written_by_hand(pretrained: Pretrained) -> None:
    """G * W to the scores of a frozen weight, G * M to a trained weight, G that of the masked weight."""
    mask, name = (
        half(pretrained),
        next(n for n in pretrained.places if n.endswith("intermediate.dense.weight")),
    )
    attach(pretrained.model, mask, {n: torch.zeros(shape) for n, shape in pretrained.shapes.items()})
    module = masked_modules(pretrained.model)[name]
    x = torch.randn(5, module.weight.shape[1])
    (module(x) ** 2).sum().backward()
    product = (module.weight.detach() * mask[name]).requires_grad_()
    (nn.functional.linear(x, product, module.bias) ** 2).sum().backward()
    assert product.grad is not None
    assert module.scores is not None
    assert torch.equal(module.scores.grad, product.grad * module.weight.detach())  # type: ignore[arg-type]
    assert torch.equal(module.weight.grad, product.grad * mask[name])  # type: ignore[arg-type]


def test_masks_are_read_back_as_written(pretrained: Pretrained) -> None:
    attach(pretrained.model, Mask.full_like(pretrained.shapes))
    write_mask(pretrained.model, half(pretrained))
    assert Mask(read_mask(pretrained.model)) == half(pretrained)


def test_a_product_that_is_kept_follows_the_mask(pretrained: Pretrained) -> None:
    """Bit by bit what a model that keeps none computes, through several masks, with and without gradients."""
    attach(pretrained.model, half(pretrained), {n: torch.zeros(shape) for n, shape in pretrained.shapes.items()})
    modules = masked_modules(pretrained.model)
    for seed in (3, 4, 4, 5):
        write_mask(pretrained.model, Mask.random(pretrained.shapes, 0.5, seed=seed))
        found = []
        for keeps in (False, True):
            for module in modules.values():
                module.keeps_product = keeps
            found.append((logits(pretrained.model), _gradients(pretrained.model)))
            for module in modules.values():
                kept = module._product if keeps else None
                assert kept is None or torch.equal(kept, module.weight * module.mask)
        assert torch.equal(found[0][0], found[1][0])
        assert all(torch.equal(plain, kept) for plain, kept in zip(found[0][1], found[1][1], strict=True))
    assert any(module._product is not None for module in modules.values())


def _gradients(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    model(input_ids=TOKENS).logits.square().sum().backward()
    return [module.scores.grad.clone() for module in masked_modules(model).values()]  # type: ignore[union-attr]


def test_a_mask_for_another_model_is_refused(pretrained: Pretrained) -> None:
    mask = dict(half(pretrained))
    name = next(iter(mask))
    with pytest.raises(UserError, match="another model"):
        attach(pretrained.model, {name: mask[name][:, :-1]})
    with pytest.raises(UserError, match="another model"):
        attach(pretrained.model, {"bert.nowhere.weight": mask[name]})
