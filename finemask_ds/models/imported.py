"""A mask file of others as a mask of ours: names and shapes come from the model it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from finemask_ds.masks.foreign import read_foreign
from finemask_ds.masks.mask import Mask, Shape
from finemask_ds.models.load import add_pooler, load_pretrained
from finemask_ds.run import file_sha256


@dataclass(frozen=True)
class Imported:
    """A mask as its file has it, and what the file says and leaves open."""

    mask: Mask
    """The matrices of the file, in the order of the model."""
    format: str
    """Who writes such files, in words."""
    notes: tuple[str, ...]
    """What else the file holds, a line each."""
    absent: dict[str, Shape]
    """Name -> shape of the model's prunable matrices that the file does not have: they are dense."""


def import_mask(source: Path, model: str, called: str | None = None) -> Imported:
    """Read a mask file of others and check it against its model.

    Args:
        source: the file; see ``masks.foreign`` for the formats.
        model: hub name or folder of the model it was made from.
        called: the model's name in the mask's provenance, where it is not ``model``.

    Raises:
        UserError: where the file is none of these masks, or of another model.
    """
    pretrained = load_pretrained(model)
    digest = pretrained.digest()
    add_pooler(pretrained.model, model)  # BERT-Tickets and TAMT's code prune it too.
    places, shapes = {}, {}
    for name, parameter in pretrained.model.named_parameters():
        if place := pretrained.family.place(name):
            places[name], shapes[name] = place, tuple(parameter.shape)
    foreign = read_foreign(source, shapes)
    ours = {name: foreign.matrices[name] for name in shapes if name in foreign.matrices}
    others = {name: keep for name, keep in foreign.matrices.items() if name not in shapes}
    mask = Mask({**ours, **others})
    mask.check({name: shapes[name] for name in ours}, "the prunable part of the model")
    if any(places[name].role == "pooler" for name in mask):
        digest = pretrained.digest()  # A search that prunes the pooler counts it to theta_0.
    provenance = {
        "model": called or model,
        "model_sha256": digest,
        "method": "imported",
        "format": foreign.format,
        "source": source.name,
        "source_sha256": file_sha256(source),
        "finemask_ds": version("finemask_ds"),
    }
    absent = {name: shape for name, shape in shapes.items() if name not in mask}
    return Imported(mask.with_provenance(provenance), foreign.format, foreign.notes, absent)
