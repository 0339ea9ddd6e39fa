"""The kernel of the penalty: value, dW and the parts of dE in one pass over W.

A program owns a strip of rows and a group of column blocks, and walks down the strip once a block. A tile is
(TILE_ROWS, REPEAT, WIDTH): columns REPEAT * WIDTH of which WIDTH make up 128 bytes of W. The compiler gives the lanes of
a warp 4 rows x 8 vectors of 16 bytes, so that a thread has one row of a tile, and every vector of it is loaded and
stored whole. What a thread sums stays in its registers:

    value          one number a lane, compensated
    columns of dE  a tile a coordinate, over the rows of the strip; reduced over rows once a block
    rows of dE     over the columns of a tile at once, 3 shuffles a coordinate for REPEAT vectors; the sums of tile i are
                   kept by lane i of the 8 that share a row, over all blocks of the group: no memory but at the end

Parts: value (strips, groups); rows (groups, coordinates, R); columns (strips, coordinates, C). finish.py adds them.
"""
from __future__ import annotations

import triton
import triton.language as tl

from .distance import distance, prepare
from .elementary import parameter, power_positive, signed_by
from .inhibitor import inhibitor

LANES = tl.constexpr(8)  # of a warp, that share a row of a tile


@triton.jit
def load_points(points, index, COORDINATES: tl.constexpr):
    """The tuple of the coordinates of some points (n, COORDINATES)."""
    loaded = ()
    for c in tl.static_range(COORDINATES):
        loaded = loaded + (tl.load(points + index * COORDINATES + c),)
    return loaded


@triton.jit
def load_weights(pointers, kept, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=kept, other=0.0, eviction_policy="evict_first")
    else:
        return tl.load(pointers, eviction_policy="evict_first")


@triton.jit
def magnitude(a, exponent, POWER: tl.constexpr):
    """|w|^l and d|w|^l / d|w| of a = |w|; exponent is l."""
    if POWER == 1:
        return a, 1.0
    elif POWER == 2:
        return a * a, 2 * a
    else:
        low = power_positive(a, exponent - 1)
        return a * low, exponent * low


@triton.jit
def weight_gradient(f, w, a, exponent, POWER: tl.constexpr):
    """f d|w|^l / dw, 0 at w = 0 for l = 1."""
    if POWER == 1:
        return signed_by(f, w)
    elif POWER == 2:
        return f * (2 * w)
    else:
        _, slope = magnitude(a, exponent, POWER)
        return signed_by(f * slope, w)


@triton.jit
def kernel_norms(weights, mask, mask_at, inside, INNER: tl.constexpr, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr):
    """L2 norms of the kept weights of kernels of INNER elements, and where one of them is kept."""
    squares = tl.zeros(inside.shape, DTYPE)
    kept = inside & (mask_at < 0)
    for q in range(INNER):
        here = inside
        if HAS_MASK:
            here = here & (tl.load(mask + mask_at + q, mask=inside, other=0) != 0)
        w = tl.load(weights + q, mask=here, other=0.0).to(DTYPE)
        squares += w * w
        kept = kept | here
    return tl.sqrt(squares), kept


@triton.jit
def store_kernel_gradients(dweight, weights, mask, out_at, inside, per_norm, INNER: tl.constexpr,
                           HAS_MASK: tl.constexpr, DTYPE: tl.constexpr):
    """dW of the kernels: that of the norms, divided by them (per_norm), times w; 0 where masked."""
    for q in range(INNER):
        here = inside
        if HAS_MASK:
            here = here & (tl.load(mask + out_at + q, mask=inside, other=0) != 0)
        w = tl.load(weights + q, mask=here, other=0.0).to(DTYPE)
        gradient = tl.where(here, per_norm * w, 0.0)
        tl.store(dweight + out_at + q, gradient.to(dweight.dtype.element_ty), mask=inside)


