"""Mask files of others, read by name and written; nothing in them is ever run.

Layouts, where X is a module's name: TAMT's and open_lth's ``X.weight`` (bool, int32), IMP's, OMP's and BERT-Tickets'
``X.weight_mask`` (bool, float32), the state dict of torch.nn.utils.prune with ``X.weight_orig`` beside it, MaskLLM's
``X.weight.mask`` (float32) and its packed bits in an .npz. What a file is, its content says and not its name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from finemask_ds.errors import UserError, abbreviated
from finemask_ds.masks.mask import Mask, Shape
from finemask_ds.masks.untrusted import WANTED, is_numpy, read_arrays, read_tensors
from finemask_ds.run import atomic_write, existing


@dataclass(frozen=True)
class Foreign:
    """What a file of others holds."""

    format: str
    """Who writes such files, in words."""
    matrices: Mapping[str, Tensor]
    """Name of the weight (``X.weight``) -> bool matrix [rows, columns], True where it stays, in the file's order."""
    notes: tuple[str, ...] = ()
    """What else the file holds, each a line worth printing."""
    sha256: str | None = None
    """Of what is no single file."""


def read_foreign(path: str | os.PathLike[str], shapes: Mapping[str, Shape]) -> Foreign:
    """Read a mask file of others as it is.

    Args:
        path: the file.
        shapes: name -> shape of the model's prunable matrices; used where the file has none (packed bits).

    Raises:
        UserError: where the file is missing, damaged, a pickle that needs code, or no mask; where a value is neither
            0 nor 1, or nothing of a matrix is kept.
    """
    path = Path(path)
    if is_numpy(path):
        foreign = _packed(path, _without_prefix(read_arrays(path)), shapes)
    else:
        foreign = _named(path, _without_prefix(read_tensors(path)))
    if empty := [name for name, keep in foreign.matrices.items() if not keep.any()]:
        raise UserError(f"{path} keeps no weight of {abbreviated(empty)}: an all-zero mask is refused; {WANTED}")
    return foreign


def write_tamt(path: str | os.PathLike[str], mask: Mask) -> None:
    """Write a mask as TAMT's ``mask.pt``: a dict of ``X.weight`` -> bool on the CPU.

    Raises:
        UserError: where ``path`` exists or cannot be written.
    """
    _save(path, dict(mask))


def write_prune(path: str | os.PathLike[str], mask: Mask, weights: Mapping[str, Tensor]) -> None:
    """Write the state dict of a model under torch.nn.utils.prune.

    A masked ``X.weight`` becomes ``X.weight_orig``, unmasked, and ``X.weight_mask`` of its dtype; all else stays.

    Args:
        path: a new file.
        mask: which weights stay.
        weights: the plain model's state dict.

    Raises:
        UserError: where the mask is for another model, or ``path`` exists or cannot be written.
    """
    mask.check({name: tuple(weights[name].shape) for name in mask if name in weights})
    state: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name in mask:
            state[f"{name}_orig"] = weight
            state[f"{name}_mask"] = mask[name].to(weight.dtype)
        else:
            state[name] = weight
    _save(path, state)


def refuse_existing(path: str | os.PathLike[str], argument: str = "--out") -> None:
    """Refuse to write over a file or folder, or where nothing can be written, naming the argument to change.

    Raises:
        UserError: where ``path`` exists, or cannot.
    """
    if os.path.lexists(path):
        raise UserError(f"{path} exists and is not written over; type another {argument}")
    place = existing(Path(path))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"{path} cannot be written, as {place} is no folder that you may write; type another {argument}"
        )


def _save(path: str | os.PathLike[str], tensors: dict[str, Tensor]) -> None:
    refuse_existing(path)
    with atomic_write(path, "wb") as stream:
        torch.save(tensors, stream)


def _without_prefix(entries: dict[str, Any]) -> dict[str, Any]:
    """Names without the ``module.`` of DataParallel, which stands before all or none."""
    if all(name.startswith("module.") for name in entries):
        return {name.removeprefix("module."): entry for name, entry in entries.items()}
    return entries


def _named(path: Path, tensors: dict[str, Tensor]) -> Foreign:
    """Take the masks from tensors by name."""
    writer, ending = _writer(path, tensors)
    masks = [name for name in tensors if name.endswith(ending)]
    names = _weights_of(path, masks, ending)
    folded = [name for name in tensors if name.endswith(".weight_orig")]
    if bare := [name for name in folded if f"{name.removesuffix('_orig')}_mask" not in tensors]:
        raise UserError(f"{path} has no masks beside the pruned weights {abbreviated(bare)}: {WANTED}")
    dtypes = sorted({str(tensors[name].dtype).removeprefix("torch.") for name in masks})
    matrices = {weight: _bool(path, name, tensors[name]) for weight, name in names.items()}
    notes = _notes(folded, [name for name in tensors if name not in {*masks, *folded}])
    return Foreign(f"{writer} ({' and '.join(dtypes)} X{ending})", matrices, notes)


