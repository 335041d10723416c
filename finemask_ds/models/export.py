"""Write a subnetwork as a plain Hugging Face checkpoint: M * theta_0 with exact zeros, loadable anywhere."""

from __future__ import annotations

from pathlib import Path

import torch

from finemask_ds.errors import UserError
from finemask_ds.masks.files import load_mask
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
        pretrained.model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    with torch.no_grad():
        for name, keep in mask.items():
            parameters[name].masked_fill_(~keep, 0.0)


def export_checkpoint(mask_file: Path, model: str, out: Path) -> Path:
    """Write the subnetwork of ``mask_file`` in ``model`` to the new folder ``out`` and return it.

    Raises:
        UserError: where ``out`` exists, or the mask is broken or for another model.
    """
    if out.exists():
        raise UserError(f"{out} exists and is not written over; type another --out")
    mask = load_mask(mask_file)
    pretrained = load_pretrained(model)
    add_pooler(pretrained.model, model)  # A downstream task may start from it.
    apply_mask(pretrained, mask)
    save_pretrained(pretrained, out)
    return out
