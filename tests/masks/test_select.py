"""Selection against plain references: a stable sort, and torch.nn.utils.prune where nothing is tied."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import prune

from finemask_ds.errors import UserError
from finemask_ds.masks.select import magnitudes, num_kept, select, select_one, top_k_mask

SCORES = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf])
SPARSITIES = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.1, 0.5, 0.7, 0.9])


def reference(scores: Tensor, k: int) -> Tensor:
    """The first k of a stable descending sort."""
    order = sorted(range(scores.numel()), key=lambda index: -scores.flatten()[index].item())
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[:k]] = True
    return mask.view(scores.shape)


def quick_reference(scores: Tensor, k: int) -> Tensor:
    """The same through torch, for large tensors."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().sort(descending=True, stable=True).indices[:k]] = True
    return mask.view(scores.shape)


def random_matrices(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b": (40, 60), "a": (7, 9), "c": (90, 80)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def linear(weight: Tensor) -> torch.nn.Linear:
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight.data = weight.clone()
    return module


@given(st.integers(0, 10**9), SPARSITIES)
def test_num_kept_is_exact_and_complements_what_is_pruned(n, sparsity):
    assert num_kept(n, sparsity) == n - round(sparsity * n)
    assert 0 <= num_kept(n, sparsity) <= n


def test_an_exact_half_is_rounded_to_the_even_number():
    assert [num_kept(10, sparsity) for sparsity in (0.25, 0.35)] == [8, 6]  # 2.5 -> 2 pruned, 3.5 -> 4


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_sparsity_outside_its_range_is_a_user_error(sparsity):
    with pytest.raises(UserError, match=r"not in \[0, 1\).*type"):
        num_kept(100, sparsity)


@settings(max_examples=300)
@given(st.lists(SCORES, min_size=1, max_size=60), st.data())
def test_the_k_largest_and_of_equal_ones_the_first(values, data):
    scores = torch.tensor(values, dtype=torch.float32)
    k = data.draw(st.integers(0, len(values)))
    mask, threshold = select_one(scores, k)
    assert torch.equal(mask, reference(scores, k))
    assert threshold == min(scores[mask].tolist(), default=math.inf)


LARGE = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "few values": lambda rng, n: rng.integers(0, 4, n),
    "two values": lambda rng, n: rng.random(n) < 0.3,
    "constant": lambda rng, n: numpy.zeros(n),
    "ascending": lambda rng, n: numpy.arange(n),
    "descending": lambda rng, n: -numpy.arange(n),
    "periodic": lambda rng, n: numpy.arange(n) % 47,
    "heavy tails": lambda rng, n: rng.standard_cauchy(n) * 1e30,
    "infinities": lambda rng, n: numpy.where(rng.random(n) < 0.4, numpy.inf, rng.standard_normal(n)),
    "tiny": lambda rng, n: rng.standard_normal(n) * 1e-42,
}


@pytest.mark.parametrize("kind", LARGE)
def test_large_tensors_of_all_kinds(kind):
    n = 300 * 331
    scores = torch.from_numpy(LARGE[kind](numpy.random.default_rng(0), n).astype(numpy.float32)).view(300, 331)
    for k in (0, 1, 2, n // 10, n // 2, num_kept(n, 0.7), n - 1, n):
        mask, threshold = select_one(scores, k)
        assert torch.equal(mask, quick_reference(scores, k))
        assert threshold == (scores[mask].min().item() if k else math.inf)


@settings(max_examples=300)
@given(st.lists(SCORES, min_size=1, max_size=60), st.data())
def test_a_guess_of_the_threshold_changes_no_mask(values, data):
    """Whatever the guess; where it still parts the kept from the others it is the threshold, else the smallest kept."""
    scores = torch.tensor(values, dtype=torch.float32)
    k = data.draw(st.integers(1, len(values)))
    near = data.draw(SCORES | st.sampled_from(values))
    mask, threshold = select_one(scores, k, near=near)
    assert torch.equal(mask, reference(scores, k))
    still = int((scores >= near).sum()) == k
    assert threshold == (near if still else scores[mask].min().item())


@pytest.mark.parametrize("scope", ["local", "global"])
def test_scores_that_move_are_selected_as_for_the_first_time(scope):
    """Many steps, small and large, ties among them, each with the thresholds of the step before."""
    generator, scores, near, unmoved = torch.Generator().manual_seed(0), random_matrices(), None, 0
    for step in range(40):
        rate = (0.0, 1e-6, 1e-3, 1.0)[step % 4]
        for values in scores.values():
            values += rate * torch.randn(values.shape, generator=generator)
            if step % 3 == 0:
                values.copy_((values * 8).round() / 8)
        chosen, fresh = select(scores, 0.7, scope, near=near), select(scores, 0.7, scope)
        for name in scores:
            assert torch.equal(chosen[name].mask, fresh[name].mask)
        found = {name: selection.threshold for name, selection in chosen.items()}
        unmoved += found == near
        near = found
    assert 0 < unmoved < 40


@pytest.mark.parametrize("extreme", [1e6, -1e6])
def test_a_sample_that_misleads_costs_only_time(extreme):
    """The values looked at first are all far above, or far below, the answer."""
    n = 100_003
    scores = torch.randn(n, generator=torch.Generator().manual_seed(0))
    scores[:: round(n ** (1 / 3)) | 1] += extreme
    for k in (5_000, n // 2, n - 5_000):
        assert torch.equal(top_k_mask(scores, k), quick_reference(scores, k))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32])
