"""A mask counts exactly, cannot be changed and is random only where it should be."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finemask_ds.errors import UserError
from finemask_ds.masks.mask import Mask
from finemask_ds.masks.select import num_kept

SHAPES = st.dictionaries(
    st.text("ab.é", min_size=1, max_size=4),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    min_size=1,
    max_size=4,
)
SPARSITIES = st.floats(0, 1, exclude_max=True)
TWO = {"a": (3, 5), "b": (2, 16)}


def kept_set(mask: Mask) -> set[tuple[str, int]]:
    return {(name, int(index)) for name, keep in mask.items() for index in keep.flatten().nonzero()}


@given(SHAPES, SPARSITIES, st.integers(0, 3))
def test_what_goes_in_comes_out(shapes, sparsity, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.rand(shape, generator=generator) >= sparsity for name, shape in shapes.items()}
    mask = Mask(tensors, {"seed": seed})
    assert list(mask) == list(tensors)
    assert mask.shapes == shapes
    assert mask.provenance == {"seed": seed}
    for name, keep in tensors.items():
        assert torch.equal(mask[name], keep)
        assert mask[name].dtype == torch.bool
        assert mask[name].is_contiguous()
        assert mask.num_kept(name) == int(keep.sum())
        assert mask.sparsity(name) == int((~keep).sum()) / keep.numel()
    total = sum(keep.numel() for keep in tensors.values())
    pruned = sum(int((~keep).sum()) for keep in tensors.values())
    assert (mask.num_weights(), mask.num_kept(), mask.sparsity()) == (total, total - pruned, pruned / total)


def test_neither_the_source_nor_a_look_up_changes_it():
    source = torch.ones(3, 5, dtype=torch.bool)
    mask = Mask({"a": source}, provenance := {"list": [1]})
    source.fill_(False)
    mask["a"].fill_(False)
    provenance["list"].append(2)
    mask.provenance["list"].append(3)
    assert mask == Mask.full_like({"a": (3, 5)})
    assert mask.provenance == {"list": [1]}
    with pytest.raises(ValueError, match="read-only"):
        mask.bits("a")[0] = 0
    with pytest.raises(TypeError):
        mask["a"] = source  # type: ignore[index]


def test_bits_are_little_endian_and_each_row_starts_a_byte():
    keep = torch.zeros(2, 9, dtype=torch.bool)
    keep[0, 0] = keep[0, 8] = keep[1, 1] = keep[1, 7] = True
    mask = Mask({"a": keep})
    assert mask.bits("a").tolist() == [[0b00000001, 1], [0b10000010, 0]]
    assert Mask.from_bits({"a": mask.bits("a")}, {"a": (2, 9)}) == mask


@pytest.mark.parametrize(
    ("bits", "shape"),
    [
        (numpy.zeros((2, 2), numpy.uint8), (2, 8)),
        (numpy.zeros((2, 2), numpy.uint8), (3, 9)),
        (numpy.zeros((2, 2), numpy.int8), (2, 9)),
        (numpy.full((2, 2), 2, numpy.uint8), (2, 9)),
    ],
    ids=["too many columns", "too few rows", "dtype", "bit beyond the row"],
)
def test_bits_that_do_not_fit_are_refused(bits, shape):
    with pytest.raises(ValueError, match="a: "):
        Mask.from_bits({"a": bits}, {"a": shape})


def test_what_is_no_mask_is_refused():
    with pytest.raises(TypeError, match="a: a mask is bool"):
        Mask({"a": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="a: a mask is a matrix"):
        Mask({"a": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="a: a mask is a matrix"):
        Mask({"a": torch.ones(2, 0, dtype=torch.bool)})
    with pytest.raises(ValueError, match="at least one"):
        Mask({})
    with pytest.raises(TypeError):
        Mask({"a": torch.ones(2, 2, dtype=torch.bool)}, {"when": object()})


def test_equality_is_of_names_and_bits():
    keep = {"a": torch.eye(3, dtype=torch.bool), "b": torch.ones(2, 2, dtype=torch.bool)}
    mask = Mask(keep)
    same = Mask(dict(reversed(keep.items())), {"from": "elsewhere"})
    assert mask == same
    assert hash(mask) == hash(same)
    assert mask.fingerprint() == same.fingerprint()
    assert mask == mask.with_provenance({"x": 1})
    other_bit = Mask({**keep, "a": ~keep["a"]})
    other_name = Mask({"a": keep["a"], "c": keep["b"]})
    wider = Mask({"a": keep["a"], "b": torch.tensor([[True, True, False]] * 2)})  # the same bytes as b
    assert wider.bits("b").tolist() == mask.bits("b").tolist()
    for other in (other_bit, other_name, wider, Mask({"a": keep["a"]})):
        assert mask != other
        assert mask.fingerprint() != other.fingerprint()
    assert mask != keep


@given(SPARSITIES, SPARSITIES)
def test_jaccard_is_that_of_the_sets_of_kept_weights(one, two):
    first, second = Mask.random(TWO, one, seed=1), Mask.random(TWO, two, seed=2)
    a, b = kept_set(first), kept_set(second)
    similarity = len(a & b) / len(a | b) if a | b else 1.0
    assert first.jaccard(second) == second.jaccard(first) == similarity
    assert first.distance(second) == 1 - similarity
    each = [first.jaccard(second, name) for name in TWO]
    for name, value in zip(TWO, each, strict=True):
        x, y = ({pair for pair in kept if pair[0] == name} for kept in (a, b))
        assert value == (len(x & y) / len(x | y) if x | y else 1.0)
    assert first.mean_jaccard(second) == sum(each) / 2
    assert first.jaccard(first) == 1.0


def test_check_says_which_tensors_do_not_fit():
    mask = Mask.full_like({"a": (3, 5), "b": (2, 16), **{f"x{i}": (1, 1) for i in range(5)}})
    mask.check(mask.shapes)
    with pytest.raises(UserError) as error:
        mask.check({"a": (3, 5), "b": (16, 2), "c": (4, 4)})
    sentence = str(error.value)
    assert "another model" in sentence
    assert "lacks c" in sentence
    assert "x0, x1, x2 and 2 more" in sentence
    assert "b (2 x 16, there 16 x 2)" in sentence
    assert "a (" not in sentence


@given(SHAPES, SPARSITIES, st.integers(0, 5))
def test_random_counts_are_exact(shapes, sparsity, seed):
    mask = Mask.random(shapes, sparsity, seed)
    for name, (rows, columns) in shapes.items():
        assert mask.num_kept(name) == num_kept(rows * columns, sparsity)
    everywhere = Mask.random(shapes, sparsity, seed, scope="global")
    assert everywhere.num_kept() == num_kept(mask.num_weights(), sparsity)


def test_a_random_matrix_follows_from_seed_and_name_alone():
    mask = Mask.random({"a": (30, 50), "b": (30, 50)}, 0.7, seed=1)
    alone = Mask.random({"b": (30, 50)}, 0.7, seed=1)
    assert torch.equal(mask["b"], alone["b"])
    assert not torch.equal(mask["a"], mask["b"])
    assert not torch.equal(alone["b"], Mask.random({"b": (30, 50)}, 0.7, seed=2)["b"])


def test_a_random_mask_is_the_same_on_every_machine():
    mask = Mask.random({"a": (30, 50), "b": (3, 5)}, 0.7, seed=1)
    assert mask.fingerprint() == "85fdac2c5ccc3d60e58723c47befe0f92876d6371ca8affdf1ce72a4c22819a7"


def test_random_positions_are_spread_evenly():
    """Of 90,000 weights 30 % stay in every row, column and global share within five standard deviations."""
    mask = Mask.random({"a": (300, 300), "b": (300, 300)}, 0.7, seed=0, scope="global")
    for name in mask:
        keep = mask[name].float()
        deviation = (0.3 * 0.7 / 300) ** 0.5
        assert (keep.mean(0) - 0.3).abs().max() < 5 * deviation
        assert (keep.mean(1) - 0.3).abs().max() < 5 * deviation
        assert abs(keep.mean().item() - 0.3) < 5 * deviation / 300**0.5
