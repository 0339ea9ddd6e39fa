"""The kernel of the penalty: value, dW and the parts of dE in one pass over W.

A program owns a strip of rows and a group of column blocks, and walks down the strip once a block. A tile is REPEAT
pieces (TILE_ROWS, WIDTH) side by side; WIDTH columns are 128 bytes of W. The compiler gives the lanes of a warp 4 rows
x 8 vectors of 16 bytes of a piece, so that a thread has one row of a tile, and a vector of each piece, loaded and
stored whole. What a thread sums stays in its registers:

    value          one number a lane, compensated
    columns of dE  a piece a coordinate, over the rows of the strip; reduced over rows once a block
    rows of dE     over the columns of a tile at once, 3 shuffles a coordinate; the sums of tile i are kept by lane i
                   of the 8 that share a row, over all blocks of the group: no memory but at the end

Under a mask the mask is read whole, a byte an entry; a tile of which nothing is kept costs no more, and of others W,
and a gradient that is added to, is touched in the sectors of 32 bytes with a kept entry.

Parts: value (strips, groups); rows (groups, coordinates, R); columns (strips, coordinates, C). finish.py adds them.
"""
from __future__ import annotations

import triton
import triton.language as tl

from ..inhibitors import inhibitor
from ..manifolds import distance, prepare
from ..math import parameter, power_positive, signed_by

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
def load_tile(weight, row, column, row_stride, lane_at, lane_row, lane_column, n_rows, n_columns, MASKED: tl.constexpr,
              REPEAT: tl.constexpr, WIDTH: tl.constexpr):
    """The pieces of the tile that begins at a row and a column of plain weights."""
    pieces = ()
    for r in tl.static_range(REPEAT):
        here = column + r * WIDTH
        inside = (row + lane_row < n_rows) & (here + lane_column < n_columns)
        pieces = pieces + (load_weights(weight + (row.to(tl.int64) * row_stride + here) + lane_at, inside, MASKED),)
    return pieces


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
def store_gradients(to, gradients, inside, ACCUMULATE: tl.constexpr, EVEN: tl.constexpr):
    """Stores gradients, or adds them to those that are there."""
    if ACCUMULATE:
        if EVEN:
            gradients += load_weights(to, inside, False).to(gradients.dtype)
        else:
            gradients += tl.load(to, mask=inside, other=0.0).to(gradients.dtype)
    rounded = gradients.to(to.dtype.element_ty)
    if EVEN:
        tl.store(to, rounded, eviction_policy="evict_first")
    else:
        tl.store(to, rounded, mask=inside, eviction_policy="evict_first")


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
                           HAS_MASK: tl.constexpr, ACCUMULATE: tl.constexpr, DTYPE: tl.constexpr):
    """dW of the kernels: that of the norms, divided by them (per_norm), times w; 0 where masked."""
    for q in range(INNER):
        here = inside
        if HAS_MASK:
            here = here & (tl.load(mask + out_at + q, mask=inside, other=0) != 0)
        w = tl.load(weights + q, mask=here, other=0.0).to(DTYPE)
        store_gradients(dweight + out_at + q, tl.where(here, per_norm * w, 0.0), here if ACCUMULATE else inside,
                        ACCUMULATE, False)


@triton.jit
def load_mask(mask, row, first_column, lane_row, lane_column, lane_out, n_rows, n_columns, BLOCKS: tl.constexpr,
              INNER: tl.constexpr, EVEN: tl.constexpr, REPEAT: tl.constexpr, WIDTH: tl.constexpr):
    """The mask of the pieces of the tile that begins there, the blocks of each next to each other (of convolutions what
    is kept of any of a kernel), and whether it keeps anything of the tile."""
    pieces = ()
    found = tl.zeros(lane_out.shape, tl.uint8)
    for r in tl.static_range(REPEAT):
        column = first_column + r * WIDTH
        inside = (row + lane_row < n_rows) & (column + lane_column < n_columns)
        for b in tl.static_range(BLOCKS):
            at = ((row + b * n_rows).to(tl.int64) * n_columns + column) * INNER + lane_out
            if EVEN:
                piece = tl.load(mask + at)
            else:
                piece = tl.load(mask + at, mask=inside, other=0)
            for q in range(1, INNER):
                piece = piece | tl.load(mask + at + q, mask=inside, other=0)
            found = found | piece
            pieces = pieces + (piece,)
    return pieces, tl.max(tl.max(found.to(tl.int32), axis=1), axis=0) != 0


