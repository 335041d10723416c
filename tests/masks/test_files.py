"""A mask file holds what it should, for anybody's reader, and nothing in it changes unnoticed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from finemask_ds.errors import UserError
from finemask_ds.masks.files import load_mask, save_mask
from finemask_ds.masks.mask import Mask

SHAPES = {"bert.b.weight": (5, 13), "bert.a.weight": (3, 8)}
PROVENANCE = {"method": "random", "seed": 1, "model": {"name": "tôy", "sha256": None}, "rates": [0.1, 1e-5]}


@pytest.fixture
def mask() -> Mask:
    return Mask.random(SHAPES, 0.6, seed=1).with_provenance(PROVENANCE)


@pytest.fixture
def path(tmp_path: Path, mask: Mask) -> Path:
    save_mask(tmp_path / "mask.safetensors", mask)
    return tmp_path / "mask.safetensors"


SHAPES_OF_ANY_NAME = st.dictionaries(
    st.text('abc._é"/', min_size=1, max_size=6), st.tuples(st.integers(1, 9), st.integers(1, 20)), min_size=1
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(SHAPES_OF_ANY_NAME, st.floats(0, 1, exclude_max=True))
def test_round_trip(tmp_path, shapes, sparsity):
    mask = Mask.random(shapes, sparsity, seed=0).with_provenance(PROVENANCE)
    save_mask(tmp_path / "mask.safetensors", mask)
    loaded = load_mask(tmp_path / "mask.safetensors")
    assert loaded == mask
    assert list(loaded) == list(mask)
    assert loaded.provenance == PROVENANCE


def test_safetensors_and_numpy_read_it_alone(path, mask):
    bits = safetensors.numpy.load_file(path)
    assert set(bits) == {f"{name}.bits" for name in SHAPES}
    for name, (_, columns) in SHAPES.items():
        assert bits[f"{name}.bits"].dtype == numpy.uint8
        keep = numpy.unpackbits(bits[f"{name}.bits"], axis=-1, count=columns, bitorder="little")
        assert torch.equal(torch.from_numpy(keep).bool(), mask[name])
    with safe_open(path, framework="numpy") as stream:
        metadata = stream.metadata()
    assert json.loads(metadata["provenance"]) == PROVENANCE
    assert json.loads(metadata["measured"])["total"] == mask.sparsity()
    assert json.loads(metadata["measured"])["matrices"] == {name: mask.sparsity(name) for name in mask}
    assert json.loads(metadata["sha256"]) == mask.digest()


def test_equal_masks_give_equal_bytes_in_another_process(path, tmp_path):
    copy = tmp_path / "copy.safetensors"
    program = (
        "import sys; from finemask_ds.masks.files import load_mask, save_mask; "
        "mask = load_mask(sys.argv[1]); save_mask(sys.argv[2], mask.with_provenance("
        "dict(reversed(mask.provenance.items()))))"
    )
    subprocess.run([sys.executable, "-c", program, path, copy], check=True)
    assert copy.read_bytes() == path.read_bytes()


def test_a_changed_byte_is_refused_or_changes_nothing(path, mask):
    whole = path.read_bytes()
    unnoticed = []
    for position in range(len(whole)):
        for bit in (1, 32):
            damaged = bytearray(whole)
            damaged[position] ^= bit
            path.write_bytes(damaged)
            try:
                loaded = load_mask(path)
            except UserError:
                continue
            assert (loaded, loaded.provenance) == (mask, PROVENANCE), position
            unnoticed.append(position)
    data = 8 + int.from_bytes(whole[:8], "little")
    assert max(unnoticed, default=0) < data  # no bit of a mask
    assert len(unnoticed) < 20  # blanks between the JSON's words, at most


def test_a_truncated_file_is_refused(path):
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"damaged.*copy it again"):
            load_mask(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="damaged"):
        load_mask(path)


def rewritten(path: Path, tensors=None, **metadata: str) -> None:
    """Write the file anew with other contents, as a tool that knows safetensors would."""
    with safe_open(path, framework="numpy") as stream:
        old = stream.metadata()
    safetensors.numpy.save_file(tensors or safetensors.numpy.load_file(path), path, {**old, **metadata})


def test_a_rewritten_file_is_refused_unless_nothing_changed(path, mask):
    rewritten(path)
    assert load_mask(path) == mask
    rewritten(path, provenance=json.dumps({**PROVENANCE, "seed": 2}, sort_keys=True))
    with pytest.raises(UserError, match=r"damaged.*seal"):
        load_mask(path)


def test_other_shapes_other_tensors_and_padding_are_refused(path):
    bits = safetensors.numpy.load_file(path)
    padded = bits["bert.b.weight.bits"].copy()
    padded[0, -1] |= 0x80
    for tensors in (
        {**bits, "bert.b.weight.bits": padded},
        {**bits, "bert.c.weight.bits": padded},
        {"bert.b.weight.bits": bits["bert.b.weight.bits"]},
        {**bits, "bert.a.weight.bits": bits["bert.a.weight.bits"].astype(numpy.int8)},
    ):
        whole = path.read_bytes()
        rewritten(path, tensors)
        with pytest.raises(UserError, match="damaged"):
            load_mask(path)
        path.write_bytes(whole)
    for shapes in (
        "[]",
        "{}",
        "3",
        '{"bert.a.weight": [3, 8]}',
        '{"bert.b.weight": 3, "bert.a.weight": [3, 8]}',
    ):
        rewritten(path, shapes=shapes)
        with pytest.raises(UserError, match="damaged"):
            load_mask(path)


def test_a_later_format_is_named(path):
    rewritten(path, format_version="2")
    with pytest.raises(UserError, match=r"format version 2.*reads 1"):
        load_mask(path)


def test_what_is_no_mask_file_is_refused(tmp_path):
    checkpoint = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"w": numpy.ones((2, 2), numpy.float32)}, checkpoint, {"format": "pt"})
    pickle = tmp_path / "mask.pt"
    torch.save({"w": torch.ones(2, 2)}, pickle)
    for path, sentence in (
        (checkpoint, "is no mask file"),
        (pickle, "damaged"),
        (tmp_path / "missing", "no mask file"),
        (tmp_path, "no mask file"),
    ):
        with pytest.raises(UserError, match=sentence) as error:
            load_mask(path)
        assert str(path) in str(error.value)


def test_the_file_is_one_bit_per_weight(tmp_path):
    mask = Mask.random({"w": (512, 1024)}, 0.7, seed=0)
    save_mask(tmp_path / "mask.safetensors", mask)
    size = (tmp_path / "mask.safetensors").stat().st_size
    assert 512 * 1024 // 8 < size < 512 * 1024 // 8 + 2_000
    assert load_mask(tmp_path / "mask.safetensors") == mask
