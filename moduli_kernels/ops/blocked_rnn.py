"""The ops of the masked RNN whose hidden weight is walked by a layout of its mask (block_layout.py). As in
masked_rnn_op.py.

    blocked_rnn        output (T, B, H), last state (B, H); for backward, or without elements where not kept: all states
                       and, where the leak is not 1, all s(a), both (T, H, pitch) with pitch = B up to a multiple of 8,
                       and zeros or numbers of no meaning beyond B
    blocked_rnn_grads  of x, h, w_ih, w_hh and of both biases (one tensor); those not needed come back with no elements

Arguments are those of masked_rnn, without compressed weights; layout: `flat` of that of mask_hh, in any order of its
rows and columns; side: of its blocks. The reference does without the layout.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..reference import rnn as reference_rnn
from . import masked_rnn as masked_rnn_op
from .block_layout import BlockLayout, Lists
from .masked_rnn import NEEDS, STEP, WEIGHTS
from .registry import library, register_triton

PITCH = 8  # elements of the batch, of which there are a whole number in a row of states
MASKS = "Tensor? mask_ih, Tensor mask_hh, Tensor[] layout, int side"
SCHEMAS = {
    "blocked_rnn": f"(Tensor x, Tensor h, {WEIGHTS}, Tensor? b_ih, Tensor? b_hh, {MASKS}, Tensor? lengths, {STEP}, "
                   "bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    "blocked_rnn_grads": f"(Tensor? grad_output, Tensor grad_h_n, Tensor x, Tensor h, {WEIGHTS}, {MASKS}, "
                         f"Tensor? lengths, Tensor states, Tensor activations, {STEP}, {NEEDS}) "
                         "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def flat(layout: BlockLayout) -> list[Tensor]:
    """As the ops take it, beside its side."""
    return [layout.row_order, layout.column_order, layout.block_rows, layout.block_columns, layout.kept, *layout.rows,
            *layout.columns, layout.strays, layout.groups]


def unflat(layout: list[Tensor], side: int) -> BlockLayout:
    return BlockLayout(side, *layout[:5], Lists(*layout[5:11]), Lists(*layout[11:17]), *layout[17:])


def along_the_batch(states: Tensor) -> Tensor:
    """(..., B, H) as (..., H, pitch), 0 beyond B."""
    return torch.nn.functional.pad(states.mT, (0, -states.shape[-2] % PITCH)).contiguous()


# --- the reference as the implementation for every device that has no kernel ------------------------------------

def _blocked_rnn(x, h, w_ih, w_hh, b_ih, b_hh, mask_ih, mask_hh, layout, side, lengths, nonlinearity, leak, reverse,
                 keep):
    output, h_n, activations = reference_rnn.masked_rnn(
        x, h, w_ih, w_hh, b_ih, b_hh, mask_ih, mask_hh, lengths, reference_rnn.Step(nonlinearity, leak, reverse))
    none = x.new_empty(0)
    return (output, h_n, along_the_batch(output) if keep else none,
            along_the_batch(activations) if keep and leak != 1 else none.clone())


def _blocked_rnn_grads(grad_output, grad_h_n, x, h, w_ih, w_hh, mask_ih, mask_hh, layout, side, lengths, states,
                       activations, nonlinearity, leak, reverse, *needs):
    output, s = (kept[..., :x.shape[1]].mT for kept in (states, states if leak == 1 else activations))
    return masked_rnn_op._masked_rnn_grads(grad_output, grad_h_n, x, h, w_ih, w_hh, mask_ih, mask_hh, lengths, output,
                                           s, nonlinearity, leak, reverse, *needs)


library.impl("blocked_rnn", _blocked_rnn, "CompositeExplicitAutograd")
library.impl("blocked_rnn_grads", _blocked_rnn_grads, "CompositeExplicitAutograd")


# --- fake kernels and autograd ---------------------------------------------------------------------------------

def _fake_blocked_rnn(x, h, *rest):
    leak, _, keep = rest[-3:]
    (steps, batch, _), n = x.shape, h.shape[1]
    pitch = (batch + PITCH - 1) // PITCH * PITCH
    kept = [x.new_empty(steps, n, pitch) if wanted else x.new_empty(0) for wanted in (keep, keep and leak != 1)]
    return x.new_empty(steps, batch, n), torch.empty_like(h), *kept


torch.library.register_fake("moduli_kernels::blocked_rnn", _fake_blocked_rnn, lib=library)
torch.library.register_fake("moduli_kernels::blocked_rnn_grads", masked_rnn_op._fake_masked_rnn_grads, lib=library)


def _setup_context(ctx, inputs, output):
    x, h, w_ih, w_hh, _, _, mask_ih, mask_hh, layout, ctx.side, lengths, *ctx.step, keep = inputs
    if not keep:
        raise RuntimeError("keep must be True where a gradient is needed")
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, h, w_ih, w_hh, mask_ih, mask_hh, lengths, *output[2:], *layout)


def _backward(ctx, grad_output: Tensor | None, grad_h_n: Tensor | None, *_):
    x, h, w_ih, w_hh, mask_ih, mask_hh, lengths, states, activations, *layout = ctx.saved_tensors
    need = ctx.needs_input_grad
    grad_h_n = torch.zeros_like(h) if grad_h_n is None else grad_h_n
    needs = (*need[:4], need[4] or need[5])
    grads = torch.ops.moduli_kernels.blocked_rnn_grads(
        grad_output, grad_h_n, x, h, w_ih, w_hh, mask_ih, mask_hh, layout, ctx.side, lengths, states, activations,
        *ctx.step, *needs)
    return (*masked_rnn_op.grads_asked_for(grads, need), None, None, [None] * len(layout), *(None,) * 6)


torch.library.register_autograd("moduli_kernels::blocked_rnn", _backward, setup_context=_setup_context, lib=library)


# --- the Triton kernels ----------------------------------------------------------------------------------------

register_triton(SCHEMAS, lambda name: "rnn.blocked", globals())
