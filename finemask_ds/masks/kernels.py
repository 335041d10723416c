"""Triton kernels over many matrices at once, launched by ``masks.matrices``.

A launch covers all matrices: tables on the device hold the address of each tensor, and each program works on one item,
a block of one matrix. Scores are compared as fp32 numbers, denormal ones too, so -0.0 equals 0.0.

Legend:
    items: int64 [items, 3]: matrix, first element of the block, length of the block.
    addresses (scores, masks, ...): int64 [matrices], 0 for a tensor that is not there.
    row: what is ranked together, one matrix or all of them.
    block: elements of a whole block.
    aligned: addresses, blocks and sizes are multiples of 16, so that 16 bytes may be read and written at once.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

INFINITE = tl.constexpr(0x7F800000)
"""The key of +inf; that of -inf is its negative."""


@triton.jit
def refresh_block(
    items, rows, scores, masks, weights, products, widths, thresholds, counts,
    block: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """Write a block's mask and product, and add its kept scores to its matrix's count (int64 [matrices])."""
    matrix, start, exists = _block(items, block, aligned)
    score = tl.load(_places(scores, matrix, start, tl.float32, block, aligned), mask=exists, other=0.0)
    kept = exists & (score >= tl.load(thresholds + tl.load(rows + matrix)))
    tl.atomic_add(counts + matrix, tl.sum(kept.to(tl.int32), 0).to(tl.int64), sem="relaxed")
    if tl.load(masks + matrix) != 0:
        tl.store(_places(masks, matrix, start, tl.int8, block, aligned), kept.to(tl.int8), mask=exists)
    width = tl.load(widths + matrix)
    if width == 2:
        _copy_kept(weights, products, matrix, start, exists, kept, tl.int16, block, aligned)
    if width == 4:
        _copy_kept(weights, products, matrix, start, exists, kept, tl.int32, block, aligned)


@triton.jit
def surround(k, near, low, probes, parts: tl.constexpr):
    """Write a row's first probes: the guess in the middle, and keys at distances of 1, 2, 4, ... to either side."""
    row = tl.program_id(0)
    if tl.load(k + row) == 0:
        tl.store(low + row, float("inf"))  # Where high is: there is nothing to search.
    part = tl.arange(0, parts)
    away = part - parts // 2
    distance = tl.full([parts], 1, tl.int64) << tl.maximum(tl.abs(away) - 1, 0).to(tl.int64)
    step = tl.where(away < 0, -distance, tl.where(away == 0, 0, distance))
    key = tl.minimum(tl.maximum(_key(tl.load(near + row)) + step, -INFINITE), INFINITE)
    tl.store(probes + row * parts + part, _value(tl.where(part == 0, -INFINITE, key)))


@triton.jit
def count_block(
    items, rows, scores, low, high, probes, counts,
    levels: tl.constexpr, block: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """Add to a row's counts (int64 [rows, 2 ** levels]) how many of a block's scores are in each part.

    Part p reaches from probe p to below probe p + 1, the last one to the row's high. Part 0 is not counted: that it
    reaches far enough down is known, and so it takes the scores that do not count.
    """
    parts: tl.constexpr = 1 << levels
    matrix, start, exists = _block(items, block, aligned)
    row = tl.load(rows + matrix)
    lowest, highest = tl.load(low + row), tl.load(high + row)
    if lowest == highest:
        return
    score = tl.load(_places(scores, matrix, start, tl.float32, block, aligned), mask=exists, other=-float("inf"))
    score = tl.where(score > highest, -float("inf"), score)
    if tl.max(score, 0) < lowest:
        return
    place = tl.arange(0, parts)
    probe = tl.load(probes + row * parts + place)
    part = tl.zeros([block], tl.int32)
    for level in tl.static_range(1, levels + 1):
        half = parts >> level
        part += tl.where(score >= tl.gather(probe, part + half, 0), half, 0)
    counted = tl.histogram(part, parts).to(tl.int64)
    tl.atomic_add(counts + row * parts + place, counted, mask=(place > 0) & (counted > 0), sem="relaxed")


@triton.jit
def narrow(low, high, probes, counts, left, passes, parts: tl.constexpr):
    """Narrow low to high, of a row, to the part with the ``left``-th largest score in it; write evenly spaced probes.

    To be launched with one warp: of several, one could overwrite what another has yet to read.
    """
    row = tl.program_id(0)
    lowest, highest = tl.load(low + row), tl.load(high + row)
    if lowest == highest:
        return
    part = tl.arange(0, parts)
    places = row * parts + part
    wanted = tl.load(left + row)
    key = _key(tl.load(probes + places))
    reached = tl.cumsum(tl.load(counts + places), 0, reverse=True)
    enough = (part == 0) | (reached >= wanted)
    first = tl.max(tl.where(enough, key, -INFINITE), 0)
    last = tl.minimum(_key(highest), tl.min(tl.where(enough, INFINITE, key - 1), 0))
    tl.store(low + row, _value(first))
    tl.store(high + row, _value(last))
    tl.store(left + row, wanted - tl.max(tl.where(enough, 0, reached), 0))
    tl.store(passes + row, tl.load(passes + row) + 1)
    tl.store(counts + places, tl.zeros([parts], tl.int64))
    tl.store(probes + places, _value(tl.minimum(first + part * ((last - first) // parts + 1), last)))


@triton.jit
def multiply_tile(gradient, weight, product, rows, columns, row_stride, column_stride, tile: tl.constexpr):
    """Write a square of gradient * weight in fp32; a square, so that a transposed gradient is read in memory order."""
    row = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)[:, None]
    column = tl.program_id(1).to(tl.int64) * tile + tl.arange(0, tile)[None, :]
    exists = (row < rows) & (column < columns)
    left = tl.load(gradient + row * row_stride + column * column_stride, mask=exists, other=0.0)
    right = tl.load(weight + row * columns + column, mask=exists, other=0.0)
    tl.store(product + row * columns + column, left.to(tl.float32) * right.to(tl.float32), mask=exists)


@triton.jit
def _block(items, block: tl.constexpr, aligned: tl.constexpr):
    """This program's matrix, the first element of its block, and bool [block]: which elements there are."""
    item = items + 3 * tl.program_id(0)
    length = tl.load(item + 2).to(tl.int32)
    if aligned:
        length = tl.multiple_of(length, 16)
    return tl.load(item), tl.load(item + 1), tl.arange(0, block) < length


@triton.jit
def _places(addresses, matrix, start, dtype: tl.constexpr, block: tl.constexpr, aligned: tl.constexpr):
    """Pointers to a block of one of the matrix's tensors."""
    first = tl.load(addresses + matrix).to(tl.pointer_type(dtype)) + start
    if aligned:
        # Said of the pointer and not of the address: a cast from an integer forgets it.
        first = tl.multiple_of(first, 16)
    return first + tl.arange(0, block)


@triton.jit
def _copy_kept(
    weights, products, matrix, start, exists, kept,
    dtype: tl.constexpr, block: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """The weight where kept, +0.0 elsewhere; as integers, so that the bits stay those of any float."""
    weight = tl.load(_places(weights, matrix, start, dtype, block, aligned), mask=exists, other=0)
    product = _places(products, matrix, start, dtype, block, aligned)
    tl.store(product, tl.where(kept, weight, 0), mask=exists)


@triton.jit
def _key(value):
    """int64 that ranks as the fp32 value: the bits of its magnitude, with its sign."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits).to(tl.int64)


@triton.jit
def _value(key):
    """The fp32 value of a key."""
    magnitude = tl.abs(key).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.where(key < 0, -magnitude, magnitude)
