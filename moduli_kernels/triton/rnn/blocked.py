"""The ops of the masked RNN whose hidden weight is walked by a block layout of its mask. Contracts:
moduli_kernels/ops/blocked_rnn.py.

The same launches as in masked.py, on states along the batch, (T, n, pitch): pitch is the batch rounded up to whole
vectors.
"""
from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...ops import blocked_rnn as blocked_rnn_op
from ...ops.block_layout import Lists, gather_blocks
from ...ops.blocked_rnn import PITCH, along_the_batch, unflat
from ..device import TYPES, device_of
from .backward import backward_kernel
from .block_product import Kept
from .forward import forward_kernel
from .sampled import sampled_gradient
from .sequence_product import Fold, multiply, multiply_into
from .shares import kept_shares
from .steps import Layout, launch_steps

STRAY_COST = 64  # products of a whole matrix that take as long as one product of a stray, over a sequence


def kept_of(lists: Lists, order: Tensor, blocks: Tensor, strays: Tensor) -> Kept:
    """The kernel's argument `kept`. order: of the rows; blocks (blocks, side, side) and strays (strays): values."""
    whole = (blocks, lists.starts, lists.places, lists.partners) if len(blocks) else (None,) * 4
    single = (strays, lists.stray_starts, lists.stray_places, lists.stray_partners) if len(strays) else (None,) * 4
    return Kept(order if len(blocks) else None, *whole, *single)


def launch_kept_steps(kernel, before: tuple, kept: Kept, after: tuple, x: Tensor, n: int, pitch: int, side: int,
                      last: int, leak: float, **constants) -> None:
    """launch_steps over kept entries. before, after: the kernel's tensors up to `weight`, and after `kept`."""
    strays = 0 if kept.strays is None else len(kept.strays)
    shares = kept_shares(n, pitch, None if kept.blocks is None else side, strays, x.element_size(), device_of(x))
    no_weight, no_mask = None, None
    launch_steps(kernel, (*before, no_weight, no_mask, tuple(kept), *after), x, shares,
                 Layout(n, pitch, pitch, 1, PITCH), x.shape[0], last, leak, **constants)


def inputs_of(x: Tensor, w_ih: Tensor, mask_ih: Tensor | None) -> Tensor:
    """W_ih x of all steps, (T, n, pitch), 0 beyond the batch."""
    (steps, batch, inputs), n = x.shape, w_ih.shape[0]
    out = x.new_empty(steps, n, triton.cdiv(batch, PITCH) * PITCH)
    pitch = out.shape[2]
    fold = Fold("rows", steps, batch, pitch, a_outer=batch * inputs, out_outer=n * pitch, out_batch=pitch)
    multiply_into(out[0].t(), x[0], w_ih.t(), inputs, None if mask_ih is None else mask_ih.t(), fold=fold)
    return out


def gradients_of_inputs(da: Tensor, x: Tensor, w_ih: Tensor, mask_ih: Tensor | None, need_x: bool,
                        need_w: bool) -> tuple[Tensor | None, Tensor | None]:
    """dx and dW_ih from da (T, n, pitch), None where not needed."""
    (steps, batch, inputs), (n, pitch) = x.shape, da.shape[1:]
    dx = dw = None
    if need_x:
        dx = torch.empty_like(x)
        fold = Fold("rows", steps, batch, pitch, a_outer=n * pitch, out_outer=batch * inputs, out_batch=batch)
        multiply_into(dx[0], da[0].t(), w_ih, n, mask_ih, fold=fold)
    if need_w:
        dw = torch.empty_like(w_ih)
        fold = Fold("depth", steps, batch, pitch, a_outer=n * pitch, b_outer=batch * inputs)
        multiply_into(dw, da[0], x[0], steps * pitch, out_mask=mask_ih, fold=fold)
    return dx, dw