@triton.jit
def store_nothing(dweight, row, first_column, lane_row, lane_column, lane_out, n_rows, n_columns, BLOCKS: tl.constexpr,
                  INNER: tl.constexpr, EVEN: tl.constexpr, REPEAT: tl.constexpr, WIDTH: tl.constexpr):
    """The gradients of a tile of which nothing is kept."""
    for r in tl.static_range(REPEAT):
        column = first_column + r * WIDTH
        inside = (row + lane_row < n_rows) & (column + lane_column < n_columns)
        for b in tl.static_range(BLOCKS):
            at = ((row + b * n_rows).to(tl.int64) * n_columns + column) * INNER + lane_out
            for q in range(INNER):
                store_gradients(dweight + at + q, tl.zeros(lane_out.shape, tl.float32), inside, False,
                                EVEN and INNER == 1)


@triton.jit
def sum_in_lanes(piece):
    """(TILE_ROWS, LANES) from (TILE_ROWS, WIDTH): what each lane has of a row, without a shuffle."""
    return tl.sum(tl.reshape(piece, [piece.shape[0], LANES, piece.shape[1] // LANES]), axis=2)


@triton.jit
def compensated_add(total, rest, part):
    """Kahan's sum: total + part, and what was lost to rounding, to be taken from the next part."""
    part = part - rest
    added = total + part
    return added, (added - total) - part


@triton.jit
def penalty_program(
    group, strip, groups, weight, rows, cols, mask, table, dweight, value_parts, row_parts, column_parts,
    n_rows, column_vectors, stride_vectors, scale, exponent, factor_parameters, inhibitor_parameters,
    FACTORS: tl.constexpr, COORDINATES: tl.constexpr, INHIBITOR: tl.constexpr, POWER: tl.constexpr,
    BLOCKS: tl.constexpr, INNER: tl.constexpr, NEED_WEIGHT: tl.constexpr, ACCUMULATE: tl.constexpr,
    NEED_POINTS: tl.constexpr, HAS_MASK: tl.constexpr, EVEN: tl.constexpr,
    PREFETCH: tl.constexpr, VECTOR: tl.constexpr, TILE_ROWS: tl.constexpr, REPEAT: tl.constexpr, WIDTH: tl.constexpr,
    TILES: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
):
    """What one program does: a strip of TILES tiles of rows, LANES at most, and a group of GROUP blocks of columns,
    those numbered `strip` and `group`, of `groups`. weight (BLOCKS*n_rows, n_columns, INNER), rows a stride apart; mask
    and dweight contiguous. n_columns and stride come in units of VECTOR elements, so that the compiler knows what is
    aligned.
    INNER: elements of a convolution's kernel, else 1. ACCUMULATE: dW is added to what dweight holds. EVEN: no program
    has anything out of bounds. PREFETCH: the weights of the next tile are asked for early; for plain weights only."""
    BLOCK: tl.constexpr = REPEAT * WIDTH
    MASKED: tl.constexpr = HAS_MASK or not EVEN
    n_columns = column_vectors * VECTOR
    row_stride = stride_vectors * VECTOR
    first_row = strip * (TILES * TILE_ROWS)
    first_block = group * GROUP
    lane_row = tl.arange(0, TILE_ROWS)[:, None]
    lane_column = tl.arange(0, WIDTH)[None, :]
    lane = tl.arange(0, LANES)[None, :]
    # where an entry lies is a part that its piece has in common and one that stays the same: one addition a piece
    lane_at = lane_row.to(tl.int64) * row_stride + lane_column * INNER
    lane_out = (lane_row.to(tl.int64) * n_columns + lane_column) * INNER

    value = tl.zeros([TILE_ROWS, LANES], DTYPE)
    lost = tl.zeros([TILE_ROWS, LANES], DTYPE)
    row_sums = (tl.zeros([TILE_ROWS, LANES], DTYPE),) * COORDINATES
    if PREFETCH:
        ahead = load_tile(weight, first_row, first_block * BLOCK, row_stride, lane_at, lane_row, lane_column, n_rows,
                          n_columns, MASKED, REPEAT, WIDTH)
    for block in range(GROUP):
        first_column = (first_block + block) * BLOCK
        # A load of nothing: zeros that lie among the threads as the weights do. What they are added to is laid out
        # likewise, else the compiler takes all that depends on points alone through shared memory, tile by tile.
        zeros = tl.load(weight + lane_at, mask=lane_row < -(first_column + lane_column), other=0.0).to(DTYPE)
        zero_row = tl.sum(zeros, axis=1)[:, None]
        y = ()
        for r in tl.static_range(REPEAT):
            point = tl.minimum(first_column + r * WIDTH + lane_column, n_columns - 1)
            y = y + (prepare(load_points(cols, point, COORDINATES), zeros, factor_parameters, FACTORS),)
        column_sums = (tl.zeros([TILE_ROWS, WIDTH], DTYPE),) * (REPEAT * COORDINATES)
        for tile in range(TILES):
            row = first_row + tile * TILE_ROWS
            if PREFETCH:
                current = ahead
                # the last tile of all again after the last: a branch or a mask would cost more
                step = tl.minimum(block * TILES + tile + 1, GROUP * TILES - 1)
                ahead = load_tile(weight, first_row + (step % TILES) * TILE_ROWS, (first_block + step // TILES) * BLOCK,
                                  row_stride, lane_at, lane_row, lane_column, n_rows, n_columns, MASKED, REPEAT, WIDTH)
            work = True
            if HAS_MASK:
                masks, work = load_mask(mask, row, first_column, lane_row, lane_column, lane_out, n_rows, n_columns,
                                        BLOCKS, INNER, EVEN, REPEAT, WIDTH)
            if work:
                x = prepare(load_points(rows, tl.minimum(row + lane_row, n_rows - 1), COORDINATES), zero_row,
                            factor_parameters, FACTORS)
                terms = tl.zeros([TILE_ROWS, WIDTH], DTYPE)
                tile_sums = (tl.zeros([TILE_ROWS, WIDTH], DTYPE),) * COORDINATES
                new_columns = ()
                for r in tl.static_range(REPEAT):
                    column = first_column + r * WIDTH
                    inside = (row + lane_row < n_rows) & (column + lane_column < n_columns)
                    s, g, h = distance(x, y[r], factor_parameters, FACTORS, NEED_POINTS)
                    f, slope = inhibitor(s, inhibitor_parameters, scale, table, INHIBITOR)
                    t = tl.zeros([TILE_ROWS, WIDTH], DTYPE)
                    for b in tl.static_range(BLOCKS):
                        line = (row + b * n_rows).to(tl.int64)
                        weights = weight + (line * row_stride + column * INNER) + lane_at
                        out_at = (line * n_columns + column) * INNER + lane_out
                        kept = inside
                        if INNER > 1:
                            a, kept = kernel_norms(weights, mask, out_at, inside, INNER, HAS_MASK, DTYPE)
                        else:
                            if HAS_MASK:
                                kept = masks[r * BLOCKS + b] != 0
                            if PREFETCH:
                                w = current[r].to(DTYPE)
                            elif HAS_MASK:  # one by one, and each would carry its own copy of a policy
                                w = tl.load(weights, mask=kept, other=0.0).to(DTYPE)
                            else:
                                w = load_weights(weights, kept, MASKED).to(DTYPE)
                            a = tl.abs(w)
                        f_kept = f
                        slope_kept = slope
                        if MASKED:  # an entry that is not kept costs nothing, also where its points are not finite
                            f_kept = tl.where(kept, f, 0.0)
                            slope_kept = tl.where(kept, slope, 0.0)
                        v, per_norm = magnitude(a, exponent, POWER)
                        terms += f_kept * v
                        t += slope_kept * v
                        if NEED_WEIGHT:
                            if INNER > 1:
                                per_norm = tl.where(a == 0, 0.0, f_kept * per_norm / tl.where(a == 0, 1.0, a))
                                store_kernel_gradients(dweight, weights, mask, out_at, inside, per_norm, INNER,
                                                       HAS_MASK, ACCUMULATE, DTYPE)
                            else:
                                gradient = weight_gradient(f_kept, w, a, exponent, POWER)
                                # of an existing gradient what is masked is neither read nor written
                                store_gradients(dweight + out_at, gradient, kept if ACCUMULATE else inside, ACCUMULATE,
                                                EVEN and not (HAS_MASK and ACCUMULATE))
                    if NEED_POINTS:
                        new_sums = ()
                        for c in tl.static_range(COORDINATES):
                            new_sums = new_sums + (tile_sums[c] + t * g[c],)
                            new_columns = new_columns + (column_sums[r * COORDINATES + c] - t * h[c],)
                        tile_sums = new_sums
                value, lost = compensated_add(value, lost, sum_in_lanes(terms))
                if NEED_POINTS:
                    column_sums = new_columns
                    new_rows = ()
                    for c in tl.static_range(COORDINATES):
                        over_columns = tl.sum(sum_in_lanes(tile_sums[c]), axis=1)[:, None]
                        new_rows = new_rows + (row_sums[c] + tl.where(lane == tile, over_columns, 0.0),)
                    row_sums = new_rows
            else:
                if NEED_WEIGHT and not ACCUMULATE:
                    store_nothing(dweight, row, first_column, lane_row, lane_column, lane_out, n_rows, n_columns,
                                  BLOCKS, INNER, EVEN, REPEAT, WIDTH)
        if NEED_POINTS:
            for r in tl.static_range(REPEAT):
                summed = first_column + r * WIDTH + tl.arange(0, WIDTH)
                for c in tl.static_range(COORDINATES):
                    to = column_parts + (strip.to(tl.int64) * COORDINATES + c) * n_columns
                    tl.store(to + summed, tl.sum(column_sums[r * COORDINATES + c], axis=0), mask=summed < n_columns)

    part = strip * groups + group
    tl.store(value_parts + part, tl.sum(tl.sum(value, axis=1), axis=0))
    if NEED_POINTS:
        summed = first_row + lane * TILE_ROWS + lane_row
        for c in tl.static_range(COORDINATES):
            to = row_parts + (group.to(tl.int64) * COORDINATES + c) * n_rows
            tl.store(to + summed, row_sums[c], mask=(lane < TILES) & (summed < n_rows))


@triton.jit
def penalty_kernel(
    weight, rows, cols, mask, table, grad, dweight, value_parts, row_parts, column_parts,
    n_rows, column_vectors, stride_vectors, numbers, factor_parameters, inhibitor_parameters,
    FACTORS: tl.constexpr, COORDINATES: tl.constexpr, INHIBITOR: tl.constexpr, POWER: tl.constexpr,
    BLOCKS: tl.constexpr, INNER: tl.constexpr, NEED_WEIGHT: tl.constexpr, ACCUMULATE: tl.constexpr,
    NEED_POINTS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_GRAD: tl.constexpr, EVEN: tl.constexpr,
    PREFETCH: tl.constexpr, VECTOR: tl.constexpr, TILE_ROWS: tl.constexpr, REPEAT: tl.constexpr, WIDTH: tl.constexpr,
    TILES: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
):
    """One weight, in a grid of (groups, strips); see penalty_program. numbers: scale and power. grad: 0-d factor of the
    gradients."""
    scale = parameter(numbers, 0, DTYPE)
    exponent = parameter(numbers, 1, DTYPE)
    if HAS_GRAD:
        scale = scale * tl.load(grad).to(DTYPE)
    penalty_program(
        tl.program_id(0), tl.program_id(1), tl.num_programs(0), weight, rows, cols, mask, table, dweight, value_parts,
        row_parts, column_parts, n_rows, column_vectors, stride_vectors, scale, exponent, factor_parameters,
        inhibitor_parameters, FACTORS, COORDINATES, INHIBITOR, POWER, BLOCKS, INNER, NEED_WEIGHT, ACCUMULATE,
        NEED_POINTS, HAS_MASK, EVEN, PREFETCH, VECTOR, TILE_ROWS, REPEAT, WIDTH, TILES, GROUP, DTYPE)
