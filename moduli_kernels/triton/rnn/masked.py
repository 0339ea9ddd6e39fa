"""The ops of the masked RNN. Contracts: moduli_kernels/ops/masked_rnn.py.

Forward: a product for the inputs of all steps, then one launch for the steps. Backward: one launch for the steps, which
leaves dL/da, then a product for each gradient. float64 is left to the reference.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ...ops import masked_rnn as masked_rnn_op
from ..device import TYPES, bytes_of, device_of, numbers_for
from . import shares as shares_table
from .backward import backward_kernel
from .blocked import compressed_rnn
from .forward import forward_kernel
from .sequence_product import multiply
from .steps import Layout, launch_steps


def shares_of(x: Tensor, n: int) -> shares_table.Shares:
    """The shares for n rows and inputs x (T, B, I)."""
    exact = numbers_for(x).PRECISION == "tf32x3"
    return shares_table.shares_for(n, x.shape[1], x.element_size(), exact, device_of(x))


def dense(values: Tensor, crow: Tensor | None, col: Tensor | None, rows: int, columns: int) -> Tensor:
    """The weight that compressed values stand for, or itself."""
    if crow is None:
        return values
    row = torch.repeat_interleave(torch.arange(rows, device=values.device), crow.diff(), output_size=len(values))
    return values.new_zeros(rows, columns).index_put_((row, col), values)


def masked_rnn(x, h, w_ih, w_hh, b_ih, b_hh, mask_ih, mask_hh, crow_ih, col_ih, crow_hh, col_hh, lengths, order_x,
               order_h, nonlinearity, leak, reverse, keep):
    steps, batch, inputs = x.shape
    n = h.shape[1]
    if x.dtype not in TYPES or 0 in (steps, batch, inputs):
        return masked_rnn_op.MASKED_RNN.by_reference(
            x, h, w_ih, w_hh, b_ih, b_hh, mask_ih, mask_hh, crow_ih, col_ih, crow_hh, col_hh, lengths, order_x,
            order_h, nonlinearity, leak, reverse, keep)
    w_ih = dense(w_ih, crow_ih, col_ih, n, inputs)
    if crow_hh is not None:
        return compressed_rnn(x, h, w_ih, w_hh, b_ih, b_hh, mask_ih, crow_hh, col_hh, lengths, nonlinearity, leak,
                              reverse)
    given = multiply(x.view(steps * batch, inputs), w_ih.t(), None if mask_ih is None else mask_ih.t())
    output = x.new_empty(steps, batch, n)
    activations = torch.empty_like(output) if keep and leak != 1 else None
    launch_steps(forward_kernel, (given, h, b_ih, b_hh, w_hh, bytes_of(mask_hh), None, lengths, output, activations), x,
                 shares_of(x, n), Layout(n, batch, 1, n), steps, steps, leak, RELU=nonlinearity == "relu",
                 LEAKY=leak != 1, REVERSE=reverse)
    return output, output[0 if reverse else -1].clone(), x.new_empty(0) if activations is None else activations


def masked_rnn_grads(grad_output, grad_h_n, x, h, w_ih, w_hh, mask_ih, mask_hh, lengths, order_x, order_h, output,
                     activations, nonlinearity, leak, reverse, need_x, need_h, need_w_ih, need_w_hh, need_bias):
    needs = (need_x, need_h, need_w_ih, need_w_hh, need_bias)
    steps, batch, inputs = x.shape
    n = h.shape[1]
    if x.dtype not in TYPES or 0 in (steps, batch, inputs):
        return masked_rnn_op.MASKED_RNN_GRADS.by_reference(
            grad_output, grad_h_n, x, h, w_ih, w_hh, mask_ih, mask_hh, lengths, order_x, order_h, output, activations,
            nonlinearity, leak, reverse, *needs)
    da = torch.empty_like(output)
    dh = torch.empty_like(h) if need_h else None
    passed = None if leak == 1 and lengths is None else torch.empty_like(h, dtype=torch.float32)
    launch_steps(backward_kernel, (grad_output, grad_h_n, w_hh, bytes_of(mask_hh), None, lengths,
                                   output if leak == 1 else activations, da, passed, dh), x, shares_of(x, n),
                 Layout(n, batch, 1, n), steps, steps + need_h, leak, RELU=nonlinearity == "relu", REVERSE=reverse)
    flat = da.view(steps * batch, n)
    dx = dw_ih = dw_hh = bias = None
    if need_x:
        dx = multiply(flat, w_ih, mask_ih).view_as(x)
    if need_w_ih:
        dw_ih = multiply(flat.t(), x.view(steps * batch, inputs), out_mask=mask_ih)
    if need_w_hh:
        # each step's da goes with the state before it: the output one step earlier, and h for the first step
        ends, before, first = (da[:-1], output[1:], da[-1]) if reverse else (da[1:], output[:-1], da[0])
        dw_hh = multiply(ends.view(-1, n).t(), before.view(-1, n), out_mask=mask_hh, more=(first.t(), h))
    if need_bias:
        bias = flat.sum(0)
    return tuple(x.new_empty(0) if grad is None else grad for grad in (dx, dh, dw_ih, dw_hh, bias))
