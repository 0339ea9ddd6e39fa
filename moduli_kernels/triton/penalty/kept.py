"""The kernel of kept entries alone: value, dW and the parts of dE of a weight in compressed rows.

Entries come in segments: of the rows, one a block and row, or of the columns, where TRANSPOSED. A program owns ROWS
points and walks the segments of each, WIDTH entries at a time; what a lane sums stays in its registers. Entries in the
order of rows give value, dW and the rows' part of dE, those in the order of columns the columns' part: no two programs
write to the same place, so sums are made in a fixed order without atomics. Parts: value, one a program; points
(COORDINATES, n), which finish.py takes as the parts of one strip or group.
"""
from __future__ import annotations

import triton
import triton.language as tl

from ..inhibitors import inhibitor
from ..manifolds import distance, prepare
from ..math import parameter
from .dense import compensated_add, load_points, magnitude, weight_gradient


@triton.jit
def kept_kernel(
    values, starts, partners, places, own, others, table, grad, dweight, value_parts, point_parts, n_own,
    numbers, factor_parameters, inhibitor_parameters,
    FACTORS: tl.constexpr, COORDINATES: tl.constexpr, INHIBITOR: tl.constexpr, POWER: tl.constexpr,
    BLOCKS: tl.constexpr, TRANSPOSED: tl.constexpr, NEED_VALUE: tl.constexpr, NEED_WEIGHT: tl.constexpr,
    ACCUMULATE: tl.constexpr, NEED_POINTS: tl.constexpr, HAS_GRAD: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, DTYPE: tl.constexpr,
):
    """own: the points that the segments belong to, of which there are n_own; partners: of each entry the index of its
    point among the others; starts (BLOCKS*n_own + 1): where segments begin; places: where in `values` the entries are,
    None if in order. grad: 0-d factor of the gradients. TRANSPOSED: own are the columns."""
    scale = parameter(numbers, 0, DTYPE)
    exponent = parameter(numbers, 1, DTYPE)
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
                    # an entry's own NaN alone reaches the sums: beyond the end distances are those of any point
                    part = tl.where(inside, t * (-h[c] if TRANSPOSED else g[c]), 0.0)
                    added = added + (sums[c] + part,)
                sums = added
            step += WIDTH

    if NEED_VALUE:
        tl.store(value_parts + tl.program_id(0), tl.sum(tl.sum(value, axis=1), axis=0))
    if NEED_POINTS:
        for c in tl.static_range(COORDINATES):
            tl.store(point_parts + c * n_own + point, tl.sum(sums[c], axis=1)[:, None], mask=exists)
