"""The proximal step in place: w <- sign(w) max(|w| - scale f, 0), and for a whole convolution kernel with the L2 norm
|w|, w <- w max(1 - scale f / |w|, 0). Masked entries keep their value, and NaN stays NaN.

One launch; dense weights are loaded and stored in tiles as in dense.py, compressed rows as in kept.py.
"""
from __future__ import annotations

import triton
import triton.language as tl

from ...ops.penalty import PROXIMAL_STEP_, PenaltyArguments
from ..device import bytes_of, on_device
from ..inhibitors import inhibitor
from ..manifolds import distance, prepare
from ..math import number
from . import kept, tiles
from .entries import kernel_norms, load_points, load_weights
from .formula import Formula, formula_of

WARPS, TILES = 4, 4


@triton.jit
def shrunk(a, threshold):
    """Returns max(a - threshold, 0) for a >= 0. Where the threshold is negative 0 stays 0, and NaN stays NaN."""
    left = a - threshold
    return tl.where((left <= 0) | ((a == 0) & (threshold == threshold)), 0.0, left)


@triton.jit
def soft_threshold(w, threshold):
    """Returns sign(w) max(|w| - threshold, 0)."""
    left = shrunk(tl.abs(w), threshold)
    return tl.where(w < 0, -left, left)


@triton.jit
def shrink_kernels(weights, mask, mask_at, inside, threshold, INNER: tl.constexpr, HAS_MASK: tl.constexpr,
                   DTYPE: tl.constexpr):
    """Shrinks the kept elements of convolution kernels, INNER in each, by their L2 norm."""
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
    # tensors
    weight,         # (BLOCKS * n_rows, n_columns, INNER); rows a stride apart
    rows, cols,     # points, (n_rows, COORDINATES) and (n_columns, COORDINATES)
    mask,           # bytes in the weight's shape, contiguous; or None
    table,          # a tabulated inhibitor's, or None
    # sizes and stride: columns and stride in units of VECTOR elements, so that the compiler knows what is aligned
    n_rows, column_vectors, stride_vectors,
    # numbers, as `kernel_numbers` sends them
    numbers,        # the scale
    factor_parameters, inhibitor_parameters,
    # constants of the formula, see formula.py
    FACTORS: tl.constexpr, COORDINATES: tl.constexpr, INHIBITOR: tl.constexpr,
    # constants of the weight
    BLOCKS: tl.constexpr,   # gate blocks that share the points
    INNER: tl.constexpr,    # elements of a convolution's kernel, else 1
    HAS_MASK: tl.constexpr,
    EVEN: tl.constexpr,     # whether all that the programs touch is inside
    # constants of the tiles: a program has TILES tiles of TILE_ROWS x WIDTH below each other
    VECTOR: tl.constexpr, TILE_ROWS: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr,
):
    """A dense weight, in a grid of (column blocks, strips)."""
    n_columns = column_vectors * VECTOR
    row_stride = stride_vectors * VECTOR
    scale = number(numbers, 0, DTYPE)
    lane_row = tl.arange(0, TILE_ROWS)[:, None]
    first_column = tl.program_id(0) * WIDTH
    lane_column = tl.arange(0, WIDTH)[None, :]
    lane_at = lane_row.to(tl.int64) * row_stride + (first_column + lane_column) * INNER
    # these zeros lay the points out among the threads as the weights are: see penalty_program
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
    # tensors
    values,         # the entries of compressed rows
    starts,         # (BLOCKS * n_rows + 1), where the rows begin
    columns,        # the column of each entry
    rows, cols,     # points
    table,          # a tabulated inhibitor's, or None
    # size
    n_rows,
    # numbers, as `kernel_numbers` sends them
    numbers,        # the scale
    factor_parameters, inhibitor_parameters,
    # constants of the formula, see formula.py
    FACTORS: tl.constexpr, COORDINATES: tl.constexpr, INHIBITOR: tl.constexpr,
    BLOCKS: tl.constexpr,   # gate blocks that share the points
    # constants of the programs
    ROWS: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr,
):
    """Compressed rows. A program has ROWS rows of points, and walks them WIDTH entries at a time."""
    scale = number(numbers, 0, DTYPE)
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


# --- launch ----------------------------------------------------------------------------------------------------

def step_dense(a: PenaltyArguments, formula: Formula, scale: float) -> None:
    weight, rows, cols = a.weight, a.rows, a.rows if a.cols is None else a.cols
    n_rows, n_columns, inner = len(rows), len(cols), weight.shape[2:].numel()
    stride = tiles.row_stride(weight)
    vector = tiles.vector_length(weight, None, n_columns, stride) if inner == 1 else 1
    tile_rows, width = 4 * WARPS, tiles.piece_width(weight)
    strip = TILES * tile_rows
    proximal_kernel[(triton.cdiv(n_columns, width), triton.cdiv(n_rows, strip))](
        weight, rows, cols, bytes_of(a.mask), a.table, n_rows, n_columns // vector, stride // vector,
        formula.numbers(scale), formula.factor_parameters, formula.inhibitor_parameters, **formula.constants,
        BLOCKS=a.blocks, INNER=inner, HAS_MASK=a.mask is not None,
        EVEN=n_rows % strip == 0 and n_columns % width == 0,
        VECTOR=vector, TILE_ROWS=tile_rows, WIDTH=width, TILES=TILES, num_warps=WARPS, enable_fp_fusion=True)


def step_kept(a: PenaltyArguments, formula: Formula, scale: float) -> None:
    n_rows = len(a.rows)
    width = kept.width_for(a.weight.numel(), n_rows * a.blocks)
    points = kept.TILE // width
    proximal_kept_kernel[(triton.cdiv(n_rows, points),)](
        a.weight, a.crow_indices, a.col_indices, a.rows, a.rows if a.cols is None else a.cols, a.table, n_rows,
        formula.numbers(scale), formula.factor_parameters, formula.inhibitor_parameters, **formula.constants,
        BLOCKS=a.blocks, ROWS=points, WIDTH=width, num_warps=kept.WARPS, enable_fp_fusion=True)


def proximal_step_(*arguments) -> None:
    """The op; its contract stands in moduli_kernels/ops/penalty.py."""
    a, step = PROXIMAL_STEP_.grouped(arguments)
    if a.weight.numel() == 0:
        return
    formula = formula_of(a, a.rows)
    with on_device(a.weight):
        (step_dense if a.crow_indices is None else step_kept)(a, formula, a.scale * step)
