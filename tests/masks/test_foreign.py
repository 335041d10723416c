"""Files as the code of others writes them: read by name, as they are; refused with a sentence; never run."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pickle
import random
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from finemask_ds.errors import UserError
from finemask_ds.masks.files import save_mask
from finemask_ds.masks.foreign import Foreign, read_foreign, write_prune, write_tamt
from finemask_ds.masks.mask import Mask

SHAPES = {
    "bert.embeddings.word_embeddings.weight": (11, 8),
    "bert.encoder.layer.0.attention.self.query.weight": (8, 8),
    "bert.encoder.layer.1.attention.self.query.weight": (8, 8),  # of one shape with the other: position cannot tell
    "bert.encoder.layer.1.output.dense.weight": (8, 24),
}
MASK = Mask.random(SHAPES, 0.6, seed=1)
QUERY = "bert.encoder.layer.0.attention.self.query.weight"

Tensors = dict[str, Tensor]


def shuffled(tensors: Mapping[str, Tensor], seed: int = 3) -> Tensors:
    names = list(tensors)
    random.Random(seed).shuffle(names)
    return {name: tensors[name] for name in names}


def kept(foreign: Foreign) -> Mask:
    return Mask(foreign.matrices)


WRITERS: dict[str, Callable[[str, Tensor], tuple[str, Tensor]]] = {
    "TAMT (bool X.weight)": lambda name, keep: (name, keep),
    "TAMT's IMP or OMP (bool X.weight_mask)": lambda name, keep: (f"{name}_mask", keep),
    "BERT-Tickets or TAMT's OMP (float32 X.weight_mask)": lambda name, keep: (f"{name}_mask", keep.float()),
    "open_lth (int32 X.weight)": lambda name, keep: (name, keep.int()),
    "MaskLLM (float32 X.mask)": lambda name, keep: (f"{name}.mask", keep.float()),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", WRITERS)
def test_each_format_is_told_by_its_content_and_read_by_name(tmp_path, form, zipped):
    tensors = shuffled(dict(WRITERS[form](name, keep) for name, keep in MASK.items()))
    torch.save(tensors, tmp_path / "anything.xyz", _use_new_zipfile_serialization=zipped)
    foreign = read_foreign(tmp_path / "anything.xyz", SHAPES)
    assert foreign.format == form
    assert foreign.notes == ()
    assert kept(foreign) == MASK
    assert all(keep.dtype == torch.bool for keep in foreign.matrices.values())


def test_names_without_weight_and_an_ordered_dict_are_maskllms_too(tmp_path):
    tensors = {f"{name.removesuffix('.weight')}.mask": keep.half() for name, keep in MASK.items()}
    torch.save(collections.OrderedDict(tensors), tmp_path / "m.pt")
    assert kept(read_foreign(tmp_path / "m.pt", {})) == MASK


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    st.dictionaries(
        st.text("ab.", min_size=1, max_size=4), st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1
    ),
    st.sampled_from(sorted(WRITERS)),
    st.floats(0, 0.9),
    st.booleans(),
    st.integers(0, 9),
)
def test_any_mask_comes_back(tmp_path, sizes, form, sparsity, parallel, seed):
    shapes = {f"{name}x.weight": shape for name, shape in sizes.items()}
    mask = Mask.random(shapes, sparsity, seed=0)
    if any(mask.num_kept(name) == 0 for name in mask):
        return
    prefix = "module." if parallel else ""
    torch.save(
        dict(WRITERS[form](prefix + name, keep) for name, keep in shuffled(mask, seed).items()), tmp_path / "m.pt"
    )
    foreign = read_foreign(tmp_path / "m.pt", shapes)
    assert (kept(foreign), foreign.format) == (mask, form)


def packed(folder: Path, mask: Mapping[str, Tensor], ending: str = ".mask") -> Path:
    """As MaskLLM writes mask_compressed.npz."""
    numpy.savez_compressed(
        folder / "mask_compressed.npz",
        **{f"{name}{ending}": numpy.packbits(keep.numpy().flatten()) for name, keep in mask.items()},
    )
    return folder / "mask_compressed.npz"


def test_packed_bits_take_their_shapes_from_the_model(tmp_path):
    path = packed(tmp_path, shuffled(MASK))
    foreign = read_foreign(path, {**SHAPES, "other.weight": (3, 3)})
    assert foreign.format == "MaskLLM (packed bits X.mask)"
    assert kept(foreign) == MASK
    wide = Mask({"a.weight": torch.arange(64).view(2, 32) % 3 == 0})
    assert (
        kept(read_foreign(packed(tmp_path, wide), {"a.weight": (32, 2)}))["a.weight"]
        .flatten()
        .equal(wide["a.weight"].flatten())
    )


def test_packed_bits_that_do_not_fit_the_model_are_refused(tmp_path):
    path = packed(tmp_path, MASK)
    refused(path, "has what the model has not", QUERY, shapes={k: v for k, v in SHAPES.items() if k != QUERY})
    refused(path, QUERY, "8 x 16", "uint8 [8]", "type the --model", shapes={**SHAPES, QUERY: (8, 16)})
    refused(path, QUERY, "3 x 3", "multiple of 8", "mask.pt", shapes={**SHAPES, QUERY: (3, 3)})
    refused(packed(tmp_path, MASK, ending=""), "no packed masks")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.out, self.norm = nn.Linear(8, 8), nn.Linear(8, 4), nn.LayerNorm(4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_dict_of_torch_prune_is_read_and_what_is_ignored_is_told(tmp_path, dtype):
    model = Attention().to(dtype)
    prune.l1_unstructured(model.query, "weight", amount=0.7)
    prune.random_unstructured(model.out, "weight", amount=0.5)
    prune.l1_unstructured(model.out, "bias", amount=0.5)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    foreign = read_foreign(tmp_path / "model.pt", {})
    assert foreign.format == f"torch.nn.utils.prune ({str(dtype).removeprefix('torch.')} X.weight_mask)"
    expected = {"query.weight": model.query.weight_mask.bool(), "out.weight": model.out.weight_mask.bool()}
    assert kept(foreign) == Mask(expected)
    folded, biases, rest = foreign.notes
    assert folded.startswith("weights folded: X.weight_orig * X.weight_mask")
    assert biases == "masks of other than weights ignored: out.bias_mask"
    assert rest == "4 other entries ignored: query.bias, out.bias_orig, norm.weight and 1 more"


def test_tensors_saved_on_another_device_are_read_on_the_cpu(tmp_path):
    """BERT-Tickets saves from CUDA; the file differs in the device's name alone."""
    stream = io.BytesIO()
    tensors = {f"{name}_mask": keep.float() for name, keep in MASK.items()}
    torch.save(tensors, stream, _use_new_zipfile_serialization=False)
    moved = stream.getvalue().replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0")
    assert moved.count(b"cuda:0") == 1  # the others refer to it
    (tmp_path / "mask.pt").write_bytes(moved)
    assert kept(read_foreign(tmp_path / "mask.pt", {})) == MASK


