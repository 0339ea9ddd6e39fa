"""The ops of the masked RNN: schema, fake kernel, autograd formula and the reference as fallback. As in ops/penalty.py.

    masked_rnn        output (T, B, H), last state (B, H), activations s(a) (T, B, H): the last without elements where
                      the leak is 1, for they are the output then, or where not kept
    masked_rnn_grads  of x, h, w_ih, w_hh and of both biases (one tensor); those not needed come back with no elements

One layer, one direction, a whole sequence: the equations stand in reference_rnn.py. x (T, B, I), h (B, H), w_ih (H, I),
w_hh (H, H), biases (H,), masks bool like the weights: all contiguous and of one dtype, float32 or float64 on the CPU.
lengths (B,) int64: steps of each element of the batch. crow_*, col_* int64, as in torch.sparse_csr: the weight is then
its values (entries,) and has no mask; without gradients. grad_output None: 0, as where only the last state is used.
nonlinearity: "tanh" or "relu". leak in (0, 1].
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..reference import rnn as reference_rnn
from .registry import library, register_triton

WEIGHTS = "Tensor w_ih, Tensor w_hh"
MASKS = "Tensor? mask_ih, Tensor? mask_hh"
STEP = "str nonlinearity, float leak, bool reverse"
NEEDS = "bool need_x, bool need_h, bool need_w_ih, bool need_w_hh, bool need_bias"
SCHEMAS = {
    "masked_rnn": f"(Tensor x, Tensor h, {WEIGHTS}, Tensor? b_ih, Tensor? b_hh, {MASKS}, Tensor? crow_ih, "
                  f"Tensor? col_ih, Tensor? crow_hh, Tensor? col_hh, Tensor? lengths, {STEP}, bool keep) "
                  "-> (Tensor, Tensor, Tensor)",
    "masked_rnn_grads": f"(Tensor? grad_output, Tensor grad_h_n, Tensor x, Tensor h, {WEIGHTS}, {MASKS}, "
                        f"Tensor? lengths, Tensor output, Tensor activations, {STEP}, {NEEDS}) "
                        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


# --- the reference as the implementation for every device that has no kernel ------------------------------------

def _whole(values, crow, col, rows, columns):
    if crow is None:
        return values
    return torch.sparse_csr_tensor(crow, col, values, (rows, columns), check_invariants=False).to_dense()


def _masked_rnn(x, h, w_ih, w_hh, b_ih, b_hh, mask_ih, mask_hh, crow_ih, col_ih, crow_hh, col_hh, lengths, nonlinearity,
                leak, reverse, keep):
    w_ih = _whole(w_ih, crow_ih, col_ih, h.shape[1], x.shape[2])
    w_hh = _whole(w_hh, crow_hh, col_hh, h.shape[1], h.shape[1])
    output, h_n, activations = reference_rnn.masked_rnn(
        x, h, w_ih, w_hh, b_ih, b_hh, mask_ih, mask_hh, lengths, reference_rnn.Step(nonlinearity, leak, reverse))
    return output, h_n, activations if keep and leak != 1 else output.new_empty(0)


def _masked_rnn_grads(grad_output, grad_h_n, x, h, w_ih, w_hh, mask_ih, mask_hh, lengths, output, activations,
                      nonlinearity, leak, reverse, *needs):
    grads = reference_rnn.masked_rnn_grads(
        grad_output, grad_h_n, x, h, w_ih, w_hh, mask_ih, mask_hh, lengths, output,
        output if leak == 1 else activations, reference_rnn.Step(nonlinearity, leak, reverse), *needs)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


library.impl("masked_rnn", _masked_rnn, "CompositeExplicitAutograd")
library.impl("masked_rnn_grads", _masked_rnn_grads, "CompositeExplicitAutograd")


# --- fake kernels and autograd ---------------------------------------------------------------------------------

def _fake_masked_rnn(x, h, *rest):
    leak, _, keep = rest[-3:]
    output = x.new_empty(x.shape[0], x.shape[1], h.shape[1])
    return output, torch.empty_like(h), torch.empty_like(output) if keep and leak != 1 else x.new_empty(0)


def _fake_masked_rnn_grads(grad_output, grad_h_n, x, h, w_ih, w_hh, *rest):
    likes = (x, h, w_ih, w_hh, w_hh.new_empty(w_hh.shape[0]))
    return tuple(torch.empty_like(like) if need else x.new_empty(0) for like, need in zip(likes, rest[-5:]))


torch.library.register_fake("moduli_kernels::masked_rnn", _fake_masked_rnn, lib=library)
torch.library.register_fake("moduli_kernels::masked_rnn_grads", _fake_masked_rnn_grads, lib=library)


def _setup_context(ctx, inputs, output):
    x, h, w_ih, w_hh, _, _, mask_ih, mask_hh, *compressed, lengths, nonlinearity, leak, reverse, keep = inputs
    if any(part is not None for part in compressed):
        raise NotImplementedError("compressed weights must not require gradients: train the SparseRNN they came from")
    if leak != 1 and not keep:
        raise RuntimeError("keep must be True where a gradient is needed")
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.step = (nonlinearity, leak, reverse)
    ctx.save_for_backward(x, h, w_ih, w_hh, mask_ih, mask_hh, lengths, output[0], output[2])


def _backward(ctx, grad_output: Tensor | None, grad_h_n: Tensor | None, _):
    x, h, w_ih, w_hh, mask_ih, mask_hh, lengths, output, activations = ctx.saved_tensors
    need = ctx.needs_input_grad
    grad_output = None if grad_output is None else grad_output.contiguous()
    grad_h_n = torch.zeros_like(h) if grad_h_n is None else grad_h_n.contiguous()
    needs = (*need[:4], need[4] or need[5])
    grads = torch.ops.moduli_kernels.masked_rnn_grads(
        grad_output, grad_h_n, x, h, w_ih, w_hh, mask_ih, mask_hh, lengths, output, activations, *ctx.step, *needs)
    return (*grads_asked_for(grads, need), *(None,) * 11)


def grads_asked_for(grads: tuple[Tensor, ...], need: tuple[bool, ...]) -> list[Tensor | None]:
    """Of x, h, w_ih, w_hh, b_ih, b_hh from the five tensors of the ops of gradients; None where not needed."""
    *four, bias = grads
    # not one tensor twice: either may become a .grad
    six = (*four, bias, bias.clone() if need[4] and need[5] else bias)
    return [grad if needed else None for grad, needed in zip(six, need)]


torch.library.register_autograd("moduli_kernels::masked_rnn", _backward, setup_context=_setup_context, lib=library)


# --- the Triton kernels ----------------------------------------------------------------------------------------

register_triton(SCHEMAS, lambda name: "rnn.masked", globals())
