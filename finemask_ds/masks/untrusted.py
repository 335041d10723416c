"""What stands in a tensor file of unknown origin: arrays and tensors by name, and no code is ever run for it."""

from __future__ import annotations

import contextlib
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy
import torch
from torch import Tensor

from finemask_ds.errors import UserError, abbreviated

WANTED = "give a file with one 0/1 matrix per weight, such as TAMT's or BERT-Tickets' mask.pt"
_ZIP, _NUMPY, _PICKLE = b"PK\x03\x04", b"\x93NUMPY", b"\x80"
_PLAIN = re.compile(
    r"torch\.(\w*Storage|Size|Tensor|device|bool|(b?float|u?int|complex)\d\w*)|torch\._utils\._rebuild\w+|"
    r"torch\.storage\.\w+|torch\.nn\.parameter\.Parameter|collections\.(OrderedDict|Counter)"
)
"""What a pickle of plain tensors names."""


def is_numpy(path: Path) -> bool:
    """Whether numpy wrote a file rather than torch, by its first bytes and the names in the archive.

    Raises:
        UserError: where the file is missing, empty, a broken archive or one of neither, or safetensors.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}: type the path of a mask file such as mask.pt")
    head = _head(path)
    if not head:
        raise UserError(f"{path} is empty: copy it again")
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        raise UserError(
            f"{path} is a safetensors file, which is either a mask of this program or dense weights: "
            f"type finemask mask show {path}, or {WANTED}"
        )
    return head.startswith(_NUMPY) or (head.startswith(_ZIP) and _is_npz(path))


def read_arrays(path: Path) -> dict[str, numpy.ndarray]:
    """The arrays of an .npz by name.

    Raises:
        UserError: where the file is damaged, one array without a name, or holds pickled objects.
    """
    with _damage_is_user_error(path):
        loaded = numpy.load(path, allow_pickle=False)
        if isinstance(loaded, numpy.ndarray):
            raise UserError(_one_array(path, loaded.shape))
        with loaded:
            return dict(loaded)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save by name, on the CPU wherever they were; entries of another kind are left out.

    Raises:
        UserError: where the file is damaged, has no tensors by name, or is a pickle that needs code.
    """
    head = _head(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of the pickle's protocol; what cannot be read is refused below.
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged bytes raise whatever they lead to: KeyError, IndexError, struct.error, ...
        if code := next((name for name in _globals(path, head) if not _PLAIN.fullmatch(name)), None):
            shown = re.sub(r"[^\w.]", "?", code)[:100]  # The file chose it, and it goes to a terminal.
            raise UserError(
                f"{path} is a pickle that would run {shown}, and code in a file is never run: {WANTED}"
            ) from error
        if head.startswith((_ZIP, _PICKLE)):
            raise UserError(
                f"{path} is truncated, damaged or not written by torch.save: copy it again, or write its dict of "
                "tensors by torch.save with the default protocol"
            ) from error
        raise UserError(f"{path} is no mask file: {WANTED}") from error
    if isinstance(loaded, Tensor):
        raise UserError(_one_array(path, tuple(loaded.shape)))
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__} and not masks by name: {WANTED}")
    tensors = {name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        entries = f"only {abbreviated([str(name) for name in loaded])}" if loaded else "nothing"
        raise UserError(f"{path} holds no tensors by name ({entries}): {WANTED}")
    return tensors


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read(9)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): make it readable or name a copy of it") from error


@contextlib.contextmanager
def _damage_is_user_error(path: Path) -> Iterator[None]:
    """Turn whatever a library makes of damaged bytes into one sentence, and so the array that needs pickle."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # KeyError, struct.error, SyntaxError, MemoryError of a huge shape, ...
        if "allow_pickle" in str(error):
            raise UserError(f"{path} holds pickled objects, which would run code and are not read: {WANTED}") from error
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is truncated or damaged ({reason}): copy it again") from error


def _is_npz(path: Path) -> bool:
    """Whether an archive is numpy's rather than torch's.

    Raises:
        UserError: where it is neither, or broken.
    """
    with _damage_is_user_error(path), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/data.pkl") for name in names):
        return False
    if not names or not all(name.endswith(".npy") for name in names):
        raise UserError(f"{path} is an archive without tensors, no mask: {WANTED}")
    return True


def _globals(path: Path, head: bytes) -> Iterator[str]:
    """What the pickles in a file name, read off their opcodes without running any, up to where it is damaged."""
    with contextlib.suppress(Exception):
        if not head.startswith(_ZIP):
            with open(path, "rb") as stream:
                yield from _named_in(stream)
        else:
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith("/data.pkl"):
                        with archive.open(name) as stream:
                            yield from _named_in(stream)


def _named_in(stream: IO[bytes]) -> Iterator[str]:
    """Globals of one pickle after the other (torch's old format has several); raises where the bytes are none."""
    while True:
        memo: list[str] = []
        strings = ["", ""]  # the last two, which STACK_GLOBAL takes as module and name
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                yield str(argument).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":
                yield ".".join(strings)
            elif opcode.name == "MEMOIZE":
                memo.append(strings[1])
            elif isinstance(argument, str):
                strings = [strings[1], argument]
            elif isinstance(argument, int) and opcode.name.endswith("BINGET"):
                strings = [strings[1], "".join(memo[argument : argument + 1])]


def _one_array(path: Path, shape: tuple[int, ...]) -> str:
    return (
        f"{path} is one array {list(shape)} without names, as masks of heads and FFN units are, and not a matrix "
        f"per weight: {WANTED}"
    )