def refused(path: Path, *words: str, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> None:
    """One sentence that names the file and has the words."""
    with pytest.raises(UserError) as error:
        read_foreign(path, shapes)
    sentence = str(error.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    for word in words:
        assert word in sentence, sentence


class Evil:
    """Would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_code_in_a_pickle_is_named_and_not_run(tmp_path, protocol):
    trace, path = tmp_path / "trace", tmp_path / "mask.pt"
    tensors = {QUERY: MASK[QUERY], "x.weight": Evil(trace)}
    writers: list[Callable[[], object]] = [
        lambda: path.write_bytes(pickle.dumps(Evil(trace), protocol)),
        lambda: path.write_bytes(pickle.dumps([os.mkdir.__module__, "other", Evil(trace)], protocol)),
    ]
    if protocol >= 2:
        writers += [
            lambda zipped=zipped: torch.save(
                tensors, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped
            )
            for zipped in (True, False)
        ]
    for write in writers:
        write()
        refused(path, "would run posix.mkdir", "never run", "mask.pt")
        assert not trace.exists()
    pickle.loads(pickle.dumps(Evil(trace)))
    assert trace.exists()  # So the file was dangerous.


@pytest.mark.filterwarnings("error")
def test_pickled_modules_and_arrays_are_refused_by_their_classes(tmp_path):
    path = tmp_path / "mlm_head.bin"
    for zipped in (True, False):
        torch.save(nn.Sequential(nn.Linear(2, 2)), path, _use_new_zipfile_serialization=zipped)
        refused(path, "torch.nn.modules.container.Sequential", "give a file with one 0/1 matrix per weight")
    torch.save({"a.weight_mask": numpy.ones((2, 2))}, path)
    refused(path, "numpy._core.multiarray._reconstruct")
    numpy.savez(tmp_path / "objects.npz", **{"a.mask": numpy.array([Evil(tmp_path / "trace")], dtype=object)})
    refused(tmp_path / "objects.npz", "pickled objects")
    torch.save({"a.weight": torch.ones(2, 2).bool()}, path, pickle_protocol=4)
    refused(path, "default protocol")
    assert not (tmp_path / "trace").exists()


def test_no_name_in_a_file_reaches_the_terminal_as_it_is(tmp_path):
    (tmp_path / "m.pt").write_bytes(b"c\x1b[31mos\nsys tem\n.")
    refused(tmp_path / "m.pt", "would run ??31mos.sys.tem,")
    for name in ("\x1b[31m", "\n.weight_mask"):
        torch.save({name: torch.zeros(2)}, tmp_path / "m.pt")
        refused(tmp_path / "m.pt", ascii(name))


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    path = tmp_path / "mask.pt"
    for zipped in (True, False):
        torch.save(dict(MASK), path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for length in range(0, len(whole), 37):
            path.write_bytes(whole[:length])
            refused(path, "is empty" if length == 0 else "truncated")
    archive = packed(tmp_path, MASK)
    whole = archive.read_bytes()
    for length in range(1, len(whole), 37):
        archive.write_bytes(whole[:length])
        refused(archive)


def test_damaged_bytes_are_refused_or_give_a_mask(tmp_path):
    """Whatever a library raises for them, the user sees a sentence."""
    draw, path = random.Random(0), tmp_path / "mask.pt"
    for name in ("zip", "legacy", "npz"):
        if name == "npz":
            path = packed(tmp_path, MASK)
        else:
            torch.save(dict(MASK), path, _use_new_zipfile_serialization=name == "zip")
        whole = path.read_bytes()
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(draw.choice((1, 4))):
                damaged[draw.randrange(len(whole))] = draw.randrange(256)
            path.write_bytes(damaged)
            with contextlib.suppress(UserError):
                Mask(read_foreign(path, SHAPES).matrices)


def test_what_is_no_mask_is_refused_with_what_it_is(tmp_path):
    path = tmp_path / "file"
    refused(path, "there is no file")
    refused(tmp_path, "there is no file")
    for content in (b"", b"hello", b'{"a": 1}', b"\0" * 100, bytes(range(256)), b"(((((", b"PK\3\4 no archive"):
        path.write_bytes(content)
        refused(path, "no mask file" if content and content[:2] != b"PK" else "copy it again")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(path, "archive without tensors")
    numpy.save(tmp_path / "head_mask.npy", numpy.ones((12, 12), numpy.float32))
    refused(tmp_path / "head_mask.npy", "one array [12, 12]", "masks of heads and FFN units")
    save_mask(tmp_path / "mask.safetensors", MASK)
    refused(tmp_path / "mask.safetensors", "safetensors", f"finemask mask show {tmp_path / 'mask.safetensors'}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.ones(12, 12), ("one array [12, 12]",)),
        ([torch.ones(2, 2)], ("holds a list",)),
        ({}, ("no tensors by name (nothing)",)),
        ({"state": {"x.weight": {"mask": torch.ones(2, 2)}}, "epoch": 3}, ("no tensors by name (only state, epoch)",)),
        (Attention().state_dict(), ("query.weight, query.bias, out.weight and 3 more", "no masks, as dense weights")),
        ({"x.weight": torch.randn(2, 2)}, ("no masks, as dense weights",)),
        ({"x.weight_orig": torch.randn(2, 2)}, ("X.weight_orig", "without their masks")),
        ({"x.weight_mask": torch.ones(2, 2), "y.weight_orig": torch.ones(2, 2)}, ("no masks beside", "y.weight_orig")),
        ({"x.weight": torch.randn(2, 2), "x.mask_scores": torch.randn(2, 2)}, ("scores",)),
        ({"x.weight.mask": torch.ones(2, 2), "x.mask": torch.ones(2, 2)}, ("second mask",)),
        ({"x.weight_mask": torch.tensor([[0.0, 0.5]])}, ("x.weight_mask holds 0.5", "0 and 1 alone")),
        ({"x.weight_mask": torch.tensor([[1.0, float("nan")]])}, ("x.weight_mask holds nan",)),
        ({"x.weight_mask": torch.tensor([[1.0, -1.0]]).double()}, ("x.weight_mask holds -1",)),
        ({"x.weight": torch.tensor([[1, 2]])}, ("x.weight holds 2",)),
        ({"x.weight": torch.tensor([[0, 2]], dtype=torch.uint8).view(torch.bool)}, ("x.weight holds 2",)),
        ({"x.weight_mask": torch.ones(4)}, ("x.weight_mask is [4], no plain matrix",)),
        ({"x.weight_mask": torch.eye(4).to_sparse()}, ("x.weight_mask is [4, 4], no plain matrix",)),
        ({"x.weight_mask": torch.ones(2, 2, device="meta")}, ("no plain matrix",)),
        ({"x.weight": torch.eye(2).bool(), "y.weight": torch.zeros(2, 2).bool()}, ("keeps no weight of y.weight:",)),
        ({f"{i}.weight": torch.zeros(2, 2).bool() for i in range(5)}, ("0.weight, 1.weight, 2.weight and 2 more",)),
        ({"x.weight": torch.ones(0, 2).bool()}, ("keeps no weight of x.weight",)),
    ],
)  # fmt: skip
def test_content_that_is_no_mask_of_weights_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "mask.pt")
    refused(tmp_path / "mask.pt", *words)


def test_an_export_for_tamt_comes_back_equal_and_is_its_flat_dict(tmp_path):
    write_tamt(tmp_path / "mask.pt", MASK)
    plain = torch.load(tmp_path / "mask.pt", weights_only=True)
    assert list(plain) == list(MASK)
    assert all(type(plain) is dict and torch.equal(keep, MASK[name]) for name, keep in plain.items())
    foreign = read_foreign(tmp_path / "mask.pt", {})
    assert foreign.format == "TAMT (bool X.weight)"
    assert kept(foreign).fingerprint() == MASK.fingerprint()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_export_for_prune_comes_back_equal_and_loads_where_prune_was_applied(tmp_path, dtype):
    torch.manual_seed(0)
    model, pruned = Attention().to(dtype), Attention().to(dtype)
    mask = Mask.random({"query.weight": (8, 8), "out.weight": (4, 8)}, 0.5, seed=0)
    write_prune(tmp_path / "model.pt", mask, model.state_dict())
    assert kept(read_foreign(tmp_path / "model.pt", {})).fingerprint() == mask.fingerprint()
    prune.identity(pruned.query, "weight")
    prune.custom_from_mask(pruned.out, "weight", torch.ones(4, 8))
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    pruned.load_state_dict(state, strict=True)
    assert {name: value.dtype for name, value in state.items()} == {
        name: value.dtype for name, value in pruned.state_dict().items()
    }
    for name in ("query", "out"):
        getattr(pruned, name)(torch.ones(1, 8, dtype=dtype))
        prune.remove(getattr(pruned, name), "weight")
        assert torch.equal(getattr(pruned, name).weight, getattr(model, name).weight * mask[f"{name}.weight"])


def test_an_export_for_prune_fits_its_weights_and_nothing_is_written_over(tmp_path):
    path = tmp_path / "mask.pt"
    with pytest.raises(UserError, match=r"has what the model has not, bert\.e"):
        write_prune(path, MASK, Attention().state_dict())
    assert not path.exists()
    path.write_text("mine")
    weights = {name: keep.float() for name, keep in MASK.items()}
    for write in (
        lambda: write_tamt(path, MASK),
        lambda: write_prune(path, MASK, weights),
    ):
        with pytest.raises(UserError, match=re.escape(f"{path} exists and is not written over; type another --out")):
            write()
    assert path.read_text() == "mine"
    assert os.listdir(tmp_path) == ["mask.pt"]