def _writer(path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """Who writes such tensors, and how the names of their masks end."""
    endings = {name[name.rfind(".") :] for name in tensors}
    is_bool = all(tensor.dtype == torch.bool for tensor in tensors.values())
    if ".weight_mask" in endings:
        if ".weight_orig" in endings:
            return "torch.nn.utils.prune", ".weight_mask"
        return "TAMT's IMP or OMP" if is_bool else "BERT-Tickets or TAMT's OMP", ".weight_mask"
    if ".mask" in endings:
        return "MaskLLM", ".mask"
    if all(name.endswith(".weight") and not tensor.is_floating_point() for name, tensor in tensors.items()):
        return "TAMT" if is_bool else "open_lth", ".weight"
    if ".weight_orig" in endings:
        raise UserError(f"{path} holds pruned weights (X.weight_orig) without their masks: {WANTED}")
    if ".mask_scores" in endings:
        raise UserError(f"{path} holds scores (X.mask_scores) and not the masks made from them: {WANTED}")
    raise UserError(f"{path} holds {abbreviated(list(tensors))} and no masks, as dense weights do: {WANTED}")


def _weights_of(path: Path, masks: Sequence[str], ending: str) -> dict[str, str]:
    """Name of the weight -> name of its mask: ``X.weight`` for ``X.weight_mask``, ``X.weight.mask`` and ``X.mask``."""
    names = {f"{name.removesuffix(ending).removesuffix('.weight')}.weight": name for name in masks}
    if len(names) < len(masks):
        twice = [name for name in masks if name not in names.values()]
        raise UserError(f"{path} has a second mask for the weights of {abbreviated(twice)}: {WANTED}")
    return names


def _notes(folded: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    notes = []
    if folded:
        notes.append(
            "weights folded: X.weight_orig * X.weight_mask; only the masks are read, the weights are --model's"
        )
    if masks := [name for name in others if name.endswith("_mask")]:
        notes.append(f"masks of other than weights ignored: {abbreviated(masks)}")
    if rest := [name for name in others if not name.endswith("_mask")]:
        notes.append(f"{len(rest)} other {'entry' if len(rest) == 1 else 'entries'} ignored: {abbreviated(rest)}")
    return tuple(notes)


def _bool(path: Path, name: str, values: Tensor) -> Tensor:
    """A matrix of 0s and 1s as bool."""
    shown = abbreviated([name])
    if values.dim() != 2 or values.layout != torch.strided or values.is_meta or values.is_quantized:
        raise UserError(f"{path}: {shown} is {list(values.shape)}, no plain matrix of 0s and 1s: {WANTED}")
    if values.dtype == torch.bool:
        values = values.contiguous().view(torch.uint8)  # A bool's byte is 0 or 1, unless the file is damaged.
    keep = values == 1
    wrong = ~(keep | (values == 0))
    if wrong.any():
        raise UserError(
            f"{path}: {shown} holds {values[wrong][0].item():g}, and a mask holds 0 and 1 alone (not scores, not "
            f"weights): {WANTED}"
        )
    return keep


def _packed(path: Path, arrays: Mapping[str, numpy.ndarray], shapes: Mapping[str, Shape]) -> Foreign:
    """Unpack MaskLLM's bits: ``numpy.packbits`` of the flattened matrix, in big bit order and without its shape."""
    if others := [key for key in arrays if not key.endswith(".mask")]:
        raise UserError(f"{path} holds the arrays {abbreviated(others)} and no packed masks (X.mask): {WANTED}")
    names = _weights_of(path, list(arrays), ".mask")
    if unknown := [name for name in names if name not in shapes]:
        raise UserError(f"{path} has what the model has not, {abbreviated(unknown)}; type the --model it was made from")
    matrices = {}
    for name, key in names.items():
        rows, columns = shapes[name]
        if rows * columns % 8:
            raise UserError(
                f"{path}: {name} has {rows} x {columns} weights in the model, which is no multiple of 8, so that "
                "MaskLLM's packed bits do not tell its size; give its mask.pt instead of the .npz"
            )
        bits = arrays[key]
        if bits.dtype != numpy.uint8 or bits.shape != (rows * columns // 8,):
            raise UserError(
                f"{path}: {key} is {bits.dtype} {list(bits.shape)} and not the bits of {rows} x {columns} weights; "
                "type the --model it was made from"
            )
        matrices[name] = torch.from_numpy(numpy.unpackbits(bits).reshape(rows, columns).view(numpy.bool_))
    return Foreign("MaskLLM (packed bits X.mask)", matrices)
