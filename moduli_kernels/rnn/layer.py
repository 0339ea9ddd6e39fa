"""Runs one layer of the masked RNN in one direction: which implementation, which dtypes, and the derivative.

In eager mode an autograd.Function wraps the ops, or where the reference is chosen what serves the same schemas in plain
PyTorch. It refuses a second derivative and a dual tensor in words. Under torch.compile the op itself runs, with its
registered formula. Autocast is off inside: the computation is in float64 for float64 weights, else in float32.
"""
from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends
from ..autograd import only_once
from ..graphs import constant_at_compile_time, is_exporting
from ..ops import blocked_rnn as blocked_rnn_op, masked_rnn as masked_rnn_op, torch_ops
from ..ops.block_layout import BlockLayout
from ..reference import compute_dtype
from ..reference.rnn import Step
from . import checks
from .tracing import is_taken_over


class Weights(NamedTuple):
    """The weights of one layer in one direction, as the ops take them (ops/masked_rnn.py), in any floating dtype.

    w_ih: (H, I), or with crow_ih and col_ih its kept values (entries,).
    w_hh: (H, H), or with crow_hh and col_hh its kept values (entries,).
    b_ih, b_hh: (H,).
    mask_ih, mask_hh: bool, like the weights.
    crow_ih, col_ih, crow_hh, col_hh: row pointers and columns of compressed weights, of any integer dtype.
    order_x, order_h: (I,) and (H,), int64: the orders of inputs and neurons in which kept weights fall into blocks.
    layout: the layout of mask_hh, where the op is to multiply w_hh by it (ops/blocked_rnn.py).
    """

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    mask_ih: Tensor | None = None
    mask_hh: Tensor | None = None
    crow_ih: Tensor | None = None
    col_ih: Tensor | None = None
    crow_hh: Tensor | None = None
    col_hh: Tensor | None = None
    order_x: Tensor | None = None
    order_h: Tensor | None = None
    layout: BlockLayout | None = None


def has_kernel(device_type: str) -> bool:
    """Whether anything but the reference serves this type of device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if key is None or backends.active(device_type) == "reference":
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key("moduli_kernels::masked_rnn", key)


def walks_blocks(device_type: str, dtype: torch.dtype) -> bool:
    """Whether there are kernels that multiply a hidden weight by a layout of blocks, for this dtype of computation."""
    return dtype == torch.float32 and backends.active(device_type) == "triton"


@constant_at_compile_time
def autocasts(device_type: str) -> bool:
    """Whether autocast serves this type of device, asked outside the graph: torch 2.10 cannot trace the question."""
    return torch.amp.is_autocast_available(device_type)


def autocast_dtype(device_type: str, weight: Tensor) -> torch.dtype | None:
    """The dtype in which autocast runs a product with this weight.

    None without autocast, and for float64, which autocast leaves alone.
    """
    if weight.dtype == torch.float64 or not autocasts(device_type):
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def masked_rnn(x: Tensor, h: Tensor, weights: Weights, lengths: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
    """Returns output (T, B, H) and the last state (B, H).

    Args:
        x: (T, B, I), in the weights' compute dtype, as is h.
        h: (B, H).
        weights: of the layer and direction.
        lengths: (B,) int64 on the device, the steps of each sequence; None where all have T steps.
        step: nonlinearity, leak and direction.

    Raises:
        NotImplementedError: on a second and on a forward-mode derivative.
    """
    if is_taken_over((x, h, *weights[:4])):
        return torch.overrides.handle_torch_function(masked_rnn, (x, h, *weights[:4]), x, h, weights, lengths, step)
    dtype = compute_dtype(weights.w_hh)
    floating = [None if t is None else (t if t.dtype == dtype else t.to(dtype)).contiguous()
                for t in (x, h, weights.w_ih, weights.w_hh, weights.b_ih, weights.b_hh)]
    masks = [None if mask is None else mask.contiguous() for mask in (weights.mask_ih, weights.mask_hh)]
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in floating)
    if weights.layout is None:
        op, grads_op = masked_rnn_op.MASKED_RNN, masked_rnn_op.MASKED_RNN_GRADS
        compressed = (weights.crow_ih, weights.col_ih, weights.crow_hh, weights.col_hh)
        given, given_back = [None if index is None else index.to(torch.int64) for index in compressed], []
        where = [lengths, weights.order_x, weights.order_h]
    else:
        op, grads_op = blocked_rnn_op.BLOCKED_RNN, blocked_rnn_op.BLOCKED_RNN_GRADS
        given = given_back = [blocked_rnn_op.flat(weights.layout), weights.layout.side]
        where = [lengths]
    recorded = torch.jit.is_tracing() or is_exporting()  # as the op, which any backend serves later
    if backends.active(x.device.type) == "reference" and not recorded:
        op, grads_op = op.by_reference, grads_op.by_reference
    else:
        op, grads_op = (getattr(torch_ops, each.name).default for each in (op, grads_op))
        if torch.compiler.is_compiling():
            return op(*floating, *masks, *given, *where, *step, needs_grad)[:2]
        if torch.jit.is_tracing():  # what is traced without gradients may be asked for them later
            return op(*floating, *masks, *given, *where, *step, True)[:2]
    if not torch.compiler.is_compiling():
        _refuse_transforms(floating)
    if needs_grad:
        return _MaskedRNN.apply(op, grads_op, given, given_back, where, step, *floating, *masks)
    with _without_autocast(x.device.type), _below_autograd():
        return op(*floating, *masks, *given, *where, *step, False)[:2]


def _refuse_transforms(tensors: list[Tensor | None]) -> None:
    if torch._C._are_functorch_transforms_active():
        checks.functorch()
    if forward_ad._current_level >= 0 and any(t is not None and forward_ad.unpack_dual(t).tangent is not None
                                              for t in tensors):
        checks.forward_mode()


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    if autocasts(device_type) and torch.is_autocast_enabled(device_type):  # entering the context costs more than asking
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _below_autograd() -> contextlib.AbstractContextManager:
    """Skips the op's own derivative, which is there for torch.compile, is in Python and takes 50 us to pass."""
    return torch.no_grad() if torch.compiler.is_compiling() else torch._C._AutoDispatchBelowAutograd()


