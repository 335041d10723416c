"""A mask of others, or a pruned model, as a mask of ours: names and shapes come from the model it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from finemask_ds.errors import UserError, abbreviated
from finemask_ds.masks.foreign import Foreign, read_foreign
from finemask_ds.masks.mask import Mask, Shape
from finemask_ds.models.load import Pretrained, add_pooler, load_pretrained
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


def import_mask(source: Path, model: str, called: str | None = None, *, from_zeros: bool = False) -> Imported:
    """Read a mask file of others, or a pruned model's zeros, and check it against its model.

    Args:
        source: the file; see ``masks.foreign`` for the formats. With ``from_zeros`` a folder that transformers loads.
        model: hub name or folder of the model it was made from.
        called: the model's name in the mask's provenance, where it is not ``model``.
        from_zeros: whether the source is a model with zeros where weights were pruned, and no mask.

    Raises:
        UserError: where the file is none of these masks, the model has no such zeros, or either is of another model.
    """
    pretrained = load_pretrained(model)
    add_pooler(pretrained.model, model)  # BERT-Tickets and TAMT's code prune it too.
    shapes = pretrained.prunable_shapes
    foreign = _zeros(source, pretrained) if from_zeros else read_foreign(source, shapes)
    matrices = foreign.matrices
    if matrices.keys().isdisjoint(shapes):  # of the bare encoder, as AutoModel has it
        matrices = {f"{pretrained.family.backbone}.{name}": keep for name, keep in matrices.items()}
    ours = {name: matrices[name] for name in shapes if name in matrices}
    others = {name: keep for name, keep in (matrices if ours else foreign.matrices).items() if name not in shapes}
    mask = Mask({**ours, **others})
    mask.check({name: shapes[name] for name in ours}, "the prunable part of the model")
    provenance = {
        "model": called or model,
        "model_sha256": pretrained.digest(),
        "method": "imported",
        "format": foreign.format,
        "source": source.name,
        "source_sha256": foreign.sha256 or file_sha256(source),
        "finemask_ds": version("finemask_ds"),
    }
    absent = {name: shape for name, shape in shapes.items() if name not in mask}
    return Imported(mask.with_provenance(provenance), foreign.format, foreign.notes, absent)


def _zeros(source: Path, theta0: Pretrained) -> Foreign:
    """A matrix is masked where the pruned model's is zero and theta_0's is not; without such zeros it is dense."""
    pruned = load_pretrained(str(source))
    add_pooler(pruned.model, str(source))
    weights, before = dict(pruned.model.named_parameters()), dict(theta0.model.named_parameters())
    names = [name for name in weights if pruned.family.place(name)]
    if other := [name for name in names if name not in before or before[name].shape != weights[name].shape]:
        raise UserError(
            f"{source} has {abbreviated(other)} otherwise than the model; type the --model it was pruned from"
        )
    kept = {name: (weights[name] != 0) | (before[name] == 0) for name in names}
    matrices = {name: keep for name, keep in kept.items() if not keep.all()}
    if not matrices:
        raise UserError(f"{source} has no zeros that the model has not; give the folder of a pruned model")
    return Foreign("a pruned model's zeros", matrices, sha256=pruned.digest())
