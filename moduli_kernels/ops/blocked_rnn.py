"""The ops of the masked RNN whose hidden weight is multiplied in blocks, by a layout of its mask (ops/block_layout.py):
their arguments, fake kernels, autograd formula and fallbacks, and declarations. See ops/masked_rnn.py.

    blocked_rnn        output (T, B, H); the last state (B, H); and for backward all states and all activations s(a),
                       both (T, H, pitch). These two come back without elements where they are not kept, and the
                       activations where the leak is 1, since they equal the states then.
    blocked_rnn_grads  the five gradients, as of masked_rnn_grads

pitch is B rounded up to a multiple of PITCH; states and activations beyond B have no meaning. Only Triton has kernels.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.rnn import Step
from .block_layout import BlockLayout, Lists
from .masked_rnn import (
    GRADIENTS,
    LEAVES,
    MASKED_RNN,
    MASKED_RNN_GRADS,
    MaskedRNNArguments,
    MaskedRNNGradArguments,
    Needs,
    fake_rnn_gradients,
    gradients_of_leaves,
)
from .registry import Derivative, Op, declare

LAUNCHER = "rnn.blocked"
PITCH = 8  # elements of the batch; rows of states hold a whole multiple of them


class BlockedRNNArguments(NamedTuple):
    """What blocked_rnn takes, the step's settings aside: T steps, a batch of B, I inputs and H neurons.

    x, h, w_ih, w_hh, b_ih, b_hh, mask_ih, lengths: as of masked_rnn; weights are matrices.
    mask_hh: bool, (H, H).
    layout: `flat` of the layout of mask_hh, for any order of its rows and columns.
    side: the side of the layout's blocks.
    """

    x: Tensor
    h: Tensor
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    mask_ih: Tensor | None
    mask_hh: Tensor
    layout: list[Tensor]
    side: int
    lengths: Tensor | None


class BlockedRNNGradArguments(NamedTuple):
    """What blocked_rnn_grads takes, the step's settings and the needs aside.

    grad_output: (T, B, H); None: 0, where only the last state is used.
    grad_h_n: (B, H).
    x, h, w_ih, w_hh, mask_ih, mask_hh, layout, side, lengths: as blocked_rnn has taken them.
    states: what blocked_rnn gave.
    activations: what blocked_rnn gave.
    """

    grad_output: Tensor | None
    grad_h_n: Tensor
    x: Tensor
    h: Tensor
    w_ih: Tensor
    w_hh: Tensor
    mask_ih: Tensor | None
    mask_hh: Tensor
    layout: list[Tensor]
    side: int
    lengths: Tensor | None
    states: Tensor
    activations: Tensor


def flat(layout: BlockLayout) -> list[Tensor]:
    """The tensors of a layout in one list, as the ops take it beside its side."""
    return [layout.row_order, layout.column_order, layout.block_rows, layout.block_columns, layout.kept, *layout.rows,
            *layout.columns, layout.strays, layout.groups]


def unflat(tensors: list[Tensor], side: int) -> BlockLayout:
    """The layout that `flat` made this list of."""
    row_order, column_order, block_rows, block_columns, kept, *lists, strays, groups = tensors
    half = len(Lists._fields)
    return BlockLayout(side, row_order, column_order, block_rows, block_columns, kept, rows=Lists(*lists[:half]),
                       columns=Lists(*lists[half:]), strays=strays, groups=groups)


def along_the_batch(states: Tensor) -> Tensor:
    """States (..., B, H) as (..., H, pitch), 0 beyond B."""
    return torch.nn.functional.pad(states.mT, (0, -states.shape[-2] % PITCH)).contiguous()


# --- fallbacks: those of masked_rnn, which have no use for the layout ----------------------------------------------

def _blocked_rnn(a: BlockedRNNArguments, step: Step, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    same = MaskedRNNArguments(a.x, a.h, a.w_ih, a.w_hh, a.b_ih, a.b_hh, a.mask_ih, a.mask_hh, crow_ih=None, col_ih=None,
                              crow_hh=None, col_hh=None, lengths=a.lengths, order_x=None, order_h=None)
    output, h_n, activations = MASKED_RNN.fallback(same, step, keep)
    return (output, h_n, along_the_batch(output) if keep else a.x.new_empty(0),
            along_the_batch(activations) if keep and step.leak != 1 else a.x.new_empty(0))


def _blocked_rnn_grads(a: BlockedRNNGradArguments, step: Step, needs: Needs) -> tuple[Tensor, ...]:
    batch = a.x.shape[1]
    output, activations = (kept[..., :batch].mT for kept in (a.states, a.states if step.leak == 1 else a.activations))
    same = MaskedRNNGradArguments(a.grad_output, a.grad_h_n, a.x, a.h, a.w_ih, a.w_hh, a.mask_ih, a.mask_hh, a.lengths,
                                  order_x=None, order_h=None, output=output, activations=activations)
    return MASKED_RNN_GRADS.fallback(same, step, needs)


# --- fake kernels --------------------------------------------------------------------------------------------------

def _fake_blocked_rnn(a: BlockedRNNArguments, step: Step, keep: bool) -> tuple[Tensor, ...]:
    (steps, batch, _), neurons = a.x.shape, a.h.shape[1]
    pitch = (batch + PITCH - 1) // PITCH * PITCH
    states, activations = (a.x.new_empty(steps, neurons, pitch) if wanted else a.x.new_empty(0)
                           for wanted in (keep, keep and step.leak != 1))
    return a.x.new_empty(steps, batch, neurons), torch.empty_like(a.h), states, activations


# --- the autograd formula ------------------------------------------------------------------------------------------

def _save(ctx: Any, results: tuple[Tensor, ...], a: BlockedRNNArguments, step: Step, keep: bool) -> None:
    if not keep:
        raise RuntimeError("keep must be True where a gradient is needed")
    _, _, states, activations = results
    ctx.mark_non_differentiable(states, activations)
    ctx.set_materialize_grads(False)
    ctx.side, ctx.step = a.side, step
    ctx.save_for_backward(a.x, a.h, a.w_ih, a.w_hh, a.mask_ih, a.mask_hh, a.lengths, states, activations, *a.layout)


def _formula(ctx: Any, needs: dict[str, bool], grad_output: Tensor | None, grad_h_n: Tensor | None,
             *grads_of_what_is_kept: None) -> dict[str, Any]:
    x, h, w_ih, w_hh, mask_ih, mask_hh, lengths, states, activations, *layout = ctx.saved_tensors
    leaves = [needs[name] for name in LEAVES]
    a = BlockedRNNGradArguments(
        grad_output, torch.zeros_like(h) if grad_h_n is None else grad_h_n, x, h, w_ih, w_hh, mask_ih, mask_hh, layout,
        ctx.side, lengths, states, activations)
    gradients = torch.ops.moduli_kernels.blocked_rnn_grads(*a, *ctx.step, *Needs.of(leaves))
    return dict(zip(LEAVES, gradients_of_leaves(gradients, leaves))) | {"layout": [None] * len(layout)}


# --- declarations --------------------------------------------------------------------------------------------------

BLOCKED_RNN = declare(Op(
    "blocked_rnn", (BlockedRNNArguments, Step, "bool keep"), "(Tensor, Tensor, Tensor, Tensor)",
    fallback=_blocked_rnn, fake=_fake_blocked_rnn, launcher=LAUNCHER, derivative=Derivative(_save, _formula)))

BLOCKED_RNN_GRADS = declare(Op(
    "blocked_rnn_grads", (BlockedRNNGradArguments, Step, Needs), GRADIENTS,
    fallback=_blocked_rnn_grads, fake=fake_rnn_gradients, launcher=LAUNCHER))
