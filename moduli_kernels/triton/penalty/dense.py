"""The penalty of a dense weight: value, dW and the parts of dE in one pass over W.

A program owns a strip of rows and a group of column blocks, and walks down the strip once for each block. A tile is
REPEAT pieces (TILE_ROWS, WIDTH) side by side; WIDTH columns are 128 bytes of W. The compiler gives the lanes of a warp
4 rows x 8 vectors of 16 bytes of a piece, so that a lane has one row of a tile and a vector of each piece, loaded and
stored whole. What a lane sums stays in its registers:

    value          one number a lane, with compensation
    columns of dE  a piece a coordinate, over the rows of the strip; summed over the rows once a block
    rows of dE     over the columns of a tile at once, in 3 shuffles a coordinate. Of the 8 lanes that share a row, lane
                   i keeps the sums of tile i, over all blocks of the group, so that memory is touched at the end only.

A mask is loaded for every entry, one byte each. A tile of which it keeps nothing costs no more than that. Of the other
tiles W, and a gradient that is added to, is touched in those sectors of 32 bytes that hold a kept entry.

finish.py adds the parts in a second launch. Nothing is copied to or from the device, so CUDA graphs can capture a call:
numbers travel as arguments, and the kernels read `grad`. Contracts of the ops: moduli_kernels/ops/penalty.py.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops import penalty as penalty_ops
from ...ops.penalty import PenaltyArguments
from ..device import bytes_of, device_of, on_device
from ..inhibitors import inhibitor
from ..manifolds import distance, prepare
from ..math import number
from . import kept, tiles
from .entries import (
    compensated_add,
    kernel_norms,
    load_points,
    load_weights,
    magnitude,
    store_gradients,
    weight_gradient,
)
from .finish import PART_CHUNK, add_parts
from .formula import formula_of
from .results import Results, gradients_of, results_for
from .scale import scale_each_

LANES = tl.constexpr(tiles.LANES)


@triton.jit
def load_tile(weight, row, column, row_stride, lane_at, lane_row, lane_column, n_rows, n_columns, MASKED: tl.constexpr,
              REPEAT: tl.constexpr, WIDTH: tl.constexpr):
    """The pieces of the tile of plain weights that begins at this row and column."""
    pieces = ()
    for r in tl.static_range(REPEAT):
        here = column + r * WIDTH
        inside = (row + lane_row < n_rows) & (here + lane_column < n_columns)
        pieces = pieces + (load_weights(weight + (row.to(tl.int64) * row_stride + here) + lane_at, inside, MASKED),)
    return pieces


@triton.jit
def store_kernel_gradients(dweight, weights, mask, out_at, inside, per_norm, INNER: tl.constexpr,
                           HAS_MASK: tl.constexpr, ACCUMULATE: tl.constexpr, DTYPE: tl.constexpr):
    """Stores dW of convolution kernels: per_norm, the gradient of a kernel's norm over the norm, times w; 0 where
    masked."""
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
    """Returns the mask's pieces of the tile that begins at this row and column, and whether it keeps anything of the
    tile. The gate blocks of a piece follow each other; a convolution kernel counts as kept if one of its elements
    is."""
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
    """Stores the gradients of a tile of which the mask keeps nothing."""
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
    """Sums (TILE_ROWS, WIDTH) to (TILE_ROWS, LANES): each lane adds what it holds of a row, without a shuffle."""
    return tl.sum(tl.reshape(piece, [piece.shape[0], LANES, piece.shape[1] // LANES]), axis=2)


@triton.jit
def penalty_program(
    # place of the program: its group of column blocks, its strip of rows; how many groups there are
    group, strip, groups,
    # tensors, see penalty_kernel
    weight, rows, cols, mask, table, dweight, value_parts, row_parts, column_parts,
    # sizes and stride: columns and stride in units of VECTOR elements, so that the compiler knows what is aligned
    n_rows, column_vectors, stride_vectors,
    # numbers: what f is multiplied by, the power; parameters as `kernel_numbers` sends them
    scale, exponent, factor_parameters, inhibitor_parameters,
    # constants, see penalty_kernel
    FACTORS: tl.constexpr, COORDINATES: tl.constexpr, INHIBITOR: tl.constexpr, POWER: tl.constexpr,
    BLOCKS: tl.constexpr, INNER: tl.constexpr, NEED_WEIGHT: tl.constexpr, ACCUMULATE: tl.constexpr,
    NEED_POINTS: tl.constexpr, HAS_MASK: tl.constexpr, EVEN: tl.constexpr,
    PREFETCH: tl.constexpr, VECTOR: tl.constexpr, TILE_ROWS: tl.constexpr, REPEAT: tl.constexpr, WIDTH: tl.constexpr,
    TILES: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
):
    """The work of one program of penalty_kernel or grouped_kernel."""
    BLOCK: tl.constexpr = REPEAT * WIDTH
    MASKED: tl.constexpr = HAS_MASK or not EVEN
    n_columns = column_vectors * VECTOR
    row_stride = stride_vectors * VECTOR
    first_row = strip * (TILES * TILE_ROWS)
    first_block = group * GROUP
    lane_row = tl.arange(0, TILE_ROWS)[:, None]
    lane_column = tl.arange(0, WIDTH)[None, :]
    lane = tl.arange(0, LANES)[None, :]
    # An address is the piece's own, plus one for each entry that stays the same: this costs one addition a piece.
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
        # This loads no entry: it gives zeros that are laid out among the threads as the weights are. What they are
        # added to gets the same layout; else the compiler would move all that depends on points alone through shared
        # memory, tile by tile.
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
                # after the last tile it is loaded again, since a branch or a mask would cost more
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
                            elif HAS_MASK:  # these are loaded one by one, and each would carry its own copy of a policy
                                w = tl.load(weights, mask=kept, other=0.0).to(DTYPE)
                            else:
                                w = load_weights(weights, kept, MASKED).to(DTYPE)
                            a = tl.abs(w)
                        f_kept = f
                        slope_kept = slope
                        if MASKED:  # an entry that is not kept costs nothing, even where its points are not finite
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
                                # the masked entries of an existing gradient are neither read nor written
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
    # tensors
    weight,         # (BLOCKS * n_rows, n_columns, INNER); rows a stride apart
    rows, cols,     # points, (n_rows, COORDINATES) and (n_columns, COORDINATES)
    mask,           # bytes in the weight's shape, contiguous; or None
    table,          # a tabulated inhibitor's, or None
    grad,           # 0-d, multiplies the gradients; None unless HAS_GRAD
    dweight,        # has the weight's shape, contiguous; None unless NEED_WEIGHT
    value_parts,    # (strips, groups)
    row_parts,      # (groups, COORDINATES, n_rows); None unless NEED_POINTS
    column_parts,   # (strips, COORDINATES, n_columns); None unless NEED_POINTS
    # sizes and stride: columns and stride in units of VECTOR elements, so that the compiler knows what is aligned
    n_rows, column_vectors, stride_vectors,
    # numbers, as `kernel_numbers` sends them
    numbers,        # scale and power
    factor_parameters, inhibitor_parameters,
    # constants of the formula, see formula.py
    FACTORS: tl.constexpr, COORDINATES: tl.constexpr, INHIBITOR: tl.constexpr, POWER: tl.constexpr,
    # constants of the weight
    BLOCKS: tl.constexpr,       # gate blocks that share the points
    INNER: tl.constexpr,        # elements of a convolution's kernel, else 1
    # constants of the task
    NEED_WEIGHT: tl.constexpr,
    ACCUMULATE: tl.constexpr,   # whether dW is added to what dweight holds
    NEED_POINTS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_GRAD: tl.constexpr,
    EVEN: tl.constexpr,         # whether all that the programs touch is inside
    # constants of the tiles, see tiles.py
    PREFETCH: tl.constexpr,     # for plain weights only
    VECTOR: tl.constexpr, TILE_ROWS: tl.constexpr, REPEAT: tl.constexpr, WIDTH: tl.constexpr,
    TILES: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
):
    """Value, dW and the parts of dE of one weight, in a grid of (groups, strips)."""
    scale = number(numbers, 0, DTYPE)
    exponent = number(numbers, 1, DTYPE)
    if HAS_GRAD:
        scale = scale * tl.load(grad).to(DTYPE)
    penalty_program(
        tl.program_id(0), tl.program_id(1), tl.num_programs(0), weight, rows, cols, mask, table, dweight, value_parts,
        row_parts, column_parts, n_rows, column_vectors, stride_vectors, scale, exponent, factor_parameters,
        inhibitor_parameters, FACTORS, COORDINATES, INHIBITOR, POWER, BLOCKS, INNER, NEED_WEIGHT, ACCUMULATE,
        NEED_POINTS, HAS_MASK, EVEN, PREFETCH, VECTOR, TILE_ROWS, REPEAT, WIDTH, TILES, GROUP, DTYPE)


# --- launch ----------------------------------------------------------------------------------------------------

def compute(a: PenaltyArguments, grad: Tensor | None, need_value: bool, need_weight: bool, need_points: bool,
            into: Tensor | None = None) -> Results:
    """What is asked for, of one weight. grad: 0-d factor of the gradients. into: a gradient of the weight, contiguous,
    to which dW is added; None makes one."""
    if a.crow_indices is not None:
        return kept.compute(a, grad, need_value, need_weight, need_points, into)
    weight, rows = a.weight, a.rows
    cols = rows if a.cols is None else a.cols
    results = results_for(a, need_value, need_weight, need_points, into)
    if weight.numel() == 0:
        return results

    formula = formula_of(a, rows)
    n_rows, n_columns, coordinates, inner = len(rows), len(cols), rows.shape[1], weight.shape[2:].numel()
    sum_points = need_points and not formula.constant
    tile = tiles.tile_for(device_of(weight).generation, coordinates, formula.curved, sum_points)
    width, repeat = tiles.piece_width(weight), tile.vectors(weight.element_size())
    block = repeat * width
    partition = tiles.partition_of(n_rows, n_columns, tile, block, sum_points)
    groups, strips = partition.groups, partition.strips
    stride = tiles.row_stride(weight)
    vector = tiles.vector_length(weight, results.weight, n_columns, stride) if inner == 1 else 1
    value_parts = rows.new_empty(strips * groups)
    row_parts = rows.new_empty(groups * coordinates * n_rows) if sum_points else None
    column_parts = rows.new_empty(strips * coordinates * n_columns) if sum_points else None
    # the loads of a table leave no registers for more
    plain = inner == 1 and a.table is None
    with on_device(weight):
        penalty_kernel[(groups, strips)](
            weight, rows, cols, bytes_of(a.mask), a.table, grad, results.weight, value_parts, row_parts, column_parts,
            n_rows, n_columns // vector, stride // vector,
            formula.numbers(a.scale, a.power), formula.factor_parameters, formula.inhibitor_parameters,
            **formula.constants, POWER=formula.power,
            BLOCKS=a.blocks, INNER=inner,
            NEED_WEIGHT=need_weight, ACCUMULATE=into is not None, NEED_POINTS=sum_points, HAS_MASK=a.mask is not None,
            HAS_GRAD=grad is not None,
            EVEN=n_rows % (partition.tiles * tile.rows) == 0 and n_columns % (partition.group * block) == 0,
            PREFETCH=tile.prefetch and plain and a.blocks == 1 and a.mask is None,
            VECTOR=vector, TILE_ROWS=tile.rows, REPEAT=repeat, WIDTH=width, TILES=partition.tiles,
            GROUP=partition.group,
            num_warps=tile.warps, maxnreg=tile.registers if plain and formula.dtype == torch.float32 else None,
            enable_fp_fusion=True,
        )
        add_parts(a, results, formula, value_parts, row_parts, column_parts, groups, strips, PART_CHUNK)
    return results


# --- the ops ---------------------------------------------------------------------------------------------------

def penalty(*arguments) -> Tensor:
    a, = penalty_ops.PENALTY.grouped(arguments)
    return compute(a, None, True, False, False).value


def penalty_with_grads(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, need_weight, need_points = penalty_ops.PENALTY_WITH_GRADS.grouped(arguments)
    results = compute(a, None, True, need_weight, need_points)
    return (results.value, *gradients_of(a, results))


def penalty_grads(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    grad, a, need_weight, need_points = penalty_ops.PENALTY_GRADS.grouped(arguments)
    return gradients_of(a, compute(a, grad, False, need_weight, need_points))


def accumulate_penalty_grad_(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Adds dW to grad, which is like the weight and contiguous, in the pass that computes value and dE."""
    grad, a, need_points = penalty_ops.ACCUMULATE_PENALTY_GRAD_.grouped(arguments)
    results = compute(a, None, True, True, need_points, grad)
    _, *points = gradients_of(a, results)
    return (results.value, *points)


def scale_grads_(grads: list[Tensor], grad: Tensor) -> None:
    scale_each_(grads, grad, [0] * len(grads))
