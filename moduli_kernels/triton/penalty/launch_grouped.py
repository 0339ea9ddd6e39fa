"""The ops of several weights on CUDA tensors: small ones of one kind share two launches. Schemas and contracts:
moduli_kernels/ops/penalty.py."""
from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops import grouped as grouped_ops
from .. import inhibitors, manifolds
from .dense import LANES
from .grouped import finish_penalties_kernel, penalties_kernel
from .launch import (
    FINISH_CHUNK,
    FINISH_POINTS,
    FINISH_VALUES,
    VECTOR_BYTES,
    Arguments,
    Results,
    capability,
    factors,
    launch as launch_one,
    on_device,
    parameters,
    scale_each_,
    vector_length,
)
from .tiles import shares_for, tile_for

LAYERS = 8  # of a launch, at most: each takes a handful of kernel arguments
LARGEST = 1 << 22  # entries of a weight that shares a launch: larger ones keep a GPU busy longer than a launch takes

Several = grouped_ops.GroupedArguments


class Layer(NamedTuple):
    """A weight, its points, and what is computed of it."""

    weight: Tensor
    rows: Tensor
    cols: Tensor | None
    blocks: int
    scale: float
    need_weight: bool
    need_points: bool

    def kind(self) -> tuple | None:
        """Layers alike in it share a launch; None of one that has its own."""
        if self.weight.dim() > 2 or not 0 < self.weight.numel() <= LARGEST:
            return None
        return (self.weight.dtype, self.weight.device, self.cols is None, self.blocks, self.need_weight,
                self.need_points)


def layers_of(a: Several, need_weight: list[bool], need_points: list[bool]) -> list[Layer]:
    return [Layer(*layer) for layer in zip(a.weights, a.rows, a.cols, a.blocks, a.scales, need_weight, need_points)]


def launch_alone(a: Several, layer: Layer, grad: Tensor | None, need_value: bool) -> Results:
    arguments = Arguments(layer.weight, layer.rows, layer.cols, None, None, None, a.table, a.factors,
                          a.factor_parameters, a.inhibitor, a.inhibitor_parameters, a.power, layer.blocks, layer.scale)
    return launch_one(arguments, grad, need_value, layer.need_weight, layer.need_points)


def starts_of(counts: list[int]) -> tuple[int, ...]:
    """Where each begins, of so many numbers side by side."""
    return tuple(accumulate([0, *counts[:-1]]))


