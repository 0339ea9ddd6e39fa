"""The penalties of several small weights in two launches instead of two for each.

A layer is a weight and its points. Arguments that differ between layers are tuples, and a program picks those of its
layer. Weights that are large, or convolutions, or have no entries, get launches of their own. Contracts of the ops:
moduli_kernels/ops/grouped.py.
"""
from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops import grouped as grouped_ops
from ...ops.grouped import GroupedArguments
from ...ops.penalty import PenaltyArguments
from ..device import device_of, on_device
from ..math import number
from . import dense, tiles
from .dense import penalty_program
from .finish import PART_CHUNK, POINTS, VALUES, finish_both, point_blocks, sum_value
from .formula import formula_of
from .results import Results
from .scale import scale_each_

LAYERS = 8  # a launch takes no more, since each takes a handful of the kernel's arguments
LARGEST = 1 << 22  # entries of a weight that shares a launch: larger ones keep a GPU busy longer than a launch takes


@triton.jit
def pick(values, layer):
    """Returns values[layer], where values is a tuple of numbers or pointers."""
    picked = values[0]
    for i in tl.static_range(1, len(values)):
        picked = tl.where(layer == i, values[i], picked)
    return picked


@triton.jit
def layer_of(program, firsts):
    """Returns the layer that a program works for, and its number among that layer's programs, the first of which is
    firsts[layer]."""
    layer = 0
    for i in tl.static_range(1, len(firsts)):
        layer += (program >= firsts[i]).to(tl.int32)
    return layer, program - pick(firsts, layer)


@triton.jit
def penalties_kernel(
    # tensors: a tuple has one for each layer
    weights,        # tuple of (n_rows, n_columns), each with its stride
    rows, cols,     # tuples of points
    table,          # a tabulated inhibitor's, or None
    grad,           # a factor of the gradients for each layer; None unless HAS_GRAD
    dweights,       # tuple like weights, contiguous; None unless NEED_WEIGHT
    value_parts,    # one for each program
    row_parts, column_parts,    # each layer's as in penalty_kernel, one after the other; None unless NEED_POINTS
    # programs: the first of each layer, and how many groups of columns each layer has; groups vary first
    firsts, groups,
    # sizes and strides of the layers: columns and strides in units of VECTOR elements
    n_rows, column_vectors, stride_vectors,
    # places of each layer's own in row_parts, column_parts and grad
    row_starts, column_starts, grad_starts,
    # numbers, as `kernel_numbers` sends them: a scale for each layer, the power
    scales, numbers, factor_parameters, inhibitor_parameters,
    # constants, see penalty_kernel; the layers have them in common
    FACTORS: tl.constexpr, COORDINATES: tl.constexpr, INHIBITOR: tl.constexpr, POWER: tl.constexpr,
    BLOCKS: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_POINTS: tl.constexpr, HAS_GRAD: tl.constexpr,
    EVEN: tl.constexpr, PREFETCH: tl.constexpr, VECTOR: tl.constexpr, TILE_ROWS: tl.constexpr, REPEAT: tl.constexpr,
    WIDTH: tl.constexpr, TILES: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
):
    """penalty_program for each layer."""
    layer, program = layer_of(tl.program_id(0), firsts)
    groups_here = pick(groups, layer)
    scale = number(scales, 0, DTYPE)
    for i in tl.static_range(1, len(firsts)):
        scale = tl.where(layer == i, number(scales, i, DTYPE), scale)
    if HAS_GRAD:
        scale = scale * tl.load(grad + pick(grad_starts, layer)).to(DTYPE)
    penalty_program(
        program % groups_here, program // groups_here, groups_here, pick(weights, layer), pick(rows, layer),
        pick(cols, layer), None, table, pick(dweights, layer) if NEED_WEIGHT else None,
        value_parts + pick(firsts, layer), row_parts + pick(row_starts, layer) if NEED_POINTS else None,
        column_parts + pick(column_starts, layer) if NEED_POINTS else None, pick(n_rows, layer),
        pick(column_vectors, layer), pick(stride_vectors, layer), scale, number(numbers, 0, DTYPE),
        factor_parameters, inhibitor_parameters, FACTORS, COORDINATES, INHIBITOR, POWER, BLOCKS, 1, NEED_WEIGHT, False,
        NEED_POINTS, False, EVEN, PREFETCH, VECTOR, TILE_ROWS, REPEAT, WIDTH, TILES, GROUP, DTYPE)


