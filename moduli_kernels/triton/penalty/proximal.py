"""The kernels of the proximal step: w <- sign(w) max(|w| - scale f, 0) in place, a convolution's kernel as a whole,
w max(1 - scale f / |w|, 0). What a mask leaves out stays as it is, and NaN stays NaN."""
from __future__ import annotations

import triton
import triton.language as tl

from ..inhibitors import inhibitor
from ..manifolds import distance, prepare
from ..math import parameter
from .dense import kernel_norms, load_points, load_weights


@triton.jit
def shrunk(a, threshold):
    """max(a - threshold, 0) for a >= 0; 0 stays 0 where the threshold is negative, and NaN is NaN."""
    left = a - threshold
    return tl.where((left <= 0) | ((a == 0) & (threshold == threshold)), 0.0, left)


@triton.jit
def soft_threshold(w, threshold):
    left = shrunk(tl.abs(w), threshold)
    return tl.where(w < 0, -left, left)


@triton.jit
def shrink_kernels(weights, mask, mask_at, inside, threshold, INNER: tl.constexpr, HAS_MASK: tl.constexpr,
                   DTYPE: tl.constexpr):
    """Convolution kernels of INNER elements, by what is kept of them."""
    norm, _ = kernel_norms(weights, mask, mask_at, inside, INNER, HAS_MASK, DTYPE)
    factor = tl.where(norm == 0, 0.0, shrunk(norm, threshold) / tl.where(norm == 0, 1.0, norm))
    for q in range(INNER):
        here = inside
        if HAS_MASK:
            here = here & (tl.load(mask + mask_at + q, mask=inside, other=0) != 0)
        w = tl.load(weights + q, mask=here, other=0.0).to(DTYPE)
        tl.store(weights + q, (w * factor).to(weights.dtype.element_ty), mask=here)


@triton.jit
def proximal_kernel(
    weight, rows, cols, mask, table, n_rows, column_vectors, stride_vectors, numbers, factor_parameters,
    inhibitor_parameters, FACTORS: tl.constexpr, COORDINATES: tl.constexpr, INHIBITOR: tl.constexpr,
    BLOCKS: tl.constexpr, INNER: tl.constexpr, HAS_MASK: tl.constexpr, EVEN: tl.constexpr, VECTOR: tl.constexpr,
    TILE_ROWS: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr,
):
    """A dense weight, as in penalty_kernel; a program has TILES tiles of TILE_ROWS x WIDTH below each other. numbers:
    the scale."""
    n_columns = column_vectors * VECTOR
    row_stride = stride_vectors * VECTOR
    scale = parameter(numbers, 0, DTYPE)
    lane_row = tl.arange(0, TILE_ROWS)[:, None]
    first_column = tl.program_id(0) * WIDTH
    lane_column = tl.arange(0, WIDTH)[None, :]
    lane_at = lane_row.to(tl.int64) * row_stride + (first_column + lane_column) * INNER
    # a load of nothing lays the points out among the threads as the weights are: see penalty_program
    zeros = tl.load(weight + lane_at, mask=lane_row < -(first_column + lane_column + 1), other=0.0).to(DTYPE)
    zero_row = tl.sum(zeros, axis=1)[:, None]
    y = prepare(load_points(cols, tl.minimum(first_column + lane_column, n_columns - 1), COORDINATES), zeros,
                factor_parameters, FACTORS)
    for tile in range(TILES):
        row = (tl.program_id(1) * TILES + tile) * TILE_ROWS
        inside = (row + lane_row < n_rows) & (first_column + lane_column < n_columns)
        x = prepare(load_points(rows, tl.minimum(row + lane_row, n_rows - 1), COORDINATES), zero_row,
                    factor_parameters, FACTORS)
        s, _, _ = distance(x, y, factor_parameters, FACTORS, False)
        threshold, _ = inhibitor(s, inhibitor_parameters, scale, table, INHIBITOR)
        for b in tl.static_range(BLOCKS):
            line = (row + b * n_rows).to(tl.int64)
            weights = weight + line * row_stride + lane_at
            mask_at = ((line + lane_row) * n_columns + first_column + lane_column) * INNER
            if INNER > 1:
                shrink_kernels(weights, mask, mask_at, inside, threshold, INNER, HAS_MASK, DTYPE)
            else:
                kept = inside
                if HAS_MASK:
                    kept = kept & (tl.load(mask + mask_at, mask=inside, other=0) != 0)
                w = load_weights(weights, kept, HAS_MASK or not EVEN).to(DTYPE)
                new = soft_threshold(w, threshold).to(weights.dtype.element_ty)
                if HAS_MASK or not EVEN:
                    tl.store(weights, new, mask=kept, eviction_policy="evict_first")
                else:
                    tl.store(weights, new, eviction_policy="evict_first")


@triton.jit
def proximal_kept_kernel(
    values, starts, columns, rows, cols, table, n_rows, numbers, factor_parameters, inhibitor_parameters,
    FACTORS: tl.constexpr, COORDINATES: tl.constexpr, INHIBITOR: tl.constexpr, BLOCKS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr,
):
    """The values of compressed rows; a program has ROWS rows of points, and walks them WIDTH entries at a time."""
    scale = parameter(numbers, 0, DTYPE)
    point = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    exists = point < n_rows
    x = prepare(load_points(rows, tl.minimum(point, n_rows - 1), COORDINATES), 0.0, factor_parameters, FACTORS)
    for b in range(BLOCKS):
        segment = starts + b * n_rows + point
        first = tl.load(segment, mask=exists, other=0)
        end = tl.load(segment + 1, mask=exists, other=0)
        longest = tl.max(tl.max(end - first, axis=1), axis=0)
        step = longest * 0
        while step < longest:
            at = first + step + tl.arange(0, WIDTH)[None, :]
            inside = at < end
            w = tl.load(values + at, mask=inside, other=0.0).to(DTYPE)
            column = tl.load(columns + at, mask=inside, other=0)
            y = prepare(load_points(cols, column, COORDINATES), 0.0, factor_parameters, FACTORS)
            s, _, _ = distance(x, y, factor_parameters, FACTORS, False)
            threshold, _ = inhibitor(s, inhibitor_parameters, scale, table, INHIBITOR)
            tl.store(values + at, soft_threshold(w, threshold).to(values.dtype.element_ty), mask=inside)
            step += WIDTH
