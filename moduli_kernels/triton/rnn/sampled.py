"""The gradient of the hidden weight where a mask keeps few entries: da h^T summed over all steps, at the kept entries
alone."""
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...ops.block_layout import GROUP, BlockLayout
from ...ops.blocked_rnn import PITCH
from ..device import bytes_of, numbers_for, on_device

BLOCK_DEPTH, STRAY_ENTRIES, STRAY_DEPTH = 32, 64, 32


@triton.jit
def add_block_products(total, da, before, row, column, n, pitch, size, steps, DEPTH: tl.constexpr,
                       PRECISION: tl.constexpr, DOT: tl.constexpr):
    """Returns total plus the sum of da h^T over `steps` steps and all of the batch, DEPTH elements of a step at a time,
    for these rows and columns."""
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
    # tensors
    da, before,     # (steps, n, pitch): dL/da of each step, and the states it began with
    first_da, h,    # (n, pitch): the same for one step more
    mask,           # (n, n), bytes
    dw,             # (n, n), 0 so far
    order,          # (block rows * SIDE), the rows of W in the order of the layout
    partners,       # (blocks * SIDE), the columns of each block
    groups,         # (groups, 3), see block_layout.py
    # sizes: pitch and size, the numbers of a step, in units of VECTOR
    n, pitch, size, steps,
    # constants: SIDE rows of a block, WIDTH columns of a group, DEPTH elements of the batch at a time
    VECTOR: tl.constexpr, SIDE: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr,     # how tensor cores multiply, see device.Numbers
):
    """Stores dw at the kept entries of the blocks; a program for each group of them."""
    pitch, size = pitch * VECTOR, size * VECTOR
    group = groups + 3 * tl.program_id(0)
    begin, end, strip = tl.load(group), tl.load(group + 1), tl.load(group + 2)
    at = begin * SIDE + tl.arange(0, WIDTH)
    row = tl.load(order + strip * SIDE + tl.arange(0, SIDE))
    column = tl.load(partners + at, mask=at < end * SIDE, other=n)
    total = tl.zeros([SIDE, WIDTH], tl.float32)
    total = add_block_products(total, first_da, h, row, column, n, pitch, size, 1, DEPTH, PRECISION, DOT)
    total = add_block_products(total, da, before, row, column, n, pitch, size, steps, DEPTH, PRECISION, DOT)
    to = row.to(tl.int64)[:, None] * n + column[None, :]
    kept = tl.load(mask + to, mask=(row < n)[:, None] & (column < n)[None, :], other=0) != 0
    tl.store(dw + to, total.to(dw.dtype.element_ty), mask=kept)


@triton.jit
def add_stray_products(parts, da, before, row, column, inside, pitch, size, steps, DEPTH: tl.constexpr):
    """Returns parts (ENTRIES, DEPTH) plus the same sum for single entries; parts are added up at the end."""
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
def sampled_strays_kernel(
    # tensors, see sampled_blocks_kernel
    da, before, first_da, h, dw,
    strays,         # (count), where they stand in dw
    # sizes
    count, n, pitch, size, steps,
    # constants: ENTRIES strays of a program, DEPTH elements of the batch at a time
    VECTOR: tl.constexpr, ENTRIES: tl.constexpr, DEPTH: tl.constexpr,
):
    """Stores dw at the strays."""
    pitch, size = pitch * VECTOR, size * VECTOR
    at = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    inside = at < count
    to = tl.load(strays + at, mask=inside, other=0)
    row, column = to // n, to % n
    parts = tl.zeros([ENTRIES, DEPTH], tl.float32)
    parts = add_stray_products(parts, first_da, h, row, column, inside, pitch, size, 1, DEPTH)
    parts = add_stray_products(parts, da, before, row, column, inside, pitch, size, steps, DEPTH)
    tl.store(dw + to, tl.sum(parts, axis=1).to(dw.dtype.element_ty), mask=inside)


# --- launch ----------------------------------------------------------------------------------------------------

def sampled_gradient(da: Tensor, states: Tensor, h: Tensor, mask: Tensor, where: BlockLayout, reverse: bool) -> Tensor:
    """dW_hh (n, n) from da and states (T, n, pitch) and h (n, pitch); 0 where the mask is False."""
    steps, n, pitch = da.shape
    ends, before, first = (da[:-1], states[1:], da[-1]) if reverse else (da[1:], states[:-1], da[0])
    dw = da.new_zeros(n, n)
    sizes = (n, pitch // PITCH, n * pitch // PITCH, steps - 1)
    with on_device(da):
        if len(where.groups):
            sampled_blocks_kernel[(len(where.groups),)](
                ends, before, first, h, bytes_of(mask), dw, where.row_order, where.rows.partners, where.groups, *sizes,
                VECTOR=PITCH, SIDE=where.side, WIDTH=GROUP, DEPTH=BLOCK_DEPTH, **numbers_for(da)._asdict(),
                num_warps=8 if where.side == 64 else 4, num_stages=3, enable_fp_fusion=True)
        if len(where.strays):
            sampled_strays_kernel[(triton.cdiv(len(where.strays), STRAY_ENTRIES),)](
                ends, before, first, h, dw, where.strays, len(where.strays), *sizes, VECTOR=PITCH,
                ENTRIES=STRAY_ENTRIES, DEPTH=STRAY_DEPTH, num_warps=4, enable_fp_fusion=True)
    return dw
