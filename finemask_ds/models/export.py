"""Write a subnetwork for others: M * theta_0 with exact zeros as a plain Hugging Face checkpoint, TAMT's, prune's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finemask_ds.masks.binarize import masked
from finemask_ds.masks.files import load_mask
from finemask_ds.masks.foreign import refuse_existing, write_prune, write_tamt
from finemask_ds.masks.mask import Mask
from finemask_ds.models.families import Family, family_of
from finemask_ds.models.load import Pretrained, add_pooler, check_origin, load_pretrained, save_pretrained
from finemask_ds.models.patch import find_module, untie_decoder


def apply_mask(model: nn.Module, mask: Mask, *, hold: bool = False) -> None:
    """Multiply the weights of a transformers model by a mask, in place.

    Args:
        model: of a known family, with any head or none; an MLM decoder keeps the unmasked embedding, frozen, as losses
            are measured.
        mask: of its backbone; a pooler that the model lacks is left out.
        hold: whether the pruned weights' gradients are to be zero from now on. Whatever trains the model then, with an
            optimizer that has not begun, leaves those weights at zero. A copy of the model does not hold: it loses
            the hooks, and wants a call of its own.

    Raises:
        UserError: where the mask is for another model, or its family is unknown.
    """
    family = family_of(model.config.model_type)  # type: ignore[union-attr,arg-type]
    parameters = dict(model.named_parameters(remove_duplicate=False))  # A tied matrix under either name.
    own = {name: name if name in parameters else name.removeprefix(f"{family.backbone}.") for name in mask}
    lacked = {name for name in mask if own[name] not in parameters and _is_pooler(family, name)}
    shapes = {name: tuple(parameters[place].shape) for name, place in own.items() if place in parameters}
    mask.only(name for name in mask if name not in lacked).check(shapes)
    decoder: Any = find_module(model, family.decoder)
    if own.get(f"{family.embedding}.weight") in parameters and decoder is not None:
        untie_decoder(model)
        # Untied, the bias is also looked for under the decoder's own name.
        decoder.bias = nn.Parameter(decoder.bias.detach().clone())
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    with torch.no_grad():
        for name in shapes:
            weight = parameters[own[name]]
            weight.copy_(masked(weight, mask[name].to(weight.device)))
            if hold:
                _hold(weight, mask[name])


def _hold(weight: Tensor, keep: Tensor) -> None:
    """M * dL/dW from now on."""

    def hold(gradient: Tensor) -> Tensor:
        nonlocal keep
        keep = keep.to(gradient.device)  # The model may have been moved since.
        return masked(gradient, keep)

    weight.register_hook(hold)


def _is_pooler(family: Family, name: str) -> bool:
    place = family.place(name)
    return place is not None and place.role == "pooler"


def export_checkpoint(mask_file: Path, model: str, out: Path) -> Path:
    """Write the subnetwork of ``mask_file`` in ``model`` to the new folder ``out`` and return it.

    Raises:
        UserError: where ``out`` exists, or the mask is broken or for another model.
    """
    refuse_existing(out)
    mask, pretrained = _opened(mask_file, model)
    add_pooler(pretrained.model, model)  # A downstream task may start from it.
    apply_mask(pretrained.model, mask)
    save_pretrained(pretrained, out)
    return out


def export_tamt(mask_file: Path, model: str, out: Path) -> Path:
    """Write the mask of ``mask_file`` as TAMT's ``mask.pt`` to the new file ``out`` and return it.

    Their code reads a mask of every matrix that it can prune: those that this one leaves alone keep everything there.

    Raises:
        UserError: where ``out`` exists, or the mask is broken or for another model.
    """
    refuse_existing(out)
    mask, pretrained = _opened(mask_file, model)
    add_pooler(pretrained.model, model)
    shapes = pretrained.prunable_shapes
    mask.check({name: shapes[name] for name in mask if name in shapes})
    write_tamt(out, Mask({**Mask.full_like(shapes), **mask}))
    return out


def export_prune(mask_file: Path, model: str, out: Path) -> Path:
    """Write theta_0 and the mask as a state dict of torch.nn.utils.prune to the new file ``out`` and return it.

    It loads into ``AutoModelForMaskedLM`` after ``prune.identity`` of every module with a mask (and the pooler
    where the mask has one); the MLM decoder keeps the unmasked embedding, as in that model.

    Raises:
        UserError: where ``out`` exists, or the mask is broken or for another model.
    """
    refuse_existing(out)
    mask, pretrained = _opened(mask_file, model)
    if any(_is_pooler(pretrained.family, name) for name in mask):
        add_pooler(pretrained.model, model)
    write_prune(out, mask, pretrained.model.state_dict())
    return out


def _opened(mask_file: Path, model: str) -> tuple[Mask, Pretrained]:
    """A mask and the model it was found in, as that model's checkpoint is."""
    mask, pretrained = load_mask(mask_file), load_pretrained(model, dropout=None)
    check_origin(mask, str(mask_file), model, pretrained.digest())
    return mask, pretrained


FORMATS = {"checkpoint": export_checkpoint, "tamt": export_tamt, "prune": export_prune}
"""``--format`` -> what writes it."""
