"""The mask file: one bit per weight in safetensors, with shapes, checksums and provenance.

Matrix ``NAME`` is the tensor ``NAME.bits``, uint8 [rows, ceil(columns / 8)], in little bit order, each row
padded with zeros: ``numpy.unpackbits(bits, axis=-1, count=columns, bitorder="little")`` has the 0s and 1s.
The header's ``__metadata__`` holds JSON: ``format``, ``format_version``, ``shapes``, ``sha256`` of each
matrix's bits, ``measured`` sparsity (total and by matrix), ``provenance``, and ``seal``, a SHA-256 over them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping

from safetensors import SafetensorError, safe_open

from finemask_ds.errors import UserError
from finemask_ds.masks.mask import Mask
from finemask_ds.run import atomic_write, mask_file

FORMAT = "finemask"
FORMAT_VERSION = "1"


def save_mask(path: str | os.PathLike[str], mask: Mask) -> None:
    """Write a mask, atomically; the same names in the same order, bits and provenance give the same bytes.

    Raises:
        UserError: where the disk is full or the folder cannot be written.
    """
    with atomic_write(path, "wb") as stream:
        stream.write(_header(mask))
        for name in mask:
            stream.write(mask.bits(name).tobytes())


def load_mask(path: str | os.PathLike[str]) -> Mask:
    """Read a mask, from its file or a search's run directory, and verify all of it.

    Raises:
        UserError: where the file is missing, no mask file, of another version, truncated, or changed since it
            was written, be it a bit or a word of its provenance.
    """
    path = mask_file(path)
    if not path.is_file():
        raise UserError(f"there is no mask file {path}: type the path of a file such as RUN/mask.safetensors")
    try:
        with safe_open(path, framework="numpy") as stream:
            found = stream.metadata() or {}
            if found.get("format") != FORMAT:
                raise UserError(f"{path} is no mask file: type the path of a file such as RUN/mask.safetensors")
            if found.get("format_version") != FORMAT_VERSION:
                raise UserError(
                    f"{path} has format version {found.get('format_version')}, this program reads "
                    f"{FORMAT_VERSION}: install the version of finemask_ds that wrote it"
                )
            names = stream.keys()
            bits = {name.removesuffix(".bits"): stream.get_tensor(name) for name in names}
        shapes = {name: tuple(shape) for name, shape in json.loads(found["shapes"]).items()}
        mask = Mask.from_bits(bits, shapes, json.loads(found["provenance"]))
        # What a whole file says follows from its bits and provenance, so everything is verified at once.
        for key, value in _metadata(mask).items():
            if found.get(key) != value:
                raise ValueError(f"its {key} does not fit its contents")
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the mask file {path} is damaged ({error}): copy it again or make it anew") from error
    return mask


def _metadata(mask: Mask) -> dict[str, str]:
    measured = {"total": mask.sparsity(), "matrices": {name: mask.sparsity(name) for name in mask}}
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "shapes": _json(mask.shapes),
        "sha256": _json(mask.digest()),
        "measured": _json(measured),
        "provenance": _json(mask.provenance),
    }
    return {**content, "seal": hashlib.sha256(_json(content).encode()).hexdigest()}


def _header(mask: Mask) -> bytes:
    """The length and the JSON that precede the bits. Written here, as safetensors shuffles the metadata."""
    header: dict[str, object] = {"__metadata__": _metadata(mask)}
    end = 0
    for name in mask:
        bits = mask.bits(name)
        start, end = end, end + bits.nbytes
        header[f"{name}.bits"] = {"dtype": "U8", "shape": list(bits.shape), "data_offsets": [start, end]}
    text = _json(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _json(value: Mapping[str, object]) -> str:
    return json.dumps(value, allow_nan=False)