class _MaskedRNN(torch.autograd.Function):
    """Forward and backward by two ops: those of ops/masked_rnn.py or ops/blocked_rnn.py, or the reference under their
    schemas. given and given_back are what the two take between masks and lengths, and where is lengths with what
    follows it."""

    @staticmethod
    def forward(ctx, op, grads_op, given, given_back, where, step, x, h, w_ih, w_hh, b_ih, b_hh, mask_ih, mask_hh):
        with _without_autocast(x.device.type), _below_autograd():
            output, h_n, *saved = op(x, h, w_ih, w_hh, b_ih, b_hh, mask_ih, mask_hh, *given, *where, *step, True)
        ctx.changeable = None
        if len(saved) == 1:  # the states of masked_rnn are its output
            states, ctx.changeable = masked_rnn_op.saved_output(output, op, b_ih, b_hh)
            saved = [states, *saved]
        ctx.grads_op, ctx.given_back, ctx.step = grads_op, given_back, step
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h, w_ih, w_hh, mask_ih, mask_hh, *where, *saved)
        return output, h_n

    @staticmethod
    def backward(ctx, grad_output, grad_h_n):
        x, h, w_ih, w_hh, mask_ih, mask_hh, *where, states, activations = saved = ctx.saved_tensors
        need = ctx.needs_input_grad[6:12]  # of x, h, w_ih, w_hh, b_ih, b_hh
        needs = (*need[:4], need[4] or need[5])
        with _below_autograd(), _without_autocast(x.device.type):
            if ctx.changeable is not None:
                states, activations = ctx.changeable.as_it_was(*saved, ctx.step)
            grads = ctx.grads_op(
                None if grad_output is None else grad_output.contiguous(),
                torch.zeros_like(h) if grad_h_n is None else grad_h_n.contiguous(), x, h, w_ih, w_hh, mask_ih, mask_hh,
                *ctx.given_back, *where, states, activations, *ctx.step, *needs)
            grads = masked_rnn_op.gradients_of_leaves(grads, need)
        if torch.is_grad_enabled():  # create_graph=True: only a derivative of these gradients is an error
            sources = [t for t in (grad_output, grad_h_n, x, h, w_ih, w_hh) if t is not None]
            grads = only_once(grads, checks.second_derivative, *sources)
        return (None,) * 6 + (*grads, None, None)