@triton.jit
def sum_in_lanes(tile):
    """(TILE_ROWS, LANES) from (TILE_ROWS, REPEAT, WIDTH): what each lane has of a row, without a shuffle."""
    of_vectors = tl.sum(tile, axis=1)
    return tl.sum(tl.reshape(of_vectors, [tile.shape[0], LANES, tile.shape[2] // LANES]), axis=2)


@triton.jit
def compensated_add(total, rest, part):
    """Kahan's sum: total + part, and what was lost to rounding, to be taken from the next part."""
    part = part - rest
    added = total + part
    return added, (added - total) - part


@triton.jit
def penalty_kernel(
    weight, rows, cols, mask, table, grad, dweight, value_parts, row_parts, column_parts,
    n_rows, column_vectors, stride_vectors, numbers, factor_parameters, inhibitor_parameters,
    FACTORS: tl.constexpr, COORDINATES: tl.constexpr, INHIBITOR: tl.constexpr, POWER: tl.constexpr,
    BLOCKS: tl.constexpr, INNER: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_POINTS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_GRAD: tl.constexpr, EVEN: tl.constexpr, PREFETCH: tl.constexpr, VECTOR: tl.constexpr,
    TILE_ROWS: tl.constexpr, REPEAT: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """weight (BLOCKS*n_rows, n_columns, INNER), rows a stride apart; mask and dweight contiguous. n_columns and stride
    come in units of VECTOR elements, so that the compiler knows what is aligned. A program has a strip of TILES tiles
    of rows, LANES at most, and GROUP blocks of columns. numbers: scale and power. grad: 0-d factor of the gradients.
    INNER: elements of a convolution's kernel, else 1. EVEN: no program has anything out of bounds. PREFETCH: the
    weights of the next tile are asked for early; for plain weights only."""
    BLOCK: tl.constexpr = REPEAT * WIDTH
    MASKED: tl.constexpr = HAS_MASK or not EVEN
    n_columns = column_vectors * VECTOR
    row_stride = stride_vectors * VECTOR
    scale = parameter(numbers, 0, DTYPE)
    exponent = parameter(numbers, 1, DTYPE)
    if HAS_GRAD:
        scale = scale * tl.load(grad).to(DTYPE)

    first_row = tl.program_id(1) * (TILES * TILE_ROWS)
    first_block = tl.program_id(0) * GROUP
    lane_row = tl.arange(0, TILE_ROWS)[:, None, None]
    lane_column = tl.arange(0, REPEAT)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    lane = tl.arange(0, LANES)[None, :]
    # where an entry lies is a part the tile has in common and one that stays the same: one addition a tile
    lane_at = lane_row.to(tl.int64) * row_stride + lane_column * INNER
    lane_out = (lane_row.to(tl.int64) * n_columns + lane_column) * INNER

    value = tl.zeros([TILE_ROWS, LANES], DTYPE)
    lost = tl.zeros([TILE_ROWS, LANES], DTYPE)
    row_sums = (tl.zeros([TILE_ROWS, LANES], DTYPE),) * COORDINATES
    if PREFETCH:
        at = first_row.to(tl.int64) * row_stride + first_block * BLOCK
        inside = (first_row + lane_row < n_rows) & (first_block * BLOCK + lane_column < n_columns)
        ahead = load_weights(weight + at + lane_at, inside, MASKED)
    for block in range(GROUP):
        first_column = (first_block + block) * BLOCK
        column = first_column + lane_column
        in_columns = column < n_columns
        # A load of nothing: zeros that lie among the threads as the weights do. What they are added to is laid out
        # likewise, else the compiler takes all that depends on points alone through shared memory, tile by tile.
        zeros = tl.load(weight + lane_at, mask=lane_row < -column, other=0.0).to(DTYPE)
        zero_row = tl.sum(tl.sum(zeros, axis=1), axis=1)[:, None, None]
        y = prepare(load_points(cols, tl.minimum(column, n_columns - 1), COORDINATES), zeros, factor_parameters, FACTORS)
        column_sums = (tl.zeros([TILE_ROWS, REPEAT, WIDTH], DTYPE),) * COORDINATES
        for tile in range(TILES):
            row = first_row + tile * TILE_ROWS + lane_row
            inside = (row < n_rows) & in_columns
            if PREFETCH:
                w = ahead.to(DTYPE)
                # the last tile of all again after the last: a branch or a mask would cost more
                step = tl.minimum(block * TILES + tile + 1, GROUP * TILES - 1)
                later_row = first_row + (step % TILES) * TILE_ROWS
                later_column = (first_block + step // TILES) * BLOCK
                at = later_row.to(tl.int64) * row_stride + later_column
                inside_later = (later_row + lane_row < n_rows) & (later_column + lane_column < n_columns)
                ahead = load_weights(weight + at + lane_at, inside_later, MASKED)
            x = prepare(load_points(rows, tl.minimum(row, n_rows - 1), COORDINATES), zero_row, factor_parameters,
                        FACTORS)
            s, g, h = distance(x, y, factor_parameters, FACTORS, NEED_POINTS)
            f, slope = inhibitor(s, inhibitor_parameters, scale, table, INHIBITOR)
            for b in tl.static_range(BLOCKS):
                line = (first_row + tile * TILE_ROWS + b * n_rows).to(tl.int64)
                weights = weight + (line * row_stride + first_column * INNER) + lane_at
                out_at = (line * n_columns + first_column) * INNER + lane_out
                kept = inside
                if INNER > 1:
                    a, kept = kernel_norms(weights, mask, out_at, inside, INNER, HAS_MASK, DTYPE)
                else:
                    if HAS_MASK:
                        kept = kept & (tl.load(mask + out_at, mask=inside, other=0) != 0)
                    if not PREFETCH:
                        w = load_weights(weights, kept, MASKED).to(DTYPE)
                    a = tl.abs(w)
                f_kept = f
                slope_kept = slope
                if MASKED:  # an entry that is not kept costs nothing, also where its points are not finite
                    f_kept = tl.where(kept, f, 0.0)
                    slope_kept = tl.where(kept, slope, 0.0)
                v, per_norm = magnitude(a, exponent, POWER)
                if b == 0:
                    terms = f_kept * v
                    t = slope_kept * v
                else:
                    terms += f_kept * v
                    t += slope_kept * v
                if NEED_WEIGHT:
                    if INNER > 1:
                        per_norm = f_kept * per_norm / tl.where(a == 0, 1.0, a)
                        store_kernel_gradients(dweight, weights, mask, out_at, inside,
                                               tl.where(a == 0, 0.0, per_norm), INNER, HAS_MASK, DTYPE)
                    else:
                        gradient = weight_gradient(f_kept, w, a, exponent, POWER).to(dweight.dtype.element_ty)
                        if EVEN:
                            tl.store(dweight + out_at, gradient, eviction_policy="evict_first")
                        else:
                            tl.store(dweight + out_at, gradient, mask=inside, eviction_policy="evict_first")
            value, lost = compensated_add(value, lost, sum_in_lanes(terms))
            if NEED_POINTS:
                new_rows = ()
                new_columns = ()
                for c in tl.static_range(COORDINATES):
                    over_columns = tl.sum(sum_in_lanes(t * g[c]), axis=1)[:, None]
                    new_rows = new_rows + (row_sums[c] + tl.where(lane == tile, over_columns, 0.0),)
                    new_columns = new_columns + (column_sums[c] - t * h[c],)
                row_sums = new_rows
                column_sums = new_columns
        if NEED_POINTS:
            block_column = tl.reshape(column, [REPEAT, WIDTH])
            for c in tl.static_range(COORDINATES):
                to = column_parts + (tl.program_id(1).to(tl.int64) * COORDINATES + c) * n_columns
                tl.store(to + block_column, tl.sum(column_sums[c], axis=0), mask=block_column < n_columns)

    part = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(value_parts + part, tl.sum(tl.sum(value, axis=1), axis=0))
    if NEED_POINTS:
        row = first_row + lane * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
        for c in tl.static_range(COORDINATES):
            to = row_parts + (tl.program_id(0).to(tl.int64) * COORDINATES + c) * n_rows
            tl.store(to + row, row_sums[c], mask=(lane < TILES) & (row < n_rows))
