"""Put masks on a model, read them back, restore the plain model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from finemask_ds.errors import UserError
from finemask_ds.models.families import family_of
from finemask_ds.models.masked import Masked, MaskedEmbedding, MaskedLinear, TiedDecoder

_MASKED: dict[type[nn.Module], type[MaskedLinear] | type[MaskedEmbedding]] = {
    nn.Linear: MaskedLinear,
    nn.Embedding: MaskedEmbedding,
}


def attach(model: nn.Module, mask: Mapping[str, Tensor], scores: Mapping[str, Tensor] | None = None) -> None:
    """Replace, in place, every module whose weight ``mask`` names by its masked form.

    Args:
        model: a plain model; its parameters stay the same objects under the same names.
        mask: parameter name -> bool tensor of that weight's shape.
        scores: parameter name -> fp32 scores to learn; None where the mask is fixed.

    Raises:
        UserError: where a name or a shape of the mask is not the model's.
    """
    for name, keep in mask.items():
        path, _, leaf = name.rpartition(".")
        module = find_module(model, path)
        if module is None or leaf != "weight" or type(module) not in _MASKED or module.weight.shape != keep.shape:
            raise UserError(
                f"the mask does not fit this model at {name} {tuple(keep.shape)}; is it a mask for another model?"
            )
        device = module.weight.device
        masked = _MASKED[type(module)](module, keep, None if scores is None else scores[name])  # type: ignore[arg-type]
        masked.train(module.training)
        _replace(model, path, masked.to(device))  # type: ignore[arg-type]


def tie_decoder_to_masked_embedding(model: nn.Module) -> None:
    """Let the MLM decoder of an attached model read W * M of the embedding instead of the raw W.

    A decoder with a matrix of its own keeps it.
    """
    family = family_of(model.config.model_type)  # type: ignore[union-attr,arg-type]
    embedding, decoder = find_module(model, family.embedding), find_module(model, family.decoder)
    if isinstance(embedding, MaskedEmbedding) and isinstance(decoder, nn.Linear) and decoder.weight is embedding.weight:
        _replace(model, family.decoder, TiedDecoder(embedding, decoder.bias))


def untie_decoder(model: nn.Module) -> None:
    """Give the MLM decoder a frozen copy of its matrix as it is now, which training the embedding leaves alone."""
    decoder = find_module(model, family_of(model.config.model_type).decoder)  # type: ignore[union-attr,arg-type]
    assert isinstance(decoder, nn.Linear)
    decoder.weight = nn.Parameter(decoder.weight.detach().clone(), requires_grad=False)


def detach(model: nn.Module) -> None:
    """Restore the plain modules, in place: the same weight parameters, no masks, no scores."""
    for path, module in list(model.named_modules()):
        if isinstance(module, MaskedLinear):
            out_features, in_features = module.weight.shape
            with torch.device("meta"):
                linear = nn.Linear(in_features, out_features, bias=module.bias is not None)
            linear.weight, linear.bias = module.weight, module.bias
            _replace(model, path, linear)
        elif isinstance(module, MaskedEmbedding):
            with torch.device("meta"):
                embedding = nn.Embedding(module.weight.shape[0], module.weight.shape[1], padding_idx=module.padding_idx)
            embedding.weight = module.weight
            _replace(model, path, embedding)
        elif isinstance(module, TiedDecoder):
            table = module._embedding[0].weight
            with torch.device("meta"):
                linear = nn.Linear(table.shape[1], table.shape[0])
            linear.weight, linear.bias = table, module.bias
            _replace(model, path, linear)


def masked_modules(model: nn.Module) -> dict[str, Masked]:
    """Weight's parameter name -> masked module, in the order of ``named_modules``."""
    return {f"{path}.weight": module for path, module in model.named_modules() if isinstance(module, Masked)}


def read_mask(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> the bool mask now in force (the module's own tensor, not a copy)."""
    return {name: module.mask for name, module in masked_modules(model).items()}


def write_mask(model: nn.Module, mask: Mapping[str, Tensor]) -> None:
    """Put other bits on an attached model, in place."""
    for name, module in masked_modules(model).items():
        module.set_mask(mask[name])


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """While inside, the masks are off: the model is theta_0, the teacher of TAMT-KD, without a second copy of it."""
    modules = list(masked_modules(model).values())
    for module in modules:
        module.is_dense = True
    try:
        yield
    finally:
        for module in modules:
            module.is_dense = False


def find_module(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, None where the model has none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
