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
from finemask_ds.models.load import Pretrained, add_pooler, load_pretrained, save_pretrained
from finemask_ds.models.patch import untie_decoder


def apply_mask(pretrained: Pretrained, mask: Mask) -> None:
    """Multiply theta_0 by the mask, in place; the MLM decoder keeps the unmasked embedding, as losses are measured.

    Raises:
        UserError: where the mask is for another model.
    """
    parameters = dict(pretrained.model.named_parameters())
    mask.check({name: tuple(parameters[name].shape) for name in mask if name in parameters})
    if f"{pretrained.family.embedding}.weight" in mask:
        untie_decoder(pretrained.model)
        decoder: Any = pretrained.model.get_submodule(pretrained.family.decoder)
        # Untied, the bias is also looked for under the decoder's own name.
        decoder.bias = nn.Parameter(decoder.bias.detach().clone())
        pretrained.model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    with torch.no_grad():
        for name, keep in mask.items():
            parameters[name].copy_(masked(parameters[name], keep))


def export_checkpoint(mask_file: Path, model: str, out: Path) -> Path:
    """Write the subnetwork of ``mask_file`` in ``model`` to the new folder ``out`` and return it.

    Raises:
        UserError: where ``out`` exists, or the mask is broken or for another model.
    """
    refuse_existing(out)
    mask = load_mask(mask_file)
    pretrained = load_pretrained(model)
    add_pooler(pretrained.model, model)  # A downstream task may start from it.
    apply_mask(pretrained, mask)
    save_pretrained(pretrained, out)
    return out


def export_tamt(mask_file: Path, model: str, out: Path) -> Path:
    """Write the mask of ``mask_file`` as TAMT's ``mask.pt`` to the new file ``out`` and return it.

    Raises:
        UserError: where ``out`` exists, or the mask is broken or for another model.
    """
    refuse_existing(out)
    mask, weights = _mask_and_weights(mask_file, model)
    mask.check({name: tuple(weights[name].shape) for name in mask if name in weights})
    write_tamt(out, mask)
    return out


def export_prune(mask_file: Path, model: str, out: Path) -> Path:
    """Write theta_0 and the mask as a state dict of torch.nn.utils.prune to the new file ``out`` and return it.

    It loads into ``AutoModelForMaskedLM`` after ``prune.identity`` of every module with a mask (and the pooler
    where the mask has one); the MLM decoder keeps the unmasked embedding, as in that model.

    Raises:
        UserError: where ``out`` exists, or the mask is broken or for another model.
    """
    refuse_existing(out)
    mask, weights = _mask_and_weights(mask_file, model)
    write_prune(out, mask, weights)
    return out


def _mask_and_weights(mask_file: Path, model: str) -> tuple[Mask, dict[str, Tensor]]:
    """A mask and the state dict of its model, with a pooler only where the mask prunes it."""
    mask = load_mask(mask_file)
    pretrained = load_pretrained(model)
    places = [pretrained.family.place(name) for name in mask]
    if any(place is not None and place.role == "pooler" for place in places):
        add_pooler(pretrained.model, model)
    return mask, pretrained.model.state_dict()


FORMATS = {"checkpoint": export_checkpoint, "tamt": export_tamt, "prune": export_prune}
"""``--format`` -> what writes it."""
