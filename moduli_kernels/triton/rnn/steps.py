"""What the launchers of the masked RNN share: numbers and devices, products over a sequence, its steps in one launch.

Nothing is copied to or read from the device; CUDA graphs can capture it. The numbers of float32 are multiplied as
torch.backends.cudnn.rnn.fp32_precision says, which is what governs torch.nn.RNN: "tf32" by default, else in three tf32
products, about as exact as float32.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import runtime
from ...ops.blocked_rnn import PITCH as VECTOR
from ..penalty.launch import on_device
from . import shares as tables
from .product import product_kernel

if runtime.triton_interpreted:
    from .. import interpreted  # noqa: F401 - mends the interpreter


class Device(NamedTuple):
    """Known to torch without asking the GPU. shared: bytes of shared memory that a program may have."""

    multiprocessors: int
    shared: int


INTERPRETED = Device(132, 227 * 1024)  # what Triton's interpreter, on the CPU, takes the place of
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Numbers(NamedTuple):
    """Of what the products are made: constants of the kernels."""

    DOT: tl.dtype
    PRECISION: str


def on_gpu(x: Tensor) -> bool:
    """Else in the interpreter."""
    return x.is_cuda


def numbers_for(x: Tensor) -> Numbers:
    exact = x.dtype == torch.float32 and torch.backends.cudnn.rnn.fp32_precision != "tf32"
    # the interpreter multiplies the bits of 16-bit numbers
    return Numbers(TYPES[x.dtype] if on_gpu(x) else tl.float32, "tf32x3" if exact else "tf32")


def device_of(x: Tensor) -> Device:
    if not x.is_cuda:
        return INTERPRETED
    properties = torch.cuda.get_device_properties(x.device)
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin)


def bytes_of(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


# --- products --------------------------------------------------------------------------------------------------

class Fold(NamedTuple):
    """The axis of all steps and all of the batch, where operands differ along it: see rnn_product.py. *_outer: numbers
    from step to step. out_batch: elements of the batch in the result."""

    axis: str
    steps: int
    batch: int
    pitch: int
    a_outer: int = 0
    b_outer: int = 0
    out_outer: int = 0
    out_batch: int = 0


def product(a: Tensor, b: Tensor, mask: Tensor | None = None, out_mask: Tensor | None = None,
            more: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """a b, where mask lets b, and out_mask the result, through, and added to it the product of `more`: matrices with
    the same strides as a and b. The mask of a transposed matrix is transposed like it."""
    out = a.new_empty(a.shape[0], b.shape[1])
    launch_product(a, b, out, a.shape[1], mask, out_mask, more, None)
    return out


def launch_product(a: Tensor, b: Tensor, out: Tensor, depth: int, mask: Tensor | None, out_mask: Tensor | None,
                   more: tuple[Tensor, Tensor] | None, fold: Fold | None) -> None:
    """Into out (rows, columns). Folded, a matrix is given as its first step."""
    rows, columns = out.shape
    if fold is not None and fold.axis == "rows":
        rows = fold.steps * fold.pitch
    if rows * columns == 0:
        return
    more_a, more_b = more or (None, None)
    aligned = all(stride == 1 or stride % tables.ALIGNED == 0 for stride in (*a.stride(), *b.stride()))
    device, vector = device_of(a), 1 if fold is None else VECTOR
    tile = tables.product_tile(rows, columns, a.element_size(), aligned, device.multiprocessors)
    f = fold or Fold("", 0, 0, 0)
    with on_device(a):
        product_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns))](
            a, b, bytes_of(mask), more_a, more_b, out, bytes_of(out_mask), rows, columns, depth,
            0 if more_a is None else more_a.shape[1], *a.stride(), f.a_outer, *b.stride(), f.b_outer, *out.stride(),
            f.out_outer, f.batch, f.out_batch, f.pitch // vector, FOLD=f.axis or None, VECTOR=vector,
            **numbers_for(a)._asdict(), ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, num_warps=tile.warps,
            num_stages=3, maxnreg=tables.registers_for(tile.warps), enable_fp_fusion=True)


# --- steps -----------------------------------------------------------------------------------------------------

class Layout(NamedTuple):
    """Of the states of a step: (n, batch) by strides, in `size` numbers. vector: divides batch, size and stride_row."""

    n: int
    batch: int
    stride_row: int
    stride_batch: int
    vector: int = 1

    @property
    def size(self) -> int:
        return self.n * self.batch


def launch_steps(kernel, arguments: tuple, x: Tensor, shares: tables.Shares, layout: Layout, steps: int, last: int,
                 leak: float, **settings) -> None:
    """All steps [0, last) at once, or in the interpreter, where programs cannot wait for each other, one by one, unless
    there is but one along the rows. arguments: the tensors."""
    at_once = last if on_gpu(x) or shares.strips == 1 else 1
    barrier = on_gpu(x) and shares.way != "alone"
    vector = layout.vector
    with on_device(x):
        counters = torch.zeros(shares.parts, dtype=torch.int32, device=x.device) if barrier else None
        for begin in range(0, last, at_once):
            kernel[(shares.strips, shares.parts)](
                *arguments, counters, layout.n, layout.batch // vector, shares.tiles, layout.size // vector,
                layout.stride_row // vector, layout.stride_batch, begin, begin + at_once, steps, leak, 1 - leak,
                WAY=shares.way, ROWS=shares.rows, BATCH=shares.batch, DEPTH=shares.depth, MORE=shares.more,
                SPLIT=shares.split, ENTRIES=shares.entries, VECTOR=vector, BARRIER=barrier,
                **numbers_for(x)._asdict(), **settings, num_warps=shares.warps, num_stages=shares.stages,
                launch_cooperative_grid=barrier, maxnreg=tables.registers_for(shares.warps), enable_fp_fusion=True)
