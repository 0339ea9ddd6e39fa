"""Products over a whole sequence, with a weight's mask: x W_ih^T, da W_ih, and the gradients da^T x and da^T h."""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_product(total, a, b, mask, row, column, rows, columns, depth, a_row, a_depth, b_depth, b_column,
                DEPTH: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr):
    """total + a b for these rows of a and columns of b. mask: bytes like b, or None."""
    for first in range(0, depth, DEPTH):
        k = first + tl.arange(0, DEPTH)
        a_at = row[:, None] * a_row + k.to(tl.int64)[None, :] * a_depth
        b_at = k.to(tl.int64)[:, None] * b_depth + column[None, :] * b_column
        inside = (k < depth)[:, None] & (column < columns)[None, :]
        if mask is not None:
            inside = inside & (tl.load(mask + b_at, mask=inside, other=0) != 0)
        left = tl.load(a + a_at, mask=(row < rows)[:, None] & (k < depth)[None, :], other=0.0).to(DOT)
        right = tl.load(b + b_at, mask=inside, other=0.0).to(DOT)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def product_kernel(
    a, b, b_mask, more_a, more_b, out, out_mask, rows, columns, depth, more_depth, a_row, a_depth, b_depth, b_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
):
    """out (rows, columns), contiguous, = a (rows, depth) b (depth, columns) [+ more_a more_b, of depth more_depth],
    operands by their strides; 0 where b_mask (bytes like b) masks b or out_mask (like out) masks out."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    total = add_product(total, a, b, b_mask, row, column, rows, columns, depth, a_row, a_depth, b_depth, b_column,
                        DEPTH, PRECISION, DOT)
    if more_a is not None:
        total = add_product(total, more_a, more_b, None, row, column, rows, columns, more_depth, a_row, a_depth,
                            b_depth, b_column, DEPTH, PRECISION, DOT)
    at = row[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if out_mask is not None:
        total = tl.where(tl.load(out_mask + at, mask=inside, other=0) != 0, total, 0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
