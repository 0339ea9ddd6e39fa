"""The ops on weights in compressed rows, value, dW over the compressed values and dE of the kept entries alone; and
the proximal step, of these and of dense weights.

Grids follow from shapes and the number of values: nothing is read from the device. Two launches. Gradients of points
take a third one over the entries sorted by column: the device sorts them, which holds 16 bytes an entry for the time of
the call (permutation, rows, columns) and about 12 more while it sorts.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import inhibitors
from ..manifolds import LINE
from .dense import LANES
from .kept import kept_kernel
from .launch import (
    VECTOR_BYTES,
    Arguments,
    Results,
    factors,
    finish,
    on_device,
    parameters,
    results_for,
    vector_length,
)
from .proximal import proximal_kept_kernel, proximal_kernel

WARPS = 4
WIDEST = 128  # entries of a row at a time
TILE = 512  # entries of a program at a time
PROXIMAL_WARPS, PROXIMAL_TILES = 4, 4


class Segments(NamedTuple):
    """Entries in the order of rows or columns: see kept_kernel."""

    starts: Tensor
    partners: Tensor
    places: Tensor | None


def width_for(entries: int, segments: int) -> int:
    """Entries of a segment that a program looks at together: about as many as it has on average."""
    mean = -(-entries // max(1, segments))
    return max(8, min(WIDEST, triton.next_power_of_2(mean)))


def by_column(crow: Tensor, col: Tensor, n_rows: int, n_columns: int, blocks: int) -> Segments:
    """The entries of compressed rows, sorted by column and in each by row."""
    # of fewer bits fewer passes of the sort
    dtype = torch.int16 if n_columns < 2**15 - 1 else torch.int32 if n_columns < 2**31 - 1 else torch.int64
    columns, places = torch.sort(col.to(dtype), stable=True)
    starts = torch.searchsorted(columns, torch.arange(n_columns + 1, dtype=dtype, device=col.device))
    rows = torch.searchsorted(crow, places, right=True, out_int32=crow.numel() < 2**31).sub_(1)
    return Segments(starts, rows.remainder_(n_rows) if blocks > 1 else rows, places)


def launch(a: Arguments, grad: Tensor | None, need_value: bool, need_weight: bool, need_points: bool,
           into: Tensor | None = None) -> Results:
    """As launch.launch, for a.weight the values of compressed rows."""
    values, rows = a.weight, a.rows
    cols = rows if a.cols is None else a.cols
    results = results_for(a, need_value, need_weight, need_points, into)
    dweight = results.weight
    if values.numel() == 0:
        return results

    dtype = rows.dtype
    n_rows, n_columns, coordinates = rows.shape[0], cols.shape[0], rows.shape[1]
    kinds, periods = factors(a.factors, a.factor_parameters)
    code, constants = inhibitors.constants(a.inhibitor, a.inhibitor_parameters,
                                          0 if a.table is None else a.table.shape[0])
    constant = code == inhibitors.CONSTANT.value
    sum_points = need_points and not constant
    numbers = [parameters(n, dtype) for n in ([a.scale, a.power], periods, constants)]
    parts = row_parts = column_parts = None

    def walk(segments: Segments, own: Tensor, others: Tensor, blocks: int, transposed: bool) -> tuple[Tensor, Tensor]:
        n_own = own.shape[0]
        width = width_for(values.numel(), n_own * blocks)
        points = TILE // width
        programs = triton.cdiv(n_own, points)
        parts = rows.new_empty(programs) if need_value and not transposed else None
        point_parts = rows.new_empty(coordinates * n_own) if sum_points else None
        # without a limit of its own ptxas (of Triton 3.9, sm_86) spills to fit in one more block
        registers = 128 if dtype == torch.float32 and coordinates <= 3 else None
        kept_kernel[(programs,)](
            values, *segments, own, others, a.table, grad, None if transposed else dweight, parts, point_parts, n_own,
            *numbers, FACTORS=((LINE.value, 0, 1, 0),) if constant else kinds, COORDINATES=coordinates, INHIBITOR=code,
            POWER=int(a.power) if a.power in (1, 2) else 0, BLOCKS=blocks, TRANSPOSED=transposed,
            NEED_VALUE=need_value and not transposed, NEED_WEIGHT=need_weight and not transposed,
            ACCUMULATE=into is not None, NEED_POINTS=sum_points, HAS_GRAD=grad is not None, ROWS=points, WIDTH=width,
            DTYPE=tl.float64 if dtype == torch.float64 else tl.float32, num_warps=WARPS,
            maxnreg=registers, enable_fp_fusion=True,
        )
        return parts, point_parts

    with on_device(values):
        if need_value or need_weight or sum_points:
            segments = Segments(a.crow_indices, a.col_indices, None)
            parts, row_parts = walk(segments, rows, cols, a.blocks, False)
        if sum_points:
            segments = by_column(a.crow_indices, a.col_indices, n_rows, n_columns, a.blocks)
            _, column_parts = walk(segments, cols, rows, 1, True)
        finish(a, results, parts, row_parts, column_parts, 1, 1, kinds, constant, chunk=1)
    return results


def proximal_step_(*arguments) -> None:
    """weight, or the values of compressed rows, <- sign(w) max(|w| - step scale f, 0); schema in ops/penalty.py."""
    *rest, step = arguments
    a = Arguments(*rest)
    weight, rows, cols = a.weight, a.rows, a.rows if a.cols is None else a.cols
    if weight.numel() == 0:
        return
    dtype, n_rows, n_columns = rows.dtype, rows.shape[0], cols.shape[0]
    kinds, periods = factors(a.factors, a.factor_parameters)
    code, constants = inhibitors.constants(a.inhibitor, a.inhibitor_parameters,
                                          0 if a.table is None else a.table.shape[0])
    if code == inhibitors.CONSTANT.value:  # all it asks of distances is whether the points are finite
        kinds = ((LINE.value, 0, 1, 0),)
    numbers = [parameters(n, dtype) for n in ([a.scale * step], periods, constants)]
    settings = {"FACTORS": kinds, "COORDINATES": rows.shape[1], "INHIBITOR": code, "BLOCKS": a.blocks,
                "DTYPE": tl.float64 if dtype == torch.float64 else tl.float32, "enable_fp_fusion": True}
    with on_device(weight):
        if a.crow_indices is not None:
            width = width_for(weight.numel(), n_rows * a.blocks)
            proximal_kept_kernel[(triton.cdiv(n_rows, TILE // width),)](
                weight, a.crow_indices, a.col_indices, rows, cols, a.table, n_rows, *numbers, **settings,
                ROWS=TILE // width, WIDTH=width, num_warps=WARPS)
            return
        inner = weight[0, 0].numel()
        stride = weight.stride(0) if weight.shape[0] > 1 else n_columns * inner
        vector = vector_length(weight, None, n_columns, stride) if inner == 1 else 1
        tile_rows, width = 4 * PROXIMAL_WARPS, LANES.value * VECTOR_BYTES // weight.element_size()
        strip = PROXIMAL_TILES * tile_rows
        proximal_kernel[(triton.cdiv(n_columns, width), triton.cdiv(n_rows, strip))](
            weight, rows, cols, None if a.mask is None else a.mask.view(torch.uint8), a.table, n_rows,
            n_columns // vector, stride // vector, *numbers, **settings, INNER=inner, HAS_MASK=a.mask is not None,
            EVEN=n_rows % strip == 0 and n_columns % width == 0, VECTOR=vector, TILE_ROWS=tile_rows, WIDTH=width,
            TILES=PROXIMAL_TILES, num_warps=PROXIMAL_WARPS)
