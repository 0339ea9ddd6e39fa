"""The second kernel: adds the parts that the programs of the first left, in fixed order, and finishes the gradients of
the points: both sides where they are shared, projected on the tangent space and divided by |x| on each sphere."""
from __future__ import annotations

import triton
import triton.language as tl

from ..manifolds import SPHERE, unit_vector, zero_or_nan
from .dense import load_points


@triton.jit
def sum_parts(parts, count, n, index, inside, COORDINATE: tl.constexpr, COORDINATES: tl.constexpr,
              CHUNK: tl.constexpr):
    """Of parts (count, COORDINATES, n) the float64 sum over the first axis, of one coordinate of the points `index`."""
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
def project(g, points, KIND: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr):
    """The coordinates of one factor of a gradient, from those in the space around it."""
    projected = ()
    if KIND == SPHERE:
        unit, reciprocal = unit_vector(points, FIRST, COLUMNS)
        radial = g[FIRST] * unit[0]
        for c in tl.static_range(1, COLUMNS):
            radial += g[FIRST + c] * unit[c]
        for c in tl.static_range(COLUMNS):
            projected = projected + ((g[FIRST + c] - radial * unit[c]) * reciprocal,)
    else:
        for c in tl.static_range(FIRST, FIRST + COLUMNS):
            projected = projected + (g[c],)
    return projected


@triton.jit
def finish_points(points, n, parts_a, count_a, parts_b, count_b, out, block, FACTORS: tl.constexpr,
                  COORDINATES: tl.constexpr, CONSTANT: tl.constexpr, SHARED: tl.constexpr, CHUNK: tl.constexpr,
                  POINTS: tl.constexpr):
    """out (n, COORDINATES) = 2 times the sum of the parts a (and b, if SHARED), for block number `block` of POINTS
    points; if CONSTANT zero, and NaN for points that are not finite."""
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
        finished = ()
        for q in tl.static_range(len(FACTORS)):
            finished = finished + project(g, x, FACTORS[q][0], FACTORS[q][1], FACTORS[q][2])
        g = finished
    for c in tl.static_range(COORDINATES):
        tl.store(out + index * COORDINATES + c, g[c].to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_value(parts, count, VALUES: tl.constexpr):
    """The float64 sum of parts (count)."""
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
    """Block number `block` of POINTS points, rows before columns. *_count: the parts of each. SHARED: cols are the
    rows, and drows gets both sums."""
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
    rows, cols, value_parts, row_parts, column_parts, value, drows, dcols, n_rows, n_columns, value_count, row_count,
    column_count, FACTORS: tl.constexpr, COORDINATES: tl.constexpr, NEED_VALUE: tl.constexpr,
    NEED_POINTS: tl.constexpr, CONSTANT: tl.constexpr, SHARED: tl.constexpr, CHUNK: tl.constexpr, POINTS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Program 0 adds the value, the others a block of points each; see finish_both."""
    program = tl.program_id(0)
    if program == 0:
        if NEED_VALUE:
            tl.store(value, sum_value(value_parts, value_count, VALUES).to(value.dtype.element_ty))
    else:
        if NEED_POINTS:
            finish_both(program - 1, rows, cols, row_parts, column_parts, drows, dcols, n_rows, n_columns, row_count,
                        column_count, FACTORS, COORDINATES, CONSTANT, SHARED, CHUNK, POINTS)