def launch_together(a: Several, layers: list[Layer], grad: Tensor | None, places: tuple[int, ...],
                    need_value: bool) -> tuple[Tensor | None, Tensor | None, list[Results]]:
    """The total, the values and the results of layers of one kind, in two launches. places: of each layer's factor in
    grad."""
    weight, rows, cols, blocks, _, need_weight, need_points = layers[0]
    dtype, coordinates = rows.dtype, rows.shape[1]
    all_rows = tuple(layer.rows for layer in layers)
    all_cols = tuple(layer.rows if layer.cols is None else layer.cols for layer in layers)
    n_rows, n_columns = tuple(map(len, all_rows)), tuple(map(len, all_cols))
    total = rows.new_empty(()) if need_value else None
    values = rows.new_empty(len(layers)) if need_value else None
    dweights = tuple(torch.empty_like(layer.weight, memory_format=torch.contiguous_format) for layer in layers
                     ) if need_weight else None
    drows = tuple(map(torch.empty_like, all_rows)) if need_points else None
    dcols = tuple(map(torch.empty_like, all_cols)) if need_points and cols is not None else None

    kinds, periods = factors(a.factors, a.factor_parameters)
    code, constants = inhibitors.constants(a.inhibitor, a.inhibitor_parameters, 0 if a.table is None else len(a.table))
    constant = code == inhibitors.CONSTANT.value
    sum_points = need_points and not constant
    seen = ((manifolds.LINE.value, 0, 1, 0),) if constant else kinds  # as for one weight
    curved = any(factor[0] in (manifolds.SPHERE.value, manifolds.KLEIN.value) for factor in seen)
    tile = tile_for(capability(weight), coordinates, curved, sum_points)
    width = LANES.value * VECTOR_BYTES // weight.element_size()
    repeat = tile.vectors(weight.element_size())
    block = repeat * width
    # one length of strips and groups for all: that of the layer that needs the longest
    own = [shares_for(r, c, tile, block, sum_points) for r, c in zip(n_rows, n_columns)]
    tiles, group = max(shares.tiles for shares in own), max(shares.group for shares in own)
    strips = tuple(triton.cdiv(r, tiles * tile.rows) for r in n_rows)
    groups = tuple(triton.cdiv(c, group * block) for c in n_columns)
    programs = [s * g for s, g in zip(strips, groups)]
    firsts = starts_of(programs)
    row_sizes = [g * coordinates * r for g, r in zip(groups, n_rows)]
    column_sizes = [s * coordinates * c for s, c in zip(strips, n_columns)]
    row_starts, column_starts = starts_of(row_sizes), starts_of(column_sizes)
    value_parts = rows.new_empty(sum(programs))
    row_parts = rows.new_empty(sum(row_sizes)) if sum_points else None
    column_parts = rows.new_empty(sum(column_sizes)) if sum_points else None

    strides = [layer.weight.stride(0) if len(layer.weight) > 1 else c for layer, c in zip(layers, n_columns)]
    vector = min(vector_length(layer.weight, dweights[i] if need_weight else None, n_columns[i], strides[i])
                 for i, layer in enumerate(layers))
    even = all(r % (tiles * tile.rows) == 0 and c % (group * block) == 0 for r, c in zip(n_rows, n_columns))
    with on_device(weight):
        penalties_kernel[(sum(programs),)](
            tuple(layer.weight for layer in layers), all_rows, all_cols, a.table, grad, dweights, value_parts,
            row_parts, column_parts, firsts, groups, n_rows, tuple(c // vector for c in n_columns),
            tuple(s // vector for s in strides), row_starts, column_starts,
            None if grad is None else tuple(place * grad.stride(0) for place in places),
            parameters([layer.scale for layer in layers], dtype), parameters([a.power], dtype),
            parameters(periods, dtype), parameters(constants, dtype),
            FACTORS=seen, COORDINATES=coordinates, INHIBITOR=code,
            POWER=int(a.power) if a.power in (1, 2) else 0, BLOCKS=blocks, NEED_WEIGHT=need_weight,
            NEED_POINTS=sum_points, HAS_GRAD=grad is not None, EVEN=even,
            PREFETCH=tile.prefetch and blocks == 1 and a.table is None, VECTOR=vector, TILE_ROWS=tile.rows,
            REPEAT=repeat, WIDTH=width, TILES=tiles, GROUP=group,
            DTYPE=tl.float64 if dtype == torch.float64 else tl.float32, num_warps=tile.warps,
            maxnreg=tile.registers if dtype == torch.float32 and a.table is None and vector > 1 else None,
            enable_fp_fusion=True,
        )
        if need_value or need_points:
            point_blocks = [0] * len(layers)
            if need_points:
                point_blocks = [triton.cdiv(r, FINISH_POINTS) + (0 if cols is None else triton.cdiv(c, FINISH_POINTS))
                                for r, c in zip(n_rows, n_columns)]
            finish_penalties_kernel[(1 + sum(point_blocks),)](
                all_rows, all_cols, value_parts, row_parts, column_parts, total, values, drows, dcols,
                starts_of(point_blocks), n_rows, n_columns, firsts, tuple(programs), row_starts, groups, column_starts,
                strips, FACTORS=kinds, COORDINATES=coordinates, NEED_VALUE=need_value, NEED_POINTS=need_points,
                CONSTANT=constant, SHARED=cols is None, CHUNK=FINISH_CHUNK, POINTS=FINISH_POINTS, VALUES=FINISH_VALUES,
                num_warps=4, enable_fp_fusion=True,
            )
    none = (None,) * len(layers)
    return total, values, list(map(Results, values.unbind() if need_value else none, dweights or none, drows or none,
                                   dcols or none))


def launch(a: Several, grad: Tensor | None, need_value: bool, need_weight: list[bool],
           need_points: list[bool]) -> tuple[Tensor | None, Tensor | None, list[Results]]:
    """The total, the values (L,) and the results of each layer."""
    layers = layers_of(a, need_weight, need_points)
    alike: dict[tuple | None, list[int]] = {}
    for i, layer in enumerate(layers):
        alike.setdefault(layer.kind(), []).append(i)
    results: dict[int, Results] = {}
    for kind, members in alike.items():
        step = 1 if kind is None else LAYERS
        for here in (members[first:first + step] for first in range(0, len(members), step)):
            if len(here) == 1:
                i, = here
                results[i] = launch_alone(a, layers[i], None if grad is None else grad[i], need_value)
                continue
            total, values, made = launch_together(a, [layers[i] for i in here], grad, tuple(here), need_value)
            if len(here) == len(layers):
                return total, values, made
            results.update(zip(here, made))
    in_order = [results[i] for i in range(len(layers))]
    values = torch.stack([r.value for r in in_order]) if need_value else None
    return values.sum() if need_value else None, values, in_order


def _present(a: Several, results: list[Results]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The gradients, without elements where not asked for."""
    return ([w.new_empty(0) if r.weight is None else r.weight for w, r in zip(a.weights, results)],
            [p.new_empty(0) if r.rows is None else r.rows for p, r in zip(a.rows, results)],
            [p.new_empty(0) if r.cols is None else r.cols for p, r in zip(a.rows, results)])


def penalties_with_grads(*arguments) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    *rest, need_weight, need_points = arguments
    a = Several(*rest)
    total, values, results = launch(a, None, True, need_weight, need_points)
    return (total, values, *_present(a, results))


def penalties_grads(grad: Tensor, *arguments) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    *rest, need_weight, need_points = arguments
    a = Several(*rest)
    return _present(a, launch(a, grad, False, need_weight, need_points)[2])


def scale_penalties_grads_(grads: list[Tensor], grad: Tensor, layers: list[int]) -> None:
    scale_each_(grads, grad, [layer * grad.stride(0) for layer in layers])
