"""The ops of the masked RNN whose hidden weight is walked by a layout of its mask, on CUDA tensors. Schemas and
contracts: moduli_kernels/blocked_rnn_op.py. As launch_rnn.py, with states along the batch: (T, n, pitch)."""
from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...ops import blocked_rnn as blocked_rnn_op
from ...ops.block_layout import GROUP, BlockLayout, Lists, gather_blocks
from ...ops.blocked_rnn import along_the_batch, unflat
from ..penalty.launch import on_device
from . import shares as shares_table
from .backward import backward_kernel
from .forward import forward_kernel
from .kept import Kept
from .sampled import sampled_blocks_kernel, sampled_strays_kernel
from .steps import TYPES, VECTOR, Fold, Layout, bytes_of, device_of, launch_product, launch_steps, numbers_for, product

BLOCK_DEPTH, STRAY_ENTRIES, STRAY_DEPTH = 32, 64, 32
STRAY_COST = 64  # of a product of one entry over a sequence, in those of an entry of a whole matrix


def kept_of(lists: Lists, order: Tensor, blocks: Tensor, strays: Tensor) -> Kept:
    """Of blocks and strays, those there are."""
    whole = (blocks, lists.starts, lists.places, lists.partners) if len(blocks) else (None,) * 4
    single = (strays, lists.stray_starts, lists.stray_places, lists.stray_partners) if len(strays) else (None,) * 4
    return Kept(order if len(blocks) else None, *whole, *single)


def steps_of(kernel, before: tuple, kept: Kept, after: tuple, x: Tensor, n: int, pitch: int, side: int, last: int,
             leak: float, **settings) -> None:
    """launch_steps of kept entries."""
    strays = 0 if kept.strays is None else len(kept.strays)
    shares = shares_table.kept_shares(n, pitch, None if kept.blocks is None else side, strays, x.element_size(),
                                   *device_of(x))
    launch_steps(kernel, (*before, None, None, tuple(kept), *after), x, shares,
                 Layout(n, pitch, pitch, 1, VECTOR), x.shape[0], last, leak, **settings)


def inputs_of(x: Tensor, w_ih: Tensor, mask_ih: Tensor | None) -> Tensor:
    """x W_ih^T as (T, n, pitch), 0 beyond the batch."""
    (steps, batch, inputs), n = x.shape, w_ih.shape[0]
    out = x.new_empty(steps, n, triton.cdiv(batch, VECTOR) * VECTOR)
    pitch = out.shape[2]
    fold = Fold("rows", steps, batch, pitch, a_outer=batch * inputs, out_outer=n * pitch, out_batch=pitch)
    launch_product(x[0], w_ih.t(), out[0].t(), inputs, None if mask_ih is None else mask_ih.t(), None, None, fold)
    return out


def gradients_of_inputs(da: Tensor, x: Tensor, w_ih: Tensor, mask_ih: Tensor | None, need_x: bool,
                        need_w: bool) -> tuple[Tensor | None, Tensor | None]:
    """dx and dW_ih from da (T, n, pitch)."""
    (steps, batch, inputs), (n, pitch) = x.shape, da.shape[1:]
    dx = dw = None
    if need_x:
        dx = torch.empty_like(x)
        fold = Fold("rows", steps, batch, pitch, a_outer=n * pitch, out_outer=batch * inputs, out_batch=batch)
        launch_product(da[0].t(), w_ih, dx[0], n, mask_ih, None, None, fold)
    if need_w:
        dw = torch.empty_like(w_ih)
        fold = Fold("depth", steps, batch, pitch, a_outer=n * pitch, b_outer=batch * inputs)
        launch_product(da[0], x[0], dw, steps * pitch, None, mask_ih, None, fold)
    return dx, dw


def blocked_rnn(x, h, w_ih, w_hh, b_ih, b_hh, mask_ih, mask_hh, layout, side, lengths, nonlinearity, leak, reverse,
                keep):
    steps, batch, inputs = x.shape
    n = h.shape[1]
    if x.dtype not in TYPES or 0 in (steps, batch, inputs):
        return blocked_rnn_op._blocked_rnn(x, h, w_ih, w_hh, b_ih, b_hh, mask_ih, mask_hh, layout, side, lengths,
                                            nonlinearity, leak, reverse, keep)
    where = unflat(layout, side)
    given = inputs_of(x, w_ih, mask_ih)
    states = torch.empty_like(given)
    activations = torch.empty_like(given) if keep and leak != 1 else None
    kept = kept_of(where.rows, where.row_order, gather_blocks(w_hh, where), w_hh.take(where.strays))
    steps_of(forward_kernel, (given, along_the_batch(h), b_ih, b_hh), kept, (lengths, states, activations), x, n,
             states.shape[2], side, steps, leak, RELU=nonlinearity == "relu", LEAKY=leak != 1, REVERSE=reverse)
    output = states[..., :batch].mT.contiguous()
    return (output, output[0 if reverse else -1].clone(), states if keep else x.new_empty(0),
            x.new_empty(0) if activations is None else activations)