def test_other_dtypes(dtype):
    scores = (torch.randn(101, 73, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    mask, threshold = select_one(scores, 2_000)
    assert torch.equal(mask, quick_reference(scores, 2_000))
    assert threshold == scores[mask].min().item()


def test_a_transposed_matrix_is_ranked_by_its_own_flat_index():
    scores = torch.zeros(5, 3).T
    mask = top_k_mask(scores, 6)
    assert mask.tolist() == [[True] * 5, [True] + [False] * 4, [False] * 5]


def test_a_parameter_is_left_as_it_is():
    weight = torch.nn.Parameter(torch.tensor([[-3.0, 1.0], [2.0, -0.5]]))
    assert select(magnitudes({"w": weight}), 0.5)["w"].mask.tolist() == [[True, False], [True, False]]
    assert weight.requires_grad
    assert weight.tolist() == [[-3.0, 1.0], [2.0, -0.5]]


@given(
    st.dictionaries(st.sampled_from("abcd"), st.lists(SCORES, min_size=1, max_size=20), min_size=1),
    SPARSITIES,
)
def test_global_is_local_selection_of_all_in_the_order_of_the_mapping(lists, sparsity):
    scores = {name: torch.tensor(values, dtype=torch.float32) for name, values in lists.items()}
    together = torch.cat(list(scores.values()))
    chosen = select(scores, sparsity, "global")
    assert list(chosen) == list(scores)
    expected = reference(together, num_kept(len(together), sparsity))
    assert torch.equal(torch.cat([selection.mask for selection in chosen.values()]), expected)
    smallest = min(together[expected].tolist(), default=math.inf)
    assert all(selection.threshold == smallest for selection in chosen.values())


@given(
    st.dictionaries(st.sampled_from("abcd"), st.lists(SCORES, min_size=1, max_size=20), min_size=1),
    SPARSITIES,
)
def test_local_counts_are_exact_in_each_matrix(lists, sparsity):
    scores = {name: torch.tensor(values, dtype=torch.float32) for name, values in lists.items()}
    for name, selection in select(scores, sparsity).items():
        assert int(selection.mask.sum()) == num_kept(len(lists[name]), sparsity)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7, 0.9])
def test_equals_torch_prune_where_nothing_is_tied(sparsity):
    weights = random_matrices()
    local, together = ({name: linear(weight) for name, weight in weights.items()} for _ in range(2))
    for name, selection in select(magnitudes(weights), sparsity).items():
        pruned = prune.l1_unstructured(local[name], "weight", amount=sparsity)
        assert torch.equal(selection.mask, pruned.weight_mask.bool())
    prune.global_unstructured(
        [(module, "weight") for module in together.values()],
        pruning_method=prune.L1Unstructured,
        amount=sparsity,
    )
    for name, selection in select(magnitudes(weights), sparsity, "global").items():
        assert torch.equal(selection.mask, together[name].weight_mask.bool())


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_permutation_of_untied_scores_permutes_the_mask(scope):
    scores = random_matrices()
    generator = torch.Generator().manual_seed(1)
    orders = {name: torch.randperm(value.numel(), generator=generator) for name, value in scores.items()}
    permuted = {name: scores[name].flatten()[orders[name]] for name in sorted(scores)}
    plain, moved = select(scores, 0.7, scope), select(permuted, 0.7, scope)
    for name, order in orders.items():
        assert torch.equal(moved[name].mask, plain[name].mask.flatten()[order])


def test_what_is_outside_is_never_kept_even_below_zero_and_minus_infinity():
    scores = torch.tensor([5.0, 0.0, -math.inf, 7.0, 0.0, 1.0])
    within = torch.tensor([False, True, True, False, True, True])
    kept = [select_one(scores, k, within=within).mask.nonzero().flatten().tolist() for k in range(5)]
    assert kept == [[], [5], [1, 5], [1, 4, 5], [1, 2, 4, 5]]
    with pytest.raises(ValueError, match="cannot keep 5 of 4"):
        select_one(scores, 5, within=within)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_selection_within_a_selection_is_nested_and_counts_all_weights(scope):
    """Iterative pruning: the share refers to the original count, pruned weights stay pruned."""
    scores = {name: value.abs() for name, value in random_matrices().items()}
    outer = {name: selection.mask for name, selection in select(scores, 0.3, scope).items()}
    changed = {name: value.abs() for name, value in random_matrices(seed=1).items()}
    inner = select(changed, 0.6, scope, within=outer)
    hidden = {name: torch.where(outer[name], value, -1.0) for name, value in changed.items()}
    for name, selection in select(hidden, 0.6, scope).items():
        assert torch.equal(inner[name].mask, selection.mask)
        assert inner[name].threshold == selection.threshold
        assert not (inner[name].mask & ~outer[name]).any()


@pytest.mark.parametrize("scope", ["local", "global"])
def test_nan_is_refused_wherever_it_stands(scope):
    for place in (0, 4_999, 9_999):
        scores = torch.randn(10_000)
        scores[place] = math.nan
        with pytest.raises(UserError, match="NaN"):
            select({"a": torch.ones(5), "b": scores}, 0.5, scope)


def test_nan_outside_is_of_no_account():
    scores = torch.tensor([math.nan, 1.0, 2.0])
    assert select_one(scores, 1, within=torch.tensor([False, True, True])).mask.tolist() == [
        False,
        False,
        True,
    ]


def test_an_unknown_scope_names_the_known_ones():
    with pytest.raises(UserError, match="local, global"):
        select({"a": torch.ones(3)}, 0.5, "layer")