def blocked_rnn(x, h, w_ih, w_hh, b_ih, b_hh, mask_ih, mask_hh, layout, side, lengths, nonlinearity, leak, reverse,
                keep):
    steps, batch, inputs = x.shape
    n = h.shape[1]
    if x.dtype not in TYPES or 0 in (steps, batch, inputs):
        return blocked_rnn_op.BLOCKED_RNN.by_reference(
            x, h, w_ih, w_hh, b_ih, b_hh, mask_ih, mask_hh, layout, side, lengths, nonlinearity, leak, reverse, keep)
    where = unflat(layout, side)
    given = inputs_of(x, w_ih, mask_ih)
    states = torch.empty_like(given)
    activations = torch.empty_like(given) if keep and leak != 1 else None
    kept = kept_of(where.rows, where.row_order, gather_blocks(w_hh, where), w_hh.take(where.strays))
    launch_kept_steps(forward_kernel, (given, along_the_batch(h), b_ih, b_hh), kept, (lengths, states, activations), x,
                      n, states.shape[2], side, steps, leak, RELU=nonlinearity == "relu", LEAKY=leak != 1,
                      REVERSE=reverse)
    output = states[..., :batch].mT.contiguous()
    return (output, output[0 if reverse else -1].clone(), states if keep else x.new_empty(0),
            x.new_empty(0) if activations is None else activations)


def compressed_rnn(x, h, w_ih, values, b_ih, b_hh, mask_ih, crow, col, lengths, nonlinearity, leak, reverse):
    """masked_rnn for a hidden weight in compressed rows (values, crow, col), without gradients."""
    n, batch = h.shape[1], x.shape[1]
    given = inputs_of(x, w_ih, mask_ih)
    states = torch.empty_like(given)
    kept = Kept(*[None] * 5, values, crow, None, col) if len(values) else Kept(*[None] * 9)
    launch_kept_steps(forward_kernel, (given, along_the_batch(h), b_ih, b_hh), kept, (lengths, states, None), x, n,
                      states.shape[2], 0, x.shape[0], leak, RELU=nonlinearity == "relu", LEAKY=leak != 1,
                      REVERSE=reverse)
    output = states[..., :batch].mT.contiguous()
    return output, output[0 if reverse else -1].clone(), x.new_empty(0)


def blocked_rnn_grads(grad_output, grad_h_n, x, h, w_ih, w_hh, mask_ih, mask_hh, layout, side, lengths, states,
                      activations, nonlinearity, leak, reverse, need_x, need_h, need_w_ih, need_w_hh, need_bias):
    needs = (need_x, need_h, need_w_ih, need_w_hh, need_bias)
    steps, batch, inputs = x.shape
    n = h.shape[1]
    if x.dtype not in TYPES or 0 in (steps, batch, inputs):
        return blocked_rnn_op.BLOCKED_RNN_GRADS.by_reference(
            grad_output, grad_h_n, x, h, w_ih, w_hh, mask_ih, mask_hh, layout, side, lengths, states, activations,
            nonlinearity, leak, reverse, *needs)
    where, pitch = unflat(layout, side), states.shape[2]
    da = torch.empty_like(states)
    dh = x.new_empty(n, pitch) if need_h else None
    passed = None if leak == 1 and lengths is None else x.new_empty(n, pitch, dtype=torch.float32)
    kept = kept_of(where.columns, where.column_order, gather_blocks(w_hh, where), w_hh.take(where.strays))
    given = None if grad_output is None else along_the_batch(grad_output)
    launch_kept_steps(backward_kernel, (given, along_the_batch(grad_h_n)), kept,
                      (lengths, states if leak == 1 else activations, da, passed, dh), x, n, pitch, side,
                      steps + need_h, leak, RELU=nonlinearity == "relu", REVERSE=reverse)
    few = where.kept.numel() + STRAY_COST * len(where.strays) < n * n
    dx, dw_ih = gradients_of_inputs(da, x, w_ih, mask_ih, need_x, need_w_ih)
    dw_hh = bias = None
    if need_w_hh and few:
        dw_hh = sampled_gradient(da, states, along_the_batch(h), mask_hh, where, reverse)
    if need_w_hh and not few:
        by_batch, output = da[..., :batch].mT.contiguous(), states[..., :batch].mT.contiguous()
        ends, before, first = ((by_batch[:-1], output[1:], by_batch[-1]) if reverse else
                               (by_batch[1:], output[:-1], by_batch[0]))
        dw_hh = multiply(ends.view(-1, n).t(), before.view(-1, n), out_mask=mask_hh, more=(first.t(), h))
    if need_bias:
        bias = da[..., :batch].sum((0, 2))
    return tuple(x.new_empty(0) if grad is None else grad
                 for grad in (dx, None if dh is None else dh[:, :batch].t().contiguous(), dw_ih, dw_hh, bias))
