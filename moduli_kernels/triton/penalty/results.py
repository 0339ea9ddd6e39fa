"""The ops on CUDA tensors: unpacks arguments, allocates, launches. Schemas: moduli_kernels/ops/penalty.py.

Two launches a call, nothing is copied to or read from the device: numbers travel as kernel arguments, `grad` is read
by the kernels. Safe inside CUDA-graph capture; runs on the tensors' device and its current stream.
"""
from __future__ import annotations

import contextlib
from collections import namedtuple
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops import penalty as penalty_ops
from .. import inhibitors, manifolds
from .dense import LANES, penalty_kernel
from .finish import finish_kernel
from .scale import scale_kernel
from .tiles import shares_for, tile_for

VECTOR_BYTES = 16
SCALE_BLOCK, SCALE_PROGRAMS, SCALE_TENSORS = 4096, 1024, 24
FINISH_CHUNK, FINISH_POINTS, FINISH_VALUES = 32, 32, 1024
# What Triton's interpreter, on the CPU, takes the place of.
INTERPRETED_CAPABILITY = 9


# Those of the ops, by their names in the schema.
Arguments = namedtuple("Arguments", [argument.split()[-1] for argument in penalty_ops.PENALTY.split(", ")])


class Results(NamedTuple):
    """None where not asked for."""

    value: Tensor | None
    weight: Tensor | None
    rows: Tensor | None
    cols: Tensor | None


def parameters(values: list[float], dtype: torch.dtype) -> tuple[float, ...]:
    """Numbers as kernel arguments, which are floats in single precision: for float64 three that sum to each."""
    if dtype != torch.float64:
        return tuple(values)
    parts = []
    for value in values:
        for _ in range(3):
            part = torch.tensor(value, dtype=torch.float32).item()
            parts.append(part)
            value -= part
    return tuple(parts)


def factors(codes: list[int], periods: list[float]) -> tuple[tuple[tuple[int, int, int, int], ...], list[float]]:
    """FACTORS of manifolds.py and their parameters, from those of moduli_kernels/_encoding.py: FLAT factors fall into
    runs of periodic and of other axes."""
    out, kept, column, at = [], [], 0, 0
    for kind, columns in zip(codes[::2], codes[1::2]):
        if kind != manifolds.FLAT.value:
            count = 1 if kind == manifolds.SPHERE.value else 2
            out.append((kind, column, columns, len(kept)))
            kept += periods[at:at + count]
            at += count
        else:
            for c, period in enumerate(periods[at:at + columns]):
                run = manifolds.FLAT.value if period else manifolds.LINE.value
                if c and out[-1][0] == run:
                    out[-1] = (*out[-1][:2], out[-1][2] + 1, out[-1][3])
                else:
                    out.append((run, column + c, 1, len(kept)))
                if period:
                    kept.append(period)
            at += columns
        column += columns
    return tuple(out), kept


def vector_length(weight: Tensor, dweight: Tensor | None, columns: int, stride: int) -> int:
    """Elements that can be read and written at once: 16 bytes where every row begins at a multiple of them."""
    vector = VECTOR_BYTES // weight.element_size()
    tensors = [weight] if dweight is None else [weight, dweight]
    aligned = columns % vector == 0 and stride % vector == 0 and all(t.data_ptr() % VECTOR_BYTES == 0 for t in tensors)
    return vector if aligned else 1


