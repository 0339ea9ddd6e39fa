"""Products over a whole sequence, with a weight's mask: x W_ih^T, da W_ih, and the gradients da^T x and da^T h.

One axis is that of all steps and all of the batch. Its number i is step i // pitch and element i % pitch of the batch,
of which there are `batch`, so that it can run over states (T, n, pitch) and inputs (T, B, I) alike; FOLD says which
axis it is: that of the result's "rows" or the "depth", which is added up; None where every operand has one stride along
it.
"""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def along(index, stride, outer, pitch, FOLDED: tl.constexpr):
    """Offsets in 64 bits: of steps by `outer`, in a step by `stride`."""
    wide = index.to(tl.int64)
    if FOLDED:
        return (wide // pitch) * outer + (index % pitch) * stride
    else:
        return wide * stride


@triton.jit
def inside(index, count, batch, pitch, FOLDED: tl.constexpr):
    if FOLDED:
        return (index < count) & (index % pitch < batch)
    else:
        return index < count


@triton.jit
def add_product(total, a, b, mask, row, column, rows, columns, depth, a_row, a_depth, a_outer, b_depth, b_column,
                b_outer, batch, pitch, FOLD: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
                DOT: tl.constexpr):
    """total + a b for these rows of a and columns of b. mask: bytes like b, or None."""
    a_at = along(row, a_row, a_outer, pitch, FOLD == "rows")[:, None]
    row_in = inside(row, rows, batch, pitch, FOLD == "rows")[:, None]
    for first in range(0, depth, DEPTH):
        k = first + tl.arange(0, DEPTH)
        k_in = inside(k, depth, batch, pitch, FOLD == "depth")
        b_at = along(k, b_depth, b_outer, pitch, FOLD == "depth")[:, None] + column.to(tl.int64)[None, :] * b_column
        let = k_in[:, None] & (column < columns)[None, :]
        if mask is not None:
            let = let & (tl.load(mask + b_at, mask=let, other=0) != 0)
        left = tl.load(a + a_at + along(k, a_depth, a_outer, pitch, FOLD == "depth")[None, :],
                       mask=row_in & k_in[None, :], other=0.0).to(DOT)
        right = tl.load(b + b_at, mask=let, other=0.0).to(DOT)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def product_kernel(
    a, b, b_mask, more_a, more_b, out, out_mask, rows, columns, depth, more_depth, a_row, a_depth, a_outer, b_depth,
    b_column, b_outer, out_row, out_column, out_outer, batch, out_batch, pitch, FOLD: tl.constexpr,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    DOT: tl.constexpr,
):
    """out (rows, columns) = a (rows, depth) b (depth, columns) [+ more_a more_b, of depth more_depth and of one
    stride], all by their strides; 0 where b_mask (bytes like b) masks b or out_mask (like out) masks out. Along the
    folded axis a is 0 from `batch` on, and out is written up to out_batch. pitch: in units of VECTOR."""
    pitch = pitch * VECTOR
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    total = add_product(total, a, b, b_mask, row, column, rows, columns, depth, a_row, a_depth, a_outer, b_depth,
                        b_column, b_outer, batch, pitch, FOLD, DEPTH, PRECISION, DOT)
    if more_a is not None:
        total = add_product(total, more_a, more_b, None, row, column, rows, columns, more_depth, a_row, a_depth, 0,
                            b_depth, b_column, 0, batch, pitch, None, DEPTH, PRECISION, DOT)
    at = along(row, out_row, out_outer, pitch, FOLD == "rows")[:, None] + column.to(tl.int64)[None, :] * out_column
    let = inside(row, rows, out_batch, pitch, FOLD == "rows")[:, None] & (column < columns)[None, :]
    if out_mask is not None:
        total = tl.where(tl.load(out_mask + at, mask=let, other=0) != 0, total, 0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=let)