@triton.jit
def finish_penalties_kernel(
    # tensors: points, tuples; parts as penalties_kernel leaves them; results: 0-d, (layers), and tuples like the points
    rows, cols, value_parts, row_parts, column_parts, total, values, drows, dcols,
    # programs: the first of each layer among those that finish points
    firsts,
    # sizes of the layers
    n_rows, n_columns,
    # parts of each layer: where they begin, and how many there are
    value_starts, value_counts, row_starts, row_counts, column_starts, column_counts,
    # constants, see finish_kernel
    FACTORS: tl.constexpr, COORDINATES: tl.constexpr, NEED_VALUE: tl.constexpr, NEED_POINTS: tl.constexpr,
    CONSTANT: tl.constexpr, SHARED: tl.constexpr, CHUNK: tl.constexpr, POINTS: tl.constexpr, VALUES: tl.constexpr,
):
    """Program 0 adds the values of all layers, and those to the total, in float64; each of the others finishes a block
    of points."""
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


# --- launch ----------------------------------------------------------------------------------------------------

class GroupMember(NamedTuple):
    """A weight with its points, and what is computed of it."""

    weight: Tensor
    rows: Tensor
    cols: Tensor | None
    blocks: int
    scale: float
    need_weight: bool
    need_points: bool

    def kind(self) -> tuple | None:
        """Members of one kind can share a launch; None is the kind of those that get their own."""
        if self.weight.dim() > 2 or not 0 < self.weight.numel() <= LARGEST:
            return None
        return (self.weight.dtype, self.weight.device, self.cols is None, self.blocks, self.need_weight,
                self.need_points)

    def arguments(self, a: GroupedArguments) -> PenaltyArguments:
        """Those of the ops of one weight."""
        return PenaltyArguments(
            weight=self.weight, rows=self.rows, cols=self.cols, mask=None, crow_indices=None, col_indices=None,
            table=a.table, factors=a.factors, factor_parameters=a.factor_parameters, inhibitor=a.inhibitor,
            inhibitor_parameters=a.inhibitor_parameters, power=a.power, blocks=self.blocks, scale=self.scale)


def starts_of(counts: list[int]) -> tuple[int, ...]:
    """Where each of several runs of numbers begins, if they follow each other and have these lengths."""
    return tuple(accumulate([0, *counts[:-1]]))