def compressed_rnn(x, h, w_ih, values, b_ih, b_hh, mask_ih, crow, col, lengths, nonlinearity, leak, reverse):
    """masked_rnn for a hidden weight in compressed rows, without gradients."""
    n, batch = h.shape[1], x.shape[1]
    given = inputs_of(x, w_ih, mask_ih)
    states = torch.empty_like(given)
    kept = Kept(*[None] * 5, values, crow, None, col) if len(values) else Kept(*[None] * 9)
    steps_of(forward_kernel, (given, along_the_batch(h), b_ih, b_hh), kept, (lengths, states, None), x, n,
             states.shape[2], 0, x.shape[0], leak, RELU=nonlinearity == "relu", LEAKY=leak != 1, REVERSE=reverse)
    output = states[..., :batch].mT.contiguous()
    return output, output[0 if reverse else -1].clone(), x.new_empty(0)


def sampled(da: Tensor, states: Tensor, h: Tensor, mask: Tensor, where: BlockLayout, reverse: bool) -> Tensor:
    """dW_hh from da and states (T, n, pitch) and h (n, pitch): at the kept entries, 0 elsewhere."""
    steps, n, pitch = da.shape
    ends, before, first = (da[:-1], states[1:], da[-1]) if reverse else (da[1:], states[:-1], da[0])
    dw = da.new_zeros(n, n)
    sizes = (n, pitch // VECTOR, n * pitch // VECTOR, steps - 1)
    numbers = numbers_for(da)
    with on_device(da):
        if len(where.groups):
            sampled_blocks_kernel[(len(where.groups),)](
                ends, before, first, h, bytes_of(mask), dw, where.row_order, where.rows.partners, where.groups, *sizes,
                VECTOR=VECTOR, SIDE=where.side, WIDTH=GROUP, DEPTH=BLOCK_DEPTH, **numbers._asdict(),
                num_warps=8 if where.side == 64 else 4, num_stages=3, enable_fp_fusion=True)
        if len(where.strays):
            sampled_strays_kernel[(triton.cdiv(len(where.strays), STRAY_ENTRIES),)](
                ends, before, first, h, dw, where.strays, len(where.strays), *sizes, VECTOR=VECTOR,
                ENTRIES=STRAY_ENTRIES, DEPTH=STRAY_DEPTH, num_warps=4, enable_fp_fusion=True)
    return dw


def blocked_rnn_grads(grad_output, grad_h_n, x, h, w_ih, w_hh, mask_ih, mask_hh, layout, side, lengths, states,
                      activations, nonlinearity, leak, reverse, need_x, need_h, need_w_ih, need_w_hh, need_bias):
    needs = (need_x, need_h, need_w_ih, need_w_hh, need_bias)
    steps, batch, inputs = x.shape
    n = h.shape[1]
    if x.dtype not in TYPES or 0 in (steps, batch, inputs):
        return blocked_rnn_op._blocked_rnn_grads(grad_output, grad_h_n, x, h, w_ih, w_hh, mask_ih, mask_hh, layout,
                                                  side, lengths, states, activations, nonlinearity, leak, reverse,
                                                  *needs)
    where, pitch = unflat(layout, side), states.shape[2]
    da = torch.empty_like(states)
    dh = x.new_empty(n, pitch) if need_h else None
    passed = None if leak == 1 and lengths is None else x.new_empty(n, pitch, dtype=torch.float32)
    kept = kept_of(where.columns, where.column_order, gather_blocks(w_hh, where), w_hh.take(where.strays))
    given = None if grad_output is None else along_the_batch(grad_output)
    steps_of(backward_kernel, (given, along_the_batch(grad_h_n)), kept,
             (lengths, states if leak == 1 else activations, da, passed, dh), x, n, pitch, side, steps + need_h, leak,
             RELU=nonlinearity == "relu", REVERSE=reverse)
    few = where.kept.numel() + STRAY_COST * len(where.strays) < n * n
    dx, dw_ih = gradients_of_inputs(da, x, w_ih, mask_ih, need_x, need_w_ih)
    dw_hh = bias = None
    if need_w_hh and few:
        dw_hh = sampled(da, states, along_the_batch(h), mask_hh, where, reverse)
    if need_w_hh and not few:
        by_batch, output = da[..., :batch].mT.contiguous(), states[..., :batch].mT.contiguous()
        ends, before, first = ((by_batch[:-1], output[1:], by_batch[-1]) if reverse else
                               (by_batch[1:], output[:-1], by_batch[0]))
        dw_hh = product(ends.view(-1, n).t(), before.view(-1, n), None, mask_hh, (first.t(), h))
    if need_bias:
        bias = da[..., :batch].sum((0, 2))
    return tuple(x.new_empty(0) if grad is None else grad
                 for grad in (dx, None if dh is None else dh[:, :batch].t().contiguous(), dw_ih, dw_hh, bias))
