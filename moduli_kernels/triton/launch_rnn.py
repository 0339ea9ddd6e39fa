"""The ops of the masked RNN on CUDA tensors: allocates and launches. Schemas and contracts: moduli_kernels/_library_rnn.py.

Forward: the product of the inputs, then one launch for all steps. Backward: one launch for all steps, which leaves dL/da,
and a product for each gradient. Nothing is copied to or read from the device; CUDA graphs can capture it. The numbers of
float32 are multiplied as torch.backends.cudnn.rnn.fp32_precision says, which is what governs torch.nn.RNN: "tf32" by
default, else in three tf32 products, about as exact as float32. float64 is left to the reference.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl

from .. import _library, _library_rnn
from . import rnn_table
from .launch import on_device
from .rnn_backward import backward_kernel
from .rnn_forward import forward_kernel
from .rnn_product import product_kernel

if _library.triton_interpreted:
    from . import interpreted  # noqa: F401 - mends the interpreter

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

class Factor(NamedTuple):
    """Of a product: a matrix by its strides, and what to add to it along the depth, if anything."""

    matrix: Tensor
    more: Tensor | None = None


def product(left: Factor, right: Factor, mask: Tensor | None = None, out_mask: Tensor | None = None) -> Tensor:
    """left right, where mask lets right, and out_mask the result, through. All of `left` have the same strides, and so
    has `right`; the mask of a transposed matrix is transposed like it."""
    (a, more_a), (b, more_b) = left, right
    rows, depth, columns = *a.shape, b.shape[1]
    out = a.new_empty(rows, columns)
    if out.numel() == 0:
        return out
    numbers = numbers_for(a)
    aligned = all(stride == 1 or stride % rnn_table.ALIGNED == 0 for stride in (*a.stride(), *b.stride()))
    tile = rnn_table.product_tile(rows, columns, a.element_size(), aligned, device_of(a).multiprocessors)
    with on_device(a):
        product_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns))](
            a, b, bytes_of(mask), more_a, more_b, out, bytes_of(out_mask), rows, columns, depth,
            0 if more_a is None else more_a.shape[1], a.stride(0), a.stride(1), b.stride(0), b.stride(1), **numbers._asdict(),
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, num_warps=tile.warps, num_stages=3,
            enable_fp_fusion=True)
    return out


# --- steps -----------------------------------------------------------------------------------------------------

def launch_steps(kernel, arguments: tuple, x: Tensor, n: int, batch: int, steps: int, last: int, leak: float,
                 **settings) -> None:
    """All steps [0, last) at once, or in the interpreter, where programs cannot wait for each other, one by one.
    arguments: the tensors. States are (steps, batch, n)."""
    numbers = numbers_for(x)
    shares = rnn_table.shares_for(n, batch, x.element_size(), numbers.PRECISION == "tf32x3", *device_of(x))
    at_once = last if on_gpu(x) else 1
    barrier = on_gpu(x) and shares.way != "alone"
    with on_device(x):
        counters = torch.zeros(shares.parts, dtype=torch.int32, device=x.device) if barrier else None
        for begin in range(0, last, at_once):
            kernel[(shares.strips, shares.parts)](
                *arguments, counters, n, batch, shares.tiles, n * batch, 1, n, begin, begin + at_once, steps, leak,
                1 - leak, WAY=shares.way, ROWS=shares.rows, BATCH=shares.batch, DEPTH=shares.depth,
                SPLIT=shares.split, BARRIER=barrier, **numbers._asdict(), **settings, num_warps=shares.warps,
                num_stages=3, launch_cooperative_grid=barrier,
                maxnreg=rnn_table.registers_for(shares.warps), enable_fp_fusion=True)


def dense(values: Tensor, crow: Tensor | None, col: Tensor | None, rows: int, columns: int) -> Tensor:
    """The weight that compressed values stand for, or itself."""
    if crow is None:
        return values
    row = torch.repeat_interleave(torch.arange(rows, device=values.device), crow.diff(), output_size=len(values))
    return values.new_zeros(rows, columns).index_put_((row, col), values)


def masked_rnn(x, h, w_ih, w_hh, b_ih, b_hh, mask_ih, mask_hh, crow_ih, col_ih, crow_hh, col_hh, lengths, nonlinearity,
               leak, reverse, keep):
    steps, batch, inputs = x.shape
    n = h.shape[1]
    if x.dtype not in TYPES or 0 in (steps, batch, inputs):
        return _library_rnn._masked_rnn(x, h, w_ih, w_hh, b_ih, b_hh, mask_ih, mask_hh, crow_ih, col_ih, crow_hh, col_hh,
                                        lengths, nonlinearity, leak, reverse, keep)
    w_ih, w_hh = dense(w_ih, crow_ih, col_ih, n, inputs), dense(w_hh, crow_hh, col_hh, n, n)
    given = product(Factor(x.view(steps * batch, inputs)), Factor(w_ih.t()), None if mask_ih is None else mask_ih.t())
    output = x.new_empty(steps, batch, n)
    activations = torch.empty_like(output) if keep and leak != 1 else None
    launch_steps(forward_kernel, (given, h, b_ih, b_hh, w_hh, bytes_of(mask_hh), lengths, output, activations), x, n,
                 batch, steps, steps, leak, RELU=nonlinearity == "relu", LEAKY=leak != 1, REVERSE=reverse)
    return output, output[0 if reverse else -1].clone(), x.new_empty(0) if activations is None else activations


def masked_rnn_grads(grad_output, grad_h_n, x, h, w_ih, w_hh, mask_ih, mask_hh, lengths, output, activations,
                     nonlinearity, leak, reverse, need_x, need_h, need_w_ih, need_w_hh, need_bias):
    needs = (need_x, need_h, need_w_ih, need_w_hh, need_bias)
    steps, batch, inputs = x.shape
    n = h.shape[1]
    if x.dtype not in TYPES or 0 in (steps, batch, inputs):
        return _library_rnn._masked_rnn_grads(grad_output, grad_h_n, x, h, w_ih, w_hh, mask_ih, mask_hh, lengths, output,
                                              activations, nonlinearity, leak, reverse, *needs)
    da = torch.empty_like(output)
    dh = torch.empty_like(h) if need_h else None
    passed = None if leak == 1 and lengths is None else torch.empty_like(h, dtype=torch.float32)
    launch_steps(backward_kernel, (grad_output, grad_h_n, w_hh, bytes_of(mask_hh), lengths,
                                   output if leak == 1 else activations, da, passed, dh), x, n, batch, steps,
                 steps + need_h, leak, RELU=nonlinearity == "relu", REVERSE=reverse)
    flat = da.view(steps * batch, n)
    dx = dw_ih = dw_hh = bias = None
    if need_x:
        dx = product(Factor(flat), Factor(w_ih), mask_ih).view_as(x)
    if need_w_ih:
        dw_ih = product(Factor(flat.t()), Factor(x.view(steps * batch, inputs)), out_mask=mask_ih)
    if need_w_hh:
        # each step's da with the state before it: output a step on, and h for the first
        ends, before, first = (da[:-1], output[1:], da[-1]) if reverse else (da[1:], output[:-1], da[0])
        dw_hh = product(Factor(ends.view(-1, n).t(), first.t()), Factor(before.view(-1, n), h), out_mask=mask_hh)
    if need_bias:
        bias = flat.sum(0)
    return tuple(x.new_empty(0) if grad is None else grad for grad in (dx, dh, dw_ih, dw_hh, bias))
