"""The launch that follows: it adds the parts that the programs of a first launch left, in a fixed order, and makes them
the gradients of the points (both sides in one where rows and columns share their points)."""
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...ops.penalty import PenaltyArguments
from ..manifolds import finish_gradient, zero_or_nan
from .entries import load_points
from .formula import Formula
from .results import Results

PART_CHUNK = 32  # parts that are added at a time
POINTS, VALUES = 32, 1024  # points of a program, parts of the value that are added at a time


@triton.jit
def sum_parts(parts, count, n, index, inside, COORDINATE: tl.constexpr, COORDINATES: tl.constexpr,
              CHUNK: tl.constexpr):
    """The sum in float64 of parts (count, COORDINATES, n) over the first axis, for one coordinate of the points
    `index`."""
    total = tl.zeros(index.shape, tl.float64)
    first = 0
    while first < count:
        part = (first + tl.arange(0, CHUNK))[:, None]
        at = (part.to(tl.int64) * COORDINATES + COORDINATE) * n + index[None, :]
        chunk = tl.load(parts + at, mask=(part < count) & inside[None, :], other=0.0)
        total += tl.sum(chunk.to(tl.float64), axis=0)
        first += CHUNK
    return total


@triton.jit
def finish_points(points, n, parts_a, count_a, parts_b, count_b, out, block, FACTORS: tl.constexpr,
                  COORDINATES: tl.constexpr, CONSTANT: tl.constexpr, SHARED: tl.constexpr, CHUNK: tl.constexpr,
                  POINTS: tl.constexpr):
    """Stores out (n, COORDINATES) for the POINTS points of block number `block`: twice the sum of the parts a, and b if
    SHARED, for the parts are sums of half the derivatives. If CONSTANT it is zero, and NaN for points that are not
    finite."""
    index = block * POINTS + tl.arange(0, POINTS)
    inside = index < n
    x = load_points(points, tl.minimum(index, n - 1), COORDINATES)
    g = ()
    for c in tl.static_range(COORDINATES):
        if CONSTANT:
            g = g + (zero_or_nan(x),)
        else:
            total = sum_parts(parts_a, count_a, n, index, inside, c, COORDINATES, CHUNK)
            if SHARED:
                total += sum_parts(parts_b, count_b, n, index, inside, c, COORDINATES, CHUNK)
            g = g + (2 * total,)
    if not CONSTANT:
        g = finish_gradient(g, x, FACTORS)
    for c in tl.static_range(COORDINATES):
        tl.store(out + index * COORDINATES + c, g[c].to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_value(parts, count, VALUES: tl.constexpr):
    """The sum of parts (count) in float64."""
    total = tl.zeros([VALUES], tl.float64)
    first = 0
    while first < count:
        at = first + tl.arange(0, VALUES)
        total += tl.load(parts + at, mask=at < count, other=0.0).to(tl.float64)
        first += VALUES
    return tl.sum(total, axis=0)


@triton.jit
def finish_both(block, rows, cols, row_parts, column_parts, drows, dcols, n_rows, n_columns, row_count, column_count,
                FACTORS: tl.constexpr, COORDINATES: tl.constexpr, CONSTANT: tl.constexpr, SHARED: tl.constexpr,
                CHUNK: tl.constexpr, POINTS: tl.constexpr):
    """Finishes block number `block` of POINTS points; the blocks of rows come before those of columns. *_count: how
    many parts each has. SHARED: cols are the rows, and drows gets both sums."""
    row_blocks = tl.cdiv(n_rows, POINTS)
    if block < row_blocks:
        finish_points(rows, n_rows, row_parts, row_count, column_parts, column_count, drows, block, FACTORS,
                      COORDINATES, CONSTANT, SHARED, CHUNK, POINTS)
    else:
        if not SHARED:
            finish_points(cols, n_columns, column_parts, column_count, column_parts, column_count, dcols,
                          block - row_blocks, FACTORS, COORDINATES, CONSTANT, False, CHUNK, POINTS)


@triton.jit
def finish_kernel(
    # tensors: points; parts, as the kernels leave them; results. None where they are not needed.
    rows, cols, value_parts, row_parts, column_parts, value, drows, dcols,
    # sizes: points, and how many parts there are of each
    n_rows, n_columns, value_count, row_count, column_count,
    # constants of the formula
    FACTORS: tl.constexpr, COORDINATES: tl.constexpr,
    CONSTANT: tl.constexpr,     # whether f is constant, so that there are no parts of points
    # constants of the task
    NEED_VALUE: tl.constexpr, NEED_POINTS: tl.constexpr,
    SHARED: tl.constexpr,       # whether cols are the rows
    # constants of the programs: parts of points added at a time, points of a program, parts of the value at a time
    CHUNK: tl.constexpr, POINTS: tl.constexpr, VALUES: tl.constexpr,
):
    """Program 0 adds up the value; each of the others finishes a block of points, see finish_both."""
    program = tl.program_id(0)
    if program == 0:
        if NEED_VALUE:
            tl.store(value, sum_value(value_parts, value_count, VALUES).to(value.dtype.element_ty))
    else:
        if NEED_POINTS:
            finish_both(program - 1, rows, cols, row_parts, column_parts, drows, dcols, n_rows, n_columns, row_count,
                        column_count, FACTORS, COORDINATES, CONSTANT, SHARED, CHUNK, POINTS)


def point_blocks(n_rows: int, n_columns: int, shared: bool) -> int:
    """Programs that finish the points of a weight."""
    return triton.cdiv(n_rows, POINTS) + (0 if shared else triton.cdiv(n_columns, POINTS))


def add_parts(a: PenaltyArguments, results: Results, formula: Formula, value_parts: Tensor | None,
              row_parts: Tensor | None, column_parts: Tensor | None, row_count: int, column_count: int,
              chunk: int) -> None:
    """Launches it for what results have memory for. *_count: how many parts there are for rows and for columns; chunk:
    how many are added at a time."""
    value, rows, cols = results.value, a.rows, a.rows if a.cols is None else a.cols
    need_points = results.rows is not None
    if value is None and not need_points:
        return
    blocks = point_blocks(len(rows), len(cols), a.cols is None) if need_points else 0
    finish_kernel[(1 + blocks,)](
        rows, cols, value_parts, row_parts, column_parts, value, results.rows, results.cols,
        len(rows), len(cols), 0 if value_parts is None else value_parts.numel(), row_count, column_count,
        FACTORS=formula.factors, COORDINATES=rows.shape[1], CONSTANT=formula.constant,
        NEED_VALUE=value is not None, NEED_POINTS=need_points, SHARED=a.cols is None,
        CHUNK=chunk, POINTS=POINTS, VALUES=VALUES, num_warps=4, enable_fp_fusion=True,
    )
