"""Products over a whole sequence, under a weight's mask: x W_ih^T, da W_ih, and the gradients da^T x and da^T h.

One axis runs over all steps and all of the batch. Its index i is element i % pitch of step i // pitch; of `pitch`
elements the batch has `batch`. So the axis can run over states (T, n, pitch) and inputs (T, B, I) alike, which do not
have one stride along it: then it is folded, and FOLD says whether it is the result's rows or the depth, along which
products are added up.
"""
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...ops.blocked_rnn import PITCH
from ..device import bytes_of, device_of, numbers_for, on_device
from . import shares


@triton.jit
def along(index, stride, outer, pitch, FOLDED: tl.constexpr):
    """Offsets in 64 bits. If FOLDED, steps are `outer` apart and what is in a step `stride`."""
    wide = index.to(tl.int64)
    if FOLDED:
        return (wide // pitch) * outer + (index % pitch) * stride
    else:
        return wide * stride


@triton.jit
def inside(index, count, batch, pitch, FOLDED: tl.constexpr):
    """Whether an index is one of `count` and, if FOLDED, of an element that the batch has."""
    if FOLDED:
        return (index < count) & (index % pitch < batch)
    else:
        return index < count


@triton.jit
def add_product(total, a, b, mask, row, column, rows, columns, depth, a_row, a_depth, a_outer, b_depth, b_column,
                b_outer, batch, pitch, FOLD: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
                DOT: tl.constexpr):
    """Returns total + a b for these rows of a and columns of b. mask: bytes like b, or None."""
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
    # tensors, by their strides
    a,              # (rows, depth)
    b,              # (depth, columns)
    b_mask,         # bytes like b, or None
    more_a, more_b,     # a second pair to multiply, of one stride along each axis; or None
    out,            # (rows, columns)
    out_mask,       # bytes like out, or None
    # sizes
    rows, columns, depth,
    more_depth,     # the second pair's
    batch,          # elements of the batch: along the folded axis a is 0 from there on
    out_batch,      # elements of the batch that out has
    pitch,          # numbers that a step takes along the folded axis, in units of VECTOR
    # strides; *_outer is from step to step
    a_row, a_depth, a_outer, b_depth, b_column, b_outer, out_row, out_column, out_outer,
    # constants
    FOLD: tl.constexpr,         # the folded axis: "rows" (of a and out), "depth" or None
    VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr,     # how tensor cores multiply, see device.Numbers
):
    """out = a b + more_a more_b, where masks set entries of b and of out to 0."""
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


# --- launch ----------------------------------------------------------------------------------------------------

class Fold(NamedTuple):
    """The axis of all steps and all of the batch, if it is folded.

    axis: "rows" or "depth"
    steps, batch: how many there are
    pitch: elements that a step takes
    a_outer, b_outer, out_outer: numbers from a step to the next in each matrix
    out_batch: elements of the batch in the result
    """

    axis: str | None
    steps: int
    batch: int
    pitch: int
    a_outer: int = 0
    b_outer: int = 0
    out_outer: int = 0
    out_batch: int = 0


NOT_FOLDED = Fold(None, 0, 0, 0)


def multiply(a: Tensor, b: Tensor, mask: Tensor | None = None, out_mask: Tensor | None = None,
             more: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Returns a b, with the entries of b where `mask`, and of the result where `out_mask`, is False set to 0.

    more: two further matrices with the strides of a and b, whose product is added. The mask of a transposed matrix is
    transposed like it.
    """
    out = a.new_empty(a.shape[0], b.shape[1])
    multiply_into(out, a, b, a.shape[1], mask, out_mask, more)
    return out


def multiply_into(out: Tensor, a: Tensor, b: Tensor, depth: int, mask: Tensor | None = None,
                  out_mask: Tensor | None = None, more: tuple[Tensor, Tensor] | None = None,
                  fold: Fold = NOT_FOLDED) -> None:
    """`multiply` into out (rows, columns). A folded matrix is given as its first step. depth: products that are added
    up for each entry."""
    rows, columns = out.shape
    if fold.axis == "rows":
        rows = fold.steps * fold.pitch
    if rows * columns == 0:
        return
    more_a, more_b = more or (None, None)
    aligned = all(stride == 1 or stride % shares.ALIGNED == 0 for stride in (*a.stride(), *b.stride()))
    vector = 1 if fold.axis is None else PITCH
    tile = shares.product_tile(rows, columns, a.element_size(), aligned, device_of(a).multiprocessors)
    with on_device(a):
        product_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns))](
            a, b, bytes_of(mask), more_a, more_b, out, bytes_of(out_mask),
            rows, columns, depth, 0 if more_a is None else more_a.shape[1], fold.batch, fold.out_batch,
            fold.pitch // vector,
            *a.stride(), fold.a_outer, *b.stride(), fold.b_outer, *out.stride(), fold.out_outer,
            FOLD=fold.axis, VECTOR=vector, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
            **numbers_for(a)._asdict(),
            num_warps=tile.warps, num_stages=3, maxnreg=shares.registers_for(tile.warps), enable_fp_fusion=True)