def compute_together(a: GroupedArguments, members: list[GroupMember], grad: Tensor | None, places: tuple[int, ...],
                     need_value: bool) -> tuple[Tensor | None, Tensor | None, list[Results]]:
    """The total, the values and the results of members of one kind, in two launches. places: which number of grad is
    each one's factor."""
    weight, rows, cols, blocks, _, need_weight, need_points = members[0]
    formula, coordinates = formula_of(a, rows), rows.shape[1]
    all_rows = tuple(member.rows for member in members)
    all_cols = tuple(member.rows if member.cols is None else member.cols for member in members)
    n_rows, n_columns = tuple(map(len, all_rows)), tuple(map(len, all_cols))
    total = rows.new_empty(()) if need_value else None
    values = rows.new_empty(len(members)) if need_value else None
    dweights = tuple(torch.empty_like(member.weight, memory_format=torch.contiguous_format) for member in members
                     ) if need_weight else None
    drows = tuple(map(torch.empty_like, all_rows)) if need_points else None
    dcols = tuple(map(torch.empty_like, all_cols)) if need_points and cols is not None else None

    sum_points = need_points and not formula.constant
    tile = tiles.tile_for(device_of(weight).generation, coordinates, formula.curved, sum_points)
    width, repeat = tiles.piece_width(weight), tile.vectors(weight.element_size())
    block = repeat * width
    # strips and groups have the same length in all: that of the member that needs the longest
    own = [tiles.partition_of(r, c, tile, block, sum_points) for r, c in zip(n_rows, n_columns)]
    length, group = max(partition.tiles for partition in own), max(partition.group for partition in own)
    strips = tuple(triton.cdiv(r, length * tile.rows) for r in n_rows)
    groups = tuple(triton.cdiv(c, group * block) for c in n_columns)
    programs = [s * g for s, g in zip(strips, groups)]
    firsts = starts_of(programs)
    row_sizes = [g * coordinates * r for g, r in zip(groups, n_rows)]
    column_sizes = [s * coordinates * c for s, c in zip(strips, n_columns)]
    row_starts, column_starts = starts_of(row_sizes), starts_of(column_sizes)
    value_parts = rows.new_empty(sum(programs))
    row_parts = rows.new_empty(sum(row_sizes)) if sum_points else None
    column_parts = rows.new_empty(sum(column_sizes)) if sum_points else None

    strides = [tiles.row_stride(member.weight) for member in members]
    vector = min(tiles.vector_length(member.weight, dweights[i] if need_weight else None, n_columns[i], strides[i])
                 for i, member in enumerate(members))
    limited = formula.dtype == torch.float32 and a.table is None and vector > 1
    with on_device(weight):
        penalties_kernel[(sum(programs),)](
            tuple(member.weight for member in members), all_rows, all_cols, a.table, grad, dweights,
            value_parts, row_parts, column_parts,
            firsts, groups,
            n_rows, tuple(c // vector for c in n_columns), tuple(s // vector for s in strides),
            row_starts, column_starts, None if grad is None else tuple(place * grad.stride(0) for place in places),
            formula.numbers(*(member.scale for member in members)), formula.numbers(a.power),
            formula.factor_parameters, formula.inhibitor_parameters,
            **formula.constants, POWER=formula.power,
            BLOCKS=blocks, NEED_WEIGHT=need_weight, NEED_POINTS=sum_points, HAS_GRAD=grad is not None,
            EVEN=all(r % (length * tile.rows) == 0 and c % (group * block) == 0 for r, c in zip(n_rows, n_columns)),
            PREFETCH=tile.prefetch and blocks == 1 and a.table is None, VECTOR=vector, TILE_ROWS=tile.rows,
            REPEAT=repeat, WIDTH=width, TILES=length, GROUP=group,
            num_warps=tile.warps, maxnreg=tile.registers if limited else None, enable_fp_fusion=True,
        )
        if need_value or need_points:
            finishing = [point_blocks(r, c, cols is None) if need_points else 0 for r, c in zip(n_rows, n_columns)]
            finish_penalties_kernel[(1 + sum(finishing),)](
                all_rows, all_cols, value_parts, row_parts, column_parts, total, values, drows, dcols,
                starts_of(finishing),
                n_rows, n_columns,
                firsts, tuple(programs), row_starts, groups, column_starts, strips,
                FACTORS=formula.factors, COORDINATES=coordinates, NEED_VALUE=need_value, NEED_POINTS=need_points,
                CONSTANT=formula.constant, SHARED=cols is None, CHUNK=PART_CHUNK, POINTS=POINTS, VALUES=VALUES,
                num_warps=4, enable_fp_fusion=True,
            )
    none = (None,) * len(members)
    return total, values, list(map(Results, values.unbind() if need_value else none, dweights or none, drows or none,
                                   dcols or none))


def compute(a: GroupedArguments, grad: Tensor | None, need_value: bool, need_weight: list[bool],
            need_points: list[bool]) -> tuple[Tensor | None, Tensor | None, list[Results]]:
    """The total, the values (layers,) and the results of each layer. grad: a factor of the gradients for each."""
    members = [GroupMember(*member)
               for member in zip(a.weights, a.rows, a.cols, a.blocks, a.scales, need_weight, need_points)]
    alike: dict[tuple | None, list[int]] = {}
    for i, member in enumerate(members):
        alike.setdefault(member.kind(), []).append(i)
    results: dict[int, Results] = {}
    for kind, numbers in alike.items():
        step = 1 if kind is None else LAYERS
        for here in (numbers[first:first + step] for first in range(0, len(numbers), step)):
            if len(here) == 1:
                i, = here
                results[i] = dense.compute(members[i].arguments(a), None if grad is None else grad[i], need_value,
                                           need_weight[i], need_points[i])
                continue
            total, values, made = compute_together(a, [members[i] for i in here], grad, tuple(here), need_value)
            if len(here) == len(members):
                return total, values, made
            results.update(zip(here, made))
    in_order = [results[i] for i in range(len(members))]
    values = torch.stack([r.value for r in in_order]) if need_value else None
    return values.sum() if need_value else None, values, in_order


def gradients_of_each(a: GroupedArguments, results: list[Results]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The gradients as the ops return them: those not asked for have no elements."""
    return ([w.new_empty(0) if r.weight is None else r.weight for w, r in zip(a.weights, results)],
            [p.new_empty(0) if r.rows is None else r.rows for p, r in zip(a.rows, results)],
            [p.new_empty(0) if r.cols is None else r.cols for p, r in zip(a.rows, results)])


# --- the ops ---------------------------------------------------------------------------------------------------

def penalties_with_grads(*arguments) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    a, need_weight, need_points = grouped_ops.PENALTIES_WITH_GRADS.grouped(arguments)
    total, values, results = compute(a, None, True, need_weight, need_points)
    return (total, values, *gradients_of_each(a, results))


def penalties_grads(*arguments) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    grad, a, need_weight, need_points = grouped_ops.PENALTIES_GRADS.grouped(arguments)
    _, _, results = compute(a, grad, False, need_weight, need_points)
    return gradients_of_each(a, results)


def scale_penalties_grads_(grads: list[Tensor], grad: Tensor, layers: list[int]) -> None:
    scale_each_(grads, grad, [layer * grad.stride(0) for layer in layers])
