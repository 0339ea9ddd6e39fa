"""The kernels of several small weights in one launch. A layer is a weight and its points; arguments that differ between
layers are tuples, and a program picks those of its layer."""
from __future__ import annotations

import triton
import triton.language as tl

from ..math import parameter
from .dense import penalty_program
from .finish import finish_both, sum_value


@triton.jit
def pick(values, layer):
    """values[layer], of a tuple of numbers or pointers."""
    picked = values[0]
    for i in tl.static_range(1, len(values)):
        picked = tl.where(layer == i, values[i], picked)
    return picked


@triton.jit
def layer_of(program, firsts):
    """The layer that a program works for, and its number among the programs of that layer, which begin at firsts."""
    layer = 0
    for i in tl.static_range(1, len(firsts)):
        layer += (program >= firsts[i]).to(tl.int32)
    return layer, program - pick(firsts, layer)


@triton.jit
def penalties_kernel(
    weights, rows, cols, table, grad, dweights, value_parts, row_parts, column_parts, firsts, groups, n_rows,
    column_vectors, stride_vectors, row_starts, column_starts, grad_starts, scales, numbers, factor_parameters,
    inhibitor_parameters,
    FACTORS: tl.constexpr, COORDINATES: tl.constexpr, INHIBITOR: tl.constexpr, POWER: tl.constexpr,
    BLOCKS: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_POINTS: tl.constexpr, HAS_GRAD: tl.constexpr,
    EVEN: tl.constexpr, PREFETCH: tl.constexpr, VECTOR: tl.constexpr, TILE_ROWS: tl.constexpr, REPEAT: tl.constexpr,
    WIDTH: tl.constexpr, TILES: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
):
    """penalty_program for each layer: its programs begin at firsts, groups vary first. The parts of all layers share
    buffers: one value a program, those of rows and columns from *_starts on. scales: one a layer. numbers: power. grad:
    a factor a layer, at grad_starts."""
    layer, program = layer_of(tl.program_id(0), firsts)
    groups_here = pick(groups, layer)
    scale = parameter(scales, 0, DTYPE)
    for i in tl.static_range(1, len(firsts)):
        scale = tl.where(layer == i, parameter(scales, i, DTYPE), scale)
    if HAS_GRAD:
        scale = scale * tl.load(grad + pick(grad_starts, layer)).to(DTYPE)
    penalty_program(
        program % groups_here, program // groups_here, groups_here, pick(weights, layer), pick(rows, layer),
        pick(cols, layer), None, table, pick(dweights, layer) if NEED_WEIGHT else None,
        value_parts + pick(firsts, layer), row_parts + pick(row_starts, layer) if NEED_POINTS else None,
        column_parts + pick(column_starts, layer) if NEED_POINTS else None, pick(n_rows, layer),
        pick(column_vectors, layer), pick(stride_vectors, layer), scale, parameter(numbers, 0, DTYPE),
        factor_parameters, inhibitor_parameters, FACTORS, COORDINATES, INHIBITOR, POWER, BLOCKS, 1, NEED_WEIGHT, False,
        NEED_POINTS, False, EVEN, PREFETCH, VECTOR, TILE_ROWS, REPEAT, WIDTH, TILES, GROUP, DTYPE)


@triton.jit
def finish_penalties_kernel(
    rows, cols, value_parts, row_parts, column_parts, total, values, drows, dcols, firsts, n_rows, n_columns,
    value_starts, value_counts, row_starts, row_counts, column_starts, column_counts,
    FACTORS: tl.constexpr, COORDINATES: tl.constexpr, NEED_VALUE: tl.constexpr, NEED_POINTS: tl.constexpr,
    CONSTANT: tl.constexpr, SHARED: tl.constexpr, CHUNK: tl.constexpr, POINTS: tl.constexpr, VALUES: tl.constexpr,
):
    """Program 0 adds the values of all layers, and those to the total (float64); the others finish a block of points
    each: those of a layer begin at firsts. Parts of a layer: *_counts from *_starts on."""
    program = tl.program_id(0)
    if program == 0:
        if NEED_VALUE:
            added = tl.zeros([1], tl.float64)
            for i in tl.static_range(len(value_starts)):
                value = sum_value(value_parts + value_starts[i], value_counts[i], VALUES)
                tl.store(values + i, value.to(values.dtype.element_ty))
                added += value
            tl.store(total, tl.sum(added, axis=0).to(total.dtype.element_ty))
    else:
        if NEED_POINTS:
            layer, block = layer_of(program - 1, firsts)
            finish_both(
                block, pick(rows, layer), pick(cols, layer),
                None if CONSTANT else row_parts + pick(row_starts, layer),
                None if CONSTANT else column_parts + pick(column_starts, layer), pick(drows, layer),
                None if SHARED else pick(dcols, layer), pick(n_rows, layer), pick(n_columns, layer),
                pick(row_counts, layer), pick(column_counts, layer), FACTORS, COORDINATES, CONSTANT, SHARED, CHUNK,
                POINTS)