def on_device(tensor: Tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def capability(tensor: Tensor) -> int:
    """Major compute capability; known to torch without asking the device."""
    return torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else INTERPRETED_CAPABILITY


def results_for(a: Arguments, need_value: bool, need_weight: bool, need_points: bool, into: Tensor | None) -> Results:
    """Memory for what is asked for, `into` for dW where given; 0 where the weight has no entries."""
    dweight = into
    if need_weight and into is None:
        dweight = torch.empty_like(a.weight, memory_format=torch.contiguous_format)
    results = Results(a.rows.new_empty(()) if need_value else None, dweight,
                      torch.empty_like(a.rows) if need_points else None,
                      torch.empty_like(a.cols) if need_points and a.cols is not None else None)
    if a.weight.numel() == 0:
        for tensor in (results.value, results.rows, results.cols):
            if tensor is not None:
                tensor.zero_()
    return results


def finish(a: Arguments, results: Results, parts: Tensor | None, row_parts: Tensor | None, column_parts: Tensor | None,
           groups: int, strips: int, kinds: tuple, constant: bool, chunk: int) -> None:
    """Adds the parts of value and points, where they are asked for; the launch after the one that made them."""
    value, rows, cols = results.value, a.rows, a.rows if a.cols is None else a.cols
    need_points = results.rows is not None
    if value is None and not need_points:
        return
    blocks = 0
    if need_points:
        blocks = triton.cdiv(len(rows), FINISH_POINTS)
        blocks += 0 if a.cols is None else triton.cdiv(len(cols), FINISH_POINTS)
    finish_kernel[(1 + blocks,)](
        rows, cols, parts, row_parts, column_parts, value, results.rows, results.cols, len(rows), len(cols),
        0 if parts is None else parts.numel(), groups, strips, FACTORS=kinds, COORDINATES=rows.shape[1],
        NEED_VALUE=value is not None, NEED_POINTS=need_points, CONSTANT=constant, SHARED=a.cols is None, CHUNK=chunk,
        POINTS=FINISH_POINTS, VALUES=FINISH_VALUES, num_warps=4, enable_fp_fusion=True,
    )


def launch(a: Arguments, grad: Tensor | None, need_value: bool, need_weight: bool, need_points: bool,
           into: Tensor | None = None) -> Results:
    """into: a gradient of the weight, contiguous, to which dW is added; else one is made."""
    if a.crow_indices is not None:
        from . import launch_kept

        return launch_kept.launch(a, grad, need_value, need_weight, need_points, into)
    weight, rows = a.weight, a.rows
    cols = rows if a.cols is None else a.cols
    results = results_for(a, need_value, need_weight, need_points, into)
    dweight = results.weight
    if weight.numel() == 0:
        return results

    dtype = rows.dtype
    n_rows, n_columns, coordinates = rows.shape[0], cols.shape[0], rows.shape[1]
    inner = weight[0, 0].numel()
    kinds, periods = factors(a.factors, a.factor_parameters)
    samples = 0 if a.table is None else a.table.shape[0]
    code, constants = inhibitors.constants(a.inhibitor, a.inhibitor_parameters, samples)
    constant = code == inhibitors.CONSTANT.value
    sum_points = need_points and not constant
    # a constant inhibitor does not look at distances: one coordinate tells whether the points are finite
    seen = ((manifolds.LINE.value, 0, 1, 0),) if constant else kinds

    curved = any(factor[0] in (manifolds.SPHERE.value, manifolds.KLEIN.value) for factor in seen)
    tile = tile_for(capability(weight), coordinates, curved, sum_points)
    width = LANES.value * VECTOR_BYTES // weight.element_size()
    repeat = tile.vectors(weight.element_size())
    block = repeat * width
    shares = shares_for(n_rows, n_columns, tile, block, sum_points)
    stride = weight.stride(0) if weight.shape[0] > 1 else n_columns * inner
    vector = vector_length(weight, dweight, n_columns, stride) if inner == 1 else 1
    even = n_rows % (shares.tiles * tile.rows) == 0 and n_columns % (shares.group * block) == 0
    # the loads of a table leave no registers for it
    prefetch = tile.prefetch and a.blocks == 1 and inner == 1 and a.mask is None and a.table is None
    registers = tile.registers if dtype == torch.float32 and inner == 1 and a.table is None else None
    parts = rows.new_empty(shares.strips * shares.groups)
    row_parts = rows.new_empty(shares.groups * coordinates * n_rows) if sum_points else None
    column_parts = rows.new_empty(shares.strips * coordinates * n_columns) if sum_points else None
    with on_device(weight):
        penalty_kernel[(shares.groups, shares.strips)](
            weight, rows, cols, None if a.mask is None else a.mask.view(torch.uint8), a.table, grad, dweight, parts,
            row_parts, column_parts, n_rows, n_columns // vector, stride // vector,
            parameters([a.scale, a.power], dtype), parameters(periods, dtype), parameters(constants, dtype),
            FACTORS=seen, COORDINATES=coordinates, INHIBITOR=code,
            POWER=int(a.power) if a.power in (1, 2) else 0, BLOCKS=a.blocks, INNER=inner,
            NEED_WEIGHT=need_weight, ACCUMULATE=into is not None, NEED_POINTS=sum_points,
            HAS_MASK=a.mask is not None, HAS_GRAD=grad is not None, EVEN=even, PREFETCH=prefetch, VECTOR=vector,
            TILE_ROWS=tile.rows, REPEAT=repeat, WIDTH=width, TILES=shares.tiles, GROUP=shares.group,
            DTYPE=tl.float64 if dtype == torch.float64 else tl.float32, num_warps=tile.warps,
            maxnreg=registers, enable_fp_fusion=True,
        )
        finish(a, results, parts, row_parts, column_parts, shares.groups, shares.strips, kinds, constant, FINISH_CHUNK)
    return results


def _present(a: Arguments, results: Results) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, without elements where not asked for."""
    return (a.weight.new_empty(0) if results.weight is None else results.weight,
            a.rows.new_empty(0) if results.rows is None else results.rows,
            a.rows.new_empty(0) if results.cols is None else results.cols)


def penalty(*arguments) -> Tensor:
    return launch(Arguments(*arguments), None, True, False, False).value


def penalty_with_grads(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *rest, need_weight, need_points = arguments
    a = Arguments(*rest)
    results = launch(a, None, True, need_weight, need_points)
    return (results.value, *_present(a, results))


def penalty_grads(grad: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    *rest, need_weight, need_points = arguments
    a = Arguments(*rest)
    return _present(a, launch(a, grad, False, need_weight, need_points))


def accumulate_penalty_grad_(grad: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    """grad (like weight, contiguous) += dW, in the same pass; value and the gradients of the points."""
    *rest, need_points = arguments
    a = Arguments(*rest)
    results = launch(a, None, True, True, need_points, grad)
    _, *points = _present(a, results)
    return (results.value, *points)


def scale_grads_(grads: list[Tensor], grad: Tensor) -> None:
    scale_each_(grads, grad, [0] * len(grads))


def scale_each_(grads: list[Tensor], factors: Tensor, offsets: list[int]) -> None:
    """Each of the grads (contiguous) times the number that lies at its offset from the first of factors; up to
    SCALE_TENSORS a launch."""
    pairs = [(g, offset) for g, offset in zip(grads, offsets) if g.numel()]
    for first in range(0, len(pairs), SCALE_TENSORS):
        tensors, here = zip(*pairs[first:first + SCALE_TENSORS])
        sizes = tuple(g.numel() for g in tensors)
        with on_device(factors):
            scale_kernel[(min(SCALE_PROGRAMS, triton.cdiv(max(sizes), SCALE_BLOCK)),)](
                tensors, sizes, factors, OFFSETS=here, BLOCK=SCALE_BLOCK, num_warps=8, enable_fp_fusion=True)
