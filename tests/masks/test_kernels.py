"""The Triton kernels against plain torch and ``masks.select``, bit for bit.

On a GPU they run there, elsewhere in Triton's interpreter. That takes milliseconds for a block: cases share calls.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from finemask_ds.masks.matrices import PASSES, Matrices, Matrix, score_gradient
from finemask_ds.masks.select import num_kept, select, select_one

BLOCK = 16
SIZES = (0, 1, 2, 15, 16, 17, 32, 35, 50)
SCORES = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf])
LISTS = st.lists(st.lists(SCORES, max_size=20), min_size=1, max_size=5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

KINDS = {
    "normal": lambda normal: normal,
    "learnt": lambda normal: normal * 0.001 + 0.01,
    "few values": lambda normal: normal.round(),
    "constant": lambda normal: torch.full_like(normal, -0.25),
    "zeros": lambda normal: torch.where(normal > 0, 0.0, -0.0),
    "denormal": lambda normal: normal * 1e-42,
    "wide": lambda normal: normal * 10.0 ** (normal * 15),
    "infinities": lambda normal: torch.where(normal.abs() > 0.6, normal.sign() * math.inf, normal),
}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("needs an accelerator" if request.param == "cuda" else "the kernels run on the accelerator")
    return request.param


def normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def cases() -> list[tuple[Tensor, int]]:
    """Scores of every kind and of sizes around the block's, with k at both ends and between."""
    found = [(normal(20, 0), 0)]
    for kind in KINDS.values():
        for part in range(4):
            n = SIZES[len(found) % len(SIZES)]
            found.append((kind(normal(n, len(found))), max((min(n, 1), n // 3, n - 1, n)[part], 0)))
    return found


def expected(scores: Tensor, k: int) -> float:
    return scores.flatten().sort(descending=True).values[k - 1].item() if k else math.inf


def found(device: str, rows: list[tuple[Tensor, int]], near: Tensor) -> tuple[Tensor, Tensor]:
    """Thresholds and passes of rows of one matrix each."""
    matrices = Matrices([Matrix(scores.to(device)) for scores, _ in rows], block=BLOCK)
    thresholds = matrices.kth_largest(torch.tensor([k for _, k in rows], device=device), near.to(device))
    return thresholds.cpu(), matrices.passes.cpu()


@pytest.mark.parametrize("guess", ["right", "zero", "wild"])
def test_the_kth_largest_of_all_kinds_whatever_the_guess(device: str, guess: str) -> None:
    rows = cases()
    right = torch.tensor([expected(scores, k) for scores, k in rows])
    wild = KINDS["wide"](normal(len(rows), 1))
    wild[::4], wild[1::4], wild[2::8] = math.inf, -math.inf, math.nan
    near = {"right": right, "zero": torch.zeros(len(rows)), "wild": wild}[guess]
    thresholds, passes = found(device, rows, near)
    assert thresholds.tolist() == right.tolist() == [select_one(scores, k).threshold for scores, k in rows]
    assert not thresholds[thresholds == 0].signbit().any()
    limit = 1 if guess == "right" else PASSES
    assert all(number <= (limit if k else 0) for number, (_, k) in zip(passes.tolist(), rows, strict=True))


@settings(max_examples=12, deadline=None)
@given(LISTS, st.sampled_from([0.0, 0.1, 0.5, 0.7, 0.97]), st.sampled_from(["local", "global"]), SCORES)
def test_selection_in_matrices_of_any_scores_and_sizes(
    device: str, lists: list[list[float]], sparsity: float, scope: str, guess: float
) -> None:
    scores = {str(number): torch.tensor(values, dtype=torch.float32) for number, values in enumerate(lists)}
    on_device = [values.to(device) for values in scores.values()]
    matrices = [Matrix(values, torch.empty_like(values, dtype=torch.bool)) for values in on_device]
    rows = [len(values) for values in lists] if scope == "local" else [sum(map(len, lists))]
    k = torch.tensor([num_kept(n, sparsity) for n in rows], device=device)
    together = Matrices(matrices, scope, block=8)
    thresholds = together.kth_largest(k, torch.full(k.shape, guess, device=device))
    counts = together.refresh(thresholds)
    of_matrices = thresholds.expand(len(lists)).tolist()
    chosen = select(scores, sparsity, scope).values()
    assert of_matrices == [selection.threshold for selection in chosen]
    for (values, mask, *_), selection, phi, count in zip(matrices, chosen, of_matrices, counts.tolist(), strict=True):
        assert torch.equal(mask, values >= phi)
        assert count == int(mask.sum()) >= int(selection.mask.sum())
        assert not (selection.mask & ~mask.cpu()).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_near_guess_costs_few_passes(device: str, sign: int) -> None:
    """The distances are in representable numbers, to either side."""
    scores = sign * (normal(40, 0).abs() + 0.5)
    right = expected(scores, 12)
    distances = torch.tensor([0, 1, -1, 64, -64, 4_096, -4_096, 262_144, -262_144], dtype=torch.int32)
    near = (torch.full((len(distances),), right).view(torch.int32) + distances).view(torch.float32)
    thresholds, passes = found(device, [(scores, 12)] * len(near), near)
    assert thresholds.tolist() == [right] * len(near)
    assert passes.tolist() == [1, 1, 1, 2, 2, 3, 3, 4, 4]


def test_scores_that_a_step_of_the_optimizer_moved_are_read_at_most_four_times(device: str) -> None:
    """Scores near phi = 0.01 at TAMT's rate of 5e-5, in blocks of the size that is used."""
    before = normal(3_000, 0) * 0.005 + 0.01
    after = before + 5e-5 * normal(3_000, 1).clamp(-1, 1)
    scores, k = before.to(device, copy=True), torch.tensor([900], device=device)
    matrices = Matrices([Matrix(scores)])
    first = matrices.kth_largest(k, torch.zeros(1, device=device))
    scores.copy_(after)
    second = matrices.kth_largest(k, first)
    assert (first.tolist(), second.tolist()) == ([expected(before, 900)], [expected(after, 900)])
    assert matrices.passes.item() in (2, 3, 4)


@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in DTYPES), DTYPES])
@pytest.mark.parametrize(("offset", "sizes"), [(3, (50, 17, 16, 15, 0)), (16, (64, 16, 32, 48, 16))])
def test_refresh_writes_the_products_bit_by_bit_and_nothing_beside(
    device: str, dtypes: tuple[torch.dtype, ...], offset: int, sizes: tuple[int, ...]
) -> None:
    """Of matrices that lie inside larger buffers, on addresses that allow 16 bytes at once and on others."""
    special = torch.tensor([-1.0, 2.0, -0.0, math.inf, -math.inf, math.nan, 1e-6])
    thresholds = [0.0, -math.inf, math.inf, 0.5, -0.0]
    buffers, copies = [], []
    for number, n in enumerate(sizes):
        scores = KINDS["infinities"](normal(n + 2 * offset, number).mul(2).round().div(4))
        weight = special.repeat(len(scores))[: len(scores)].to(dtypes[number % len(dtypes)])
        buffers.append([scores, torch.ones(len(scores), dtype=torch.bool), weight, torch.full_like(weight, 7.0)])
        copies.append([tensor.to(device, copy=True) for tensor in buffers[-1]])
    inner = [slice(offset, offset + n) for n in sizes]
    matrices = [Matrix(*(tensor[at] for tensor in copy)) for copy, at in zip(copies, inner, strict=True)]
    counts = Matrices(matrices, block=BLOCK).refresh(torch.tensor(thresholds, device=device))
    for buffer, copy, at, threshold, count in zip(buffers, copies, inner, thresholds, counts.tolist(), strict=True):
        scores, mask, weight, product = buffer
        mask[at] = scores[at] >= threshold
        product[at] = torch.where(mask[at], weight[at], 0.0)
        assert count == int(mask[at].sum())
        for before, after in zip(buffer, copy, strict=True):
            assert torch.equal(after.cpu().view(torch.uint8), before.view(torch.uint8))


def test_refresh_leaves_out_what_is_none(device: str) -> None:
    scores = normal(20, 0).to(device)
    mask = torch.empty(20, dtype=torch.bool, device=device)
    weight, product = torch.ones(20, device=device), torch.empty(20, device=device)
    matrices = Matrices([Matrix(scores), Matrix(scores, mask), Matrix(scores, None, weight, product)], block=BLOCK)
    counts = matrices.refresh(torch.tensor([0.0, 0.5, 1.0], device=device))
    assert counts.tolist() == [int((scores >= phi).sum()) for phi in (0.0, 0.5, 1.0)]
    assert torch.equal(mask, scores >= 0.5)
    assert torch.equal(product, (scores >= 1.0).float())


def test_a_backward_pass_notices_that_its_product_was_renewed(device: str) -> None:
    scores, weight = normal(16, 0).to(device), normal(16, 1).to(device)
    product, x = torch.zeros(16, device=device), torch.ones(16, device=device, requires_grad=True)
    matrices = Matrices([Matrix(scores, None, weight, product)], block=BLOCK)
    loss = (x * product).sum()
    matrices.refresh(torch.zeros(1, device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_the_scores_is_torch_s_whatever_its_strides(device: str, dtype: torch.dtype) -> None:
    rows, columns = 70, 65
    weight = normal(rows * columns, 0).view(rows, columns)
    weight[3, :8] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 65_504.0, -3e-6, 1e-38])
    if dtype == torch.bfloat16 and device == "cpu":
        weight[3, 7] = 0  # Triton 3.9's interpreter takes wrong bits from denormal bf16 numbers.
    gradient = (weight.flatten().roll(100) * 1e-2).to(dtype)
    weight = weight.to(dtype)
    for strided in (
        gradient.view(rows, columns),
        gradient.view(columns, rows).T,
        gradient[:columns].expand(rows, columns),
        gradient.repeat(4).view(rows, 4 * columns)[:, ::4],
    ):
        result, plain = score_gradient(strided.to(device), weight.to(device)).cpu(), strided.float() * weight.float()
        assert torch.equal(result.isnan(), plain.isnan())
        assert torch.equal(result.nan_to_num().view(torch.int32), plain.nan_to_num().view(torch.int32))


def test_what_is_not_as_said_is_refused(device: str) -> None:
    scores, mask = torch.zeros(4, 3, device=device), torch.zeros(4, 3, dtype=torch.bool, device=device)
    for wrong in (
        Matrix(scores.double()),
        Matrix(scores.T),
        Matrix(scores, mask.byte()),
        Matrix(scores, mask[:2]),
        Matrix(scores, mask, None, scores),
        Matrix(scores, mask, scores.half(), scores),
        Matrix(scores, mask, scores.double(), scores.double()),
    ):
        with pytest.raises(ValueError, match="need"):
            Matrices([Matrix(scores), wrong])
    for some, scope in (([], "local"), ([Matrix(scores)], "layer")):
        with pytest.raises(ValueError, match=f"{len(some)} matrices with scope '{scope}'"):
            Matrices(some, scope)
    together = Matrices([Matrix(scores), Matrix(scores)], "global")
    k, near = torch.tensor([1], device=device), torch.zeros(1, device=device)
    for ks, nears in ((k.int(), near), (k, near.double()), (k.repeat(2), near), (k, near.repeat(2))):
        with pytest.raises(ValueError, match="need a contiguous"):
            together.kth_largest(ks, nears)
    with pytest.raises(ValueError, match="need a contiguous"):
        Matrices([Matrix(scores)] * 2).refresh(near.expand(2))
    with pytest.raises(ValueError, match="equal"):
        score_gradient(scores, scores[:2])


def test_a_tensor_that_moved_is_noticed(device: str) -> None:
    scores = torch.nn.Parameter(torch.zeros(4, device=device))
    matrices = Matrices([Matrix(scores)], block=BLOCK)
    scores.data = torch.ones(4, device=device)
    with pytest.raises(RuntimeError, match="moved"):
        matrices.refresh(torch.zeros(1, device=device))


@pytest.mark.gpu
def test_matrices_of_real_sizes_without_waiting_for_the_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an accelerator")
    scores = [0.01 + 0.001 * torch.randn(n, 768, device="cuda") for n in (30_522, 768, 769, 3_072)]
    masks, weights = [values > 0 for values in scores], [values.half() for values in scores]
    products = [torch.empty_like(weight) for weight in weights]
    matrices = [Matrix(*tensors) for tensors in zip(scores, masks, weights, products, strict=True)]
    together = Matrices(matrices)
    k, near = torch.tensor([num_kept(values.numel(), 0.7) for values in scores]).cuda(), torch.full((4,), 0.01).cuda()
    for mode in ("default", "error"):  # The first time Triton compiles.
        torch.cuda.set_sync_debug_mode(mode)
        try:
            thresholds = together.kth_largest(k, near)
            counts = together.refresh(thresholds)
            score_gradient(scores[0], weights[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert thresholds.tolist() == [expected(values, number) for values, number in zip(scores, k.tolist(), strict=True)]
    for (values, mask, weight, product), threshold, count in zip(matrices, thresholds, counts, strict=True):
        assert torch.equal(mask, values >= threshold)
        assert torch.equal(product, torch.where(mask, weight, 0.0))
        assert int(count) == int(mask.sum())


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from finemask_ds.masks import kernels

def compile(kernel, types, warps, is_wide, **constants):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict.fromkeys(constants, "constexpr") | dict(zip(names, types.split(), strict=True))
    divisible = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names}
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, divisible)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
    assert ".ftz" not in code, f"{kernel} takes denormal numbers for zero"
    assert ("ld.global.v4" in code) == is_wide, f"{kernel} reads 16 bytes at once: {not is_wide}"

for aligned in (True, False):
    count, refresh = "*i64 " * 3 + "*fp32 *fp32 *fp32 *i64", "*i64 " * 7 + "*fp32 *i64"
    compile(kernels.count_block, count, 8, aligned, levels=6, block=4096, aligned=aligned)
    compile(kernels.refresh_block, refresh, 8, aligned, block=4096, aligned=aligned)
compile(kernels.surround, "*i64 *fp32 *fp32 *fp32", 1, False, parts=64)
compile(kernels.narrow, "*fp32 *fp32 *fp32 *i64 *i64 *i64", 1, False, parts=64)
compile(kernels.multiply_tile, "*bf16 *bf16 *fp32 i32 i32 i32", 4, True, column_stride=1, tile=64)
compile(kernels.multiply_tile, "*fp16 *fp16 *fp32 i32 i32 i32", 4, True, row_stride=1, tile=64)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_an_h200_without_one(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)
