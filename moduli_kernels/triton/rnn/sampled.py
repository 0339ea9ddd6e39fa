"""The gradient of the hidden weight where a mask keeps few entries: da h^T over all steps, of the listed blocks and
strays."""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_blocks(total, da, before, row, column, n, pitch, size, steps, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
               DOT: tl.constexpr):
    """total + the sum over `steps` steps and all of the batch, DEPTH elements of a step at a time."""
    chunks = tl.cdiv(pitch, DEPTH)
    for i in range(0, steps * chunks):
        b = (i % chunks) * DEPTH + tl.arange(0, DEPTH)
        step = (i // chunks + tl.zeros([], tl.int64)) * size
        left = tl.load(da + step + row.to(tl.int64)[:, None] * pitch + b[None, :],
                       mask=(row < n)[:, None] & (b < pitch)[None, :], other=0.0).to(DOT)
        right = tl.load(before + step + column.to(tl.int64)[None, :] * pitch + b[:, None],
                        mask=(column < n)[None, :] & (b < pitch)[:, None], other=0.0).to(DOT)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def sampled_blocks_kernel(
    da, before, first_da, h, mask, dw, order, partners, groups, n, pitch, size, steps, VECTOR: tl.constexpr,
    SIDE: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
):
    """dw (n, n), 0 so far, at the kept entries of one of `groups` of blocks (block_layout.py). da, before: `steps`
    steps (n, pitch), each with the states it began with; first_da (n, pitch) with h. pitch, size: in units of
    VECTOR."""
    pitch, size = pitch * VECTOR, size * VECTOR
    group = groups + 3 * tl.program_id(0)
    begin, end, strip = tl.load(group), tl.load(group + 1), tl.load(group + 2)
    at = begin * SIDE + tl.arange(0, WIDTH)
    row = tl.load(order + strip * SIDE + tl.arange(0, SIDE))
    column = tl.load(partners + at, mask=at < end * SIDE, other=n)
    total = tl.zeros([SIDE, WIDTH], tl.float32)
    total = add_blocks(total, first_da, h, row, column, n, pitch, size, 1, DEPTH, PRECISION, DOT)
    total = add_blocks(total, da, before, row, column, n, pitch, size, steps, DEPTH, PRECISION, DOT)
    to = row.to(tl.int64)[:, None] * n + column[None, :]
    kept = tl.load(mask + to, mask=(row < n)[:, None] & (column < n)[None, :], other=0) != 0
    tl.store(dw + to, total.to(dw.dtype.element_ty), mask=kept)


@triton.jit
def add_strays(parts, da, before, row, column, inside, pitch, size, steps, DEPTH: tl.constexpr):
    chunks = tl.cdiv(pitch, DEPTH)
    for i in range(0, steps * chunks):
        b = (i % chunks) * DEPTH + tl.arange(0, DEPTH)
        step = (i // chunks + tl.zeros([], tl.int64)) * size
        now = inside[:, None] & (b < pitch)[None, :]
        left = tl.load(da + step + row[:, None] * pitch + b[None, :], mask=now, other=0.0).to(tl.float32)
        right = tl.load(before + step + column[:, None] * pitch + b[None, :], mask=now, other=0.0).to(tl.float32)
        parts += left * right
    return parts


@triton.jit
def sampled_strays_kernel(da, before, first_da, h, dw, strays, count, n, pitch, size, steps, VECTOR: tl.constexpr,
                          ENTRIES: tl.constexpr, DEPTH: tl.constexpr):
    """The same at the strays: where they lie in dw."""
    pitch, size = pitch * VECTOR, size * VECTOR
    at = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    inside = at < count
    to = tl.load(strays + at, mask=inside, other=0)
    row, column = to // n, to % n
    parts = tl.zeros([ENTRIES, DEPTH], tl.float32)
    parts = add_strays(parts, first_da, h, row, column, inside, pitch, size, 1, DEPTH)
    parts = add_strays(parts, da, before, row, column, inside, pitch, size, steps, DEPTH)
    tl.store(dw + to, tl.sum(parts, axis=1).to(dw.dtype.element_ty), mask=inside)
