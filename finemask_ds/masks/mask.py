"""The mask of a model: which weights stay, one bit each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from finemask_ds.errors import UserError, abbreviated
from finemask_ds.masks.select import select

Shape = tuple[int, ...]


class Mask(Mapping[str, Tensor]):
    """Parameter's name -> bool matrix on the CPU, True where the weight stays; and where the mask comes from.

    Cannot be changed: it stores bits of its own and every look-up makes a new tensor. The order of the names
    is kept. Two masks are equal if names and bits are, in whatever order and from wherever they come.
    """

    def __init__(self, matrices: Mapping[str, Tensor], provenance: Mapping[str, Any] | None = None):
        """Pack bool tensors [rows, columns] on any device.

        Args:
            matrices: parameter's name -> bool tensor.
            provenance: JSON values that say how the mask was made.

        Raises:
            TypeError: for a tensor that is not bool, or provenance that is no JSON.
            ValueError: for a tensor that is no matrix or has no elements, or for no tensors at all.
        """
        for name, keep in matrices.items():
            if keep.dtype != torch.bool:
                raise TypeError(f"{name}: a mask is bool, not {keep.dtype}")
        self._shapes = _checked({name: tuple(keep.shape) for name, keep in matrices.items()})
        self._bits = {name: _pack(keep) for name, keep in matrices.items()}
        self._provenance = _json(provenance or {})

    @classmethod
    def from_bits(
        cls,
        bits: Mapping[str, numpy.ndarray],
        shapes: Mapping[str, Shape],
        provenance: Mapping[str, Any] | None = None,
    ) -> Mask:
        """Take packed bits as ``bits`` returns them.

        Raises:
            ValueError: for names, shapes or dtypes that do not go together, or a bit set beyond a row's end.
        """
        mask = cls.__new__(cls)
        mask._shapes = _checked(shapes)
        if set(bits) != set(shapes):
            raise ValueError(f"bits of {sorted(bits)} and shapes of {sorted(shapes)}")
        for name, (rows, columns) in mask._shapes.items():
            packed = bits[name]
            if packed.dtype != numpy.uint8 or packed.shape != (rows, -(-columns // 8)):
                raise ValueError(f"{name}: bits {packed.dtype} {packed.shape} are not those of {rows} x {columns}")
            if columns % 8 and (packed[:, -1] >> (columns % 8)).any():
                raise ValueError(f"{name}: a bit is set beyond the last of {columns} columns")
        mask._bits = {name: _frozen(bits[name].copy()) for name in mask._shapes}
        mask._provenance = _json(provenance or {})
        return mask

    @classmethod
    def full_like(cls, shapes: Mapping[str, Shape]) -> Mask:
        """The mask that keeps everything."""
        return cls({name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()})

    @classmethod
    def random(cls, shapes: Mapping[str, Shape], sparsity: float, seed: int, scope: str = "local") -> Mask:
        """Keep n - round(S * n) weights at random: of each matrix (local), or of all together (global).

        Every weight draws 32 bits and the largest draws stay. A matrix's draws follow from the seed and its
        name alone, not from the other matrices, and are the same on every machine.
        """
        draws = {name: _draws(name, shape, seed) for name, shape in shapes.items()}
        return cls({name: selection.mask for name, selection in select(draws, sparsity, scope).items()})

    def with_provenance(self, provenance: Mapping[str, Any]) -> Mask:
        """The same bits from elsewhere."""
        other = Mask.__new__(Mask)
        other._shapes, other._bits, other._provenance = self._shapes, self._bits, _json(provenance)
        return other

    def only(self, names: Iterable[str]) -> Mask:
        """The same bits of these matrices alone."""
        other, names = Mask.__new__(Mask), set(names)
        other._shapes = _checked({name: shape for name, shape in self._shapes.items() if name in names})
        other._bits, other._provenance = {name: self._bits[name] for name in other._shapes}, self._provenance
        return other

    def __getitem__(self, name: str) -> Tensor:
        columns = self._shapes[name][1]
        unpacked = numpy.unpackbits(self._bits[name], axis=-1, count=columns, bitorder="little")
        return torch.from_numpy(unpacked.view(numpy.bool_))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes  # Mapping's own would unpack the matrix to find out

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        same_shapes = self._shapes == other._shapes
        return same_shapes and all(numpy.array_equal(self._bits[name], other._bits[name]) for name in self)

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def __repr__(self) -> str:
        return f"Mask({len(self)} matrices, {self.num_kept():,} of {self.num_weights():,} weights kept)"

    @property
    def shapes(self) -> dict[str, Shape]:
        """Name -> (rows, columns)."""
        return dict(self._shapes)

    @property
    def provenance(self) -> dict[str, Any]:
        """How the mask was made, as JSON values; a copy."""
        return dict(json.loads(self._provenance))

    def bits(self, name: str) -> numpy.ndarray:
        """One bit per weight: read-only uint8 [rows, ceil(columns / 8)], little bit order, padded with 0."""
        return self._bits[name]

    def num_kept(self, name: str | None = None) -> int:
        """Weights that stay in one matrix, or in all."""
        return sum(ones(self._bits[each]) for each in self._names(name))

    def num_weights(self, name: str | None = None) -> int:
        """Weights of one matrix, or of all."""
        return sum(self._shapes[each][0] * self._shapes[each][1] for each in self._names(name))

    def sparsity(self, name: str | None = None) -> float:
        """Share of the weights that goes, counted, of one matrix or of all."""
        total = self.num_weights(name)
        return (total - self.num_kept(name)) / total

    def jaccard(self, other: Mask, name: str | None = None) -> float:
        """|A and B| / |A or B| over a matrix or all as one set (TAMT Section 4.2.5); 1 if both are empty."""
        other.check(self._shapes, "the other mask")
        names = self._names(name)
        common = sum(ones(self._bits[each] & other._bits[each]) for each in names)
        united = sum(ones(self._bits[each] | other._bits[each]) for each in names)
        return common / united if united else 1.0

    def distance(self, other: Mask, name: str | None = None) -> float:
        """Mask distance 1 - ``jaccard`` (TAMT Section 4.2.5)."""
        return 1.0 - self.jaccard(other, name)

    def mean_jaccard(self, other: Mask) -> float:
        """Mean of the matrices' ``jaccard``, small or large, as the authors' compare_mask.py prints it."""
        return sum(self.jaccard(other, name) for name in self) / len(self)

    def check(self, shapes: Mapping[str, Shape], owner: str = "the model") -> None:
        """Refuse a mask that does not belong to these matrices.

        Args:
            shapes: name -> shape of every matrix that the mask has to cover.
            owner: whose matrices they are, for the message.

        Raises:
            UserError: which matrices are missing, unknown or of another shape.
        """
        other = [name for name in self if name in shapes and tuple(shapes[name]) != self._shapes[name]]
        problems = [
            *_some("lacks", [name for name in shapes if name not in self]),
            *_some(f"has what {owner} has not,", [name for name in self if name not in shapes]),
            *_some(
                f"differs from {owner} in",
                [f"{name} ({dimensions(self._shapes[name])}, there {dimensions(shapes[name])})" for name in other],
            ),
        ]
        if problems:
            raise UserError(
                f"the mask is for another model: it {', '.join(problems)}; type the --model it was made from"
            )

    def digest(self) -> dict[str, str]:
        """Name -> SHA-256 of the matrix's packed bits."""
        return {name: hashlib.sha256(bits.tobytes()).hexdigest() for name, bits in self._bits.items()}

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and bits in the order of the names: equal where the masks are equal."""
        return hashlib.sha256(_json([self._shapes, self.digest()]).encode()).hexdigest()

    def _names(self, name: str | None) -> list[str]:
        return list(self._shapes) if name is None else [name]


def in_common(masks: Sequence[Mask]) -> tuple[list[Mask], list[str]]:
    """Masks cut to the matrices that all of them have (their bits are not copied), and the names of the others.

    Raises:
        UserError: where there is no such matrix, or one is of different shapes.
    """
    every = dict.fromkeys(name for mask in masks for name in mask)
    common = [name for name in every if all(name in mask for mask in masks)]
    if not common:
        raise UserError("they have no matrix in common")
    for name in common:
        if len(shapes := {dimensions(mask.shapes[name]): None for mask in masks}) > 1:
            raise UserError(f"{name} is {' and '.join(shapes)}")
    return [mask.only(common) for mask in masks], [name for name in every if name not in common]


def _checked(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    if not shapes:
        raise ValueError("a mask has at least one matrix")
    for name, shape in shapes.items():
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"{name}: a mask is a matrix [rows, columns], not {list(shape)}")
    return {name: tuple(shape) for name, shape in shapes.items()}


def _pack(keep: Tensor) -> numpy.ndarray:
    return _frozen(numpy.packbits(keep.detach().cpu().numpy(), axis=-1, bitorder="little"))


def _frozen(bits: numpy.ndarray) -> numpy.ndarray:
    bits.flags.writeable = False
    return bits


def ones(bits: numpy.ndarray) -> int:
    """How many bits are set in an array of packed bits."""
    return int(numpy.bitwise_count(bits).sum(dtype=numpy.int64))


def _draws(name: str, shape: Shape, seed: int) -> Tensor:
    """Uniform int32 of the shape: raw words of Philox, since numpy may change what it makes of them."""
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()[:16]
    size = shape[0] * shape[1]
    words = numpy.random.Philox(key=int.from_bytes(key, "little")).random_raw((size + 1) // 2)
    return torch.from_numpy(words.astype("<u8", copy=False).view("<i4")[:size].reshape(shape))


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def dimensions(shape: Shape) -> str:
    """A shape as it is written: 768 x 3072."""
    return " x ".join(map(str, shape)) or "nothing"


def _some(verb: str, names: list[str]) -> list[str]:
    return [f"{verb} {abbreviated(names)}"] if names else []
