"""The penalty of a weight in compressed rows: value, dW and the parts of dE of the kept entries alone.

Entries come in segments: one for each row of the weight or, if TRANSPOSED, one for each column. A program owns ROWS
points and walks the segments of each, WIDTH entries at a time; what a lane sums stays in its registers. In the order of
rows the entries give value, dW and the rows' part of dE, in the order of columns the columns' part. No two programs
write to the same place, so that sums are made in a fixed order and without atomics. finish.py takes the parts as those
of one strip or group.

The order of columns takes a second launch, after the device has sorted the entries by column: for the time of the call
that holds 16 bytes an entry (permutation, rows, columns), and about 12 more while it sorts. Grids follow from the
shapes and the number of entries, so that nothing is read from the device.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.penalty import PenaltyArguments
from ..device import on_device
from ..inhibitors import inhibitor
from ..manifolds import distance, prepare
from ..math import number
from .entries import compensated_add, load_points, magnitude, weight_gradient
from .finish import add_parts
from .formula import formula_of
from .results import Results, results_for

WARPS = 4
WIDEST = 128  # entries of a row at a time, at most
TILE = 512  # entries of a program at a time


@triton.jit
def kept_kernel(
    # tensors
    values,         # the entries, in the order of rows
    starts,         # (BLOCKS * n_own + 1), where the segments begin
    partners,       # the number of each entry's other point
    places,         # where each entry stands in `values`; None if they are in order
    own,            # points of the segments, (n_own, COORDINATES): rows or, if TRANSPOSED, columns
    others,         # the other points
    table,          # a tabulated inhibitor's, or None
    grad,           # 0-d, multiplies the gradients; None unless HAS_GRAD
    dweight,        # like values; None unless NEED_WEIGHT
    value_parts,    # one a program; None unless NEED_VALUE
    point_parts,    # (COORDINATES, n_own); None unless NEED_POINTS
    # size
    n_own,
    # numbers, as `kernel_numbers` sends them
    numbers,        # scale and power
    factor_parameters, inhibitor_parameters,
    # constants of the formula, see formula.py
    FACTORS: tl.constexpr, COORDINATES: tl.constexpr, INHIBITOR: tl.constexpr, POWER: tl.constexpr,
    # constants of the task
    BLOCKS: tl.constexpr,       # gate blocks that share the points
    TRANSPOSED: tl.constexpr, NEED_VALUE: tl.constexpr, NEED_WEIGHT: tl.constexpr,
    ACCUMULATE: tl.constexpr,   # whether dW is added to what dweight holds
    NEED_POINTS: tl.constexpr, HAS_GRAD: tl.constexpr,
    # constants of the programs
    ROWS: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr,
):
    """One order of the entries; a program for ROWS points."""
    scale = number(numbers, 0, DTYPE)
    exponent = number(numbers, 1, DTYPE)
    if HAS_GRAD:
        scale = scale * tl.load(grad).to(DTYPE)

    point = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    exists = point < n_own
    x = prepare(load_points(own, tl.minimum(point, n_own - 1), COORDINATES), 0.0, factor_parameters, FACTORS)
    lane = tl.arange(0, WIDTH)[None, :]
    value = tl.zeros([ROWS, WIDTH], DTYPE)
    lost = tl.zeros([ROWS, WIDTH], DTYPE)
    sums = (tl.zeros([ROWS, WIDTH], DTYPE),) * COORDINATES
    for b in range(BLOCKS):
        segment = starts + b * n_own + point
        first = tl.load(segment, mask=exists, other=0)
        end = tl.load(segment + 1, mask=exists, other=0)
        longest = tl.max(tl.max(end - first, axis=1), axis=0)
        step = longest * 0
        while step < longest:
            at = first + step + lane
            inside = at < end
            partner = tl.load(partners + at, mask=inside, other=0)
            place = at
            if places is not None:
                place = tl.load(places + at, mask=inside, other=0)
            w = tl.load(values + place, mask=inside, other=0.0).to(DTYPE)
            y = prepare(load_points(others, partner, COORDINATES), 0.0, factor_parameters, FACTORS)
            if TRANSPOSED:
                s, g, h = distance(y, x, factor_parameters, FACTORS, NEED_POINTS)
            else:
                s, g, h = distance(x, y, factor_parameters, FACTORS, NEED_POINTS)
            f, slope = inhibitor(s, inhibitor_parameters, scale, table, INHIBITOR)
            f = tl.where(inside, f, 0.0)
            a = tl.abs(w)
            v, _ = magnitude(a, exponent, POWER)
            if NEED_VALUE:
                value, lost = compensated_add(value, lost, f * v)
            if NEED_WEIGHT:
                gradient = weight_gradient(f, w, a, exponent, POWER)
                if ACCUMULATE:
                    gradient += tl.load(dweight + place, mask=inside, other=0.0).to(DTYPE)
                tl.store(dweight + place, gradient.to(dweight.dtype.element_ty), mask=inside)
            if NEED_POINTS:
                t = tl.where(inside, slope, 0.0) * v
                added = ()
                for c in tl.static_range(COORDINATES):
                    # lanes beyond the end measure the distance to some point, whose NaN must not reach the sums
                    part = tl.where(inside, t * (-h[c] if TRANSPOSED else g[c]), 0.0)
                    added = added + (sums[c] + part,)
                sums = added
            step += WIDTH

    if NEED_VALUE:
        tl.store(value_parts + tl.program_id(0), tl.sum(tl.sum(value, axis=1), axis=0))
    if NEED_POINTS:
        for c in tl.static_range(COORDINATES):
            tl.store(point_parts + c * n_own + point, tl.sum(sums[c], axis=1)[:, None], mask=exists)


# --- launch ----------------------------------------------------------------------------------------------------

class Segments(NamedTuple):
    """Entries in the order of rows or of columns; arguments of kept_kernel under these names."""

    starts: Tensor
    partners: Tensor
    places: Tensor | None


def width_for(entries: int, segments: int) -> int:
    """Entries of a segment that a program looks at together: about as many as a segment has on average."""
    mean = -(-entries // max(1, segments))
    return max(8, min(WIDEST, triton.next_power_of_2(mean)))


def by_column(crow: Tensor, col: Tensor, n_rows: int, n_columns: int, blocks: int) -> Segments:
    """The entries of compressed rows, sorted by column and in each column by row."""
    # the fewer bits a number has, the fewer passes the sort takes
    dtype = torch.int16 if n_columns < 2**15 - 1 else torch.int32 if n_columns < 2**31 - 1 else torch.int64
    columns, places = torch.sort(col.to(dtype), stable=True)
    starts = torch.searchsorted(columns, torch.arange(n_columns + 1, dtype=dtype, device=col.device))
    rows = torch.searchsorted(crow, places, right=True, out_int32=crow.numel() < 2**31).sub_(1)
    return Segments(starts, rows.remainder_(n_rows) if blocks > 1 else rows, places)


def compute(a: PenaltyArguments, grad: Tensor | None, need_value: bool, need_weight: bool, need_points: bool,
            into: Tensor | None = None) -> Results:
    """As `compute` of dense.py, where a.weight is the values of compressed rows."""
    values, rows = a.weight, a.rows
    cols = rows if a.cols is None else a.cols
    results = results_for(a, need_value, need_weight, need_points, into)
    if values.numel() == 0:
        return results
    formula = formula_of(a, rows)
    coordinates = rows.shape[1]
    sum_points = need_points and not formula.constant

    def walk(segments: Segments, own: Tensor, others: Tensor, blocks: int,
             transposed: bool) -> tuple[Tensor | None, Tensor | None]:
        """Launches one order, and returns the parts that it leaves."""
        n_own = len(own)
        width = width_for(values.numel(), n_own * blocks)
        points = TILE // width
        programs = triton.cdiv(n_own, points)
        value_parts = rows.new_empty(programs) if need_value and not transposed else None
        point_parts = rows.new_empty(coordinates * n_own) if sum_points else None
        # without a limit of its own ptxas (of Triton 3.9, sm_86) spills to fit in one more program
        registers = 128 if formula.dtype == torch.float32 and coordinates <= 3 else None
        kept_kernel[(programs,)](
            values, *segments, own, others, a.table, grad, None if transposed else results.weight, value_parts,
            point_parts, n_own,
            formula.numbers(a.scale, a.power), formula.factor_parameters, formula.inhibitor_parameters,
            **formula.constants, POWER=formula.power,
            BLOCKS=blocks, TRANSPOSED=transposed, NEED_VALUE=need_value and not transposed,
            NEED_WEIGHT=need_weight and not transposed, ACCUMULATE=into is not None, NEED_POINTS=sum_points,
            HAS_GRAD=grad is not None, ROWS=points, WIDTH=width,
            num_warps=WARPS, maxnreg=registers, enable_fp_fusion=True,
        )
        return value_parts, point_parts

    value_parts = row_parts = column_parts = None
    with on_device(values):
        if need_value or need_weight or sum_points:
            segments = Segments(a.crow_indices, a.col_indices, None)
            value_parts, row_parts = walk(segments, rows, cols, a.blocks, False)
        if sum_points:
            segments = by_column(a.crow_indices, a.col_indices, len(rows), len(cols), a.blocks)
            _, column_parts = walk(segments, cols, rows, 1, True)
        add_parts(a, results, formula, value_parts, row_parts, column_parts, 1, 1, 1)
    return results
