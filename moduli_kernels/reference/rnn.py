"""The specification of the masked RNN, one layer in one direction over a whole sequence: outputs and gradients by hand,
in plain PyTorch. For each element of the batch

    a_t = (mask_ih * w_ih) x_t + b_ih + (mask_hh * w_hh) h_(t-1) + b_hh
    h_t = (1 - leak) h_(t-1) + leak s(a_t)                                      s: tanh or ReLU

The gradient d_t = dL/dh_t sums the gradient of output t and what later steps hand back:

    dL/da_t = leak s'(a_t) d_t,    step t hands (1 - leak) d_t + (mask_hh * w_hh)^T dL/da_t back to d_(t-1)
    dW_hh = mask_hh * sum_t dL/da_t h_(t-1)^T,    dW_ih = mask_ih * sum_t dL/da_t x_t^T,    db = sum_t dL/da_t

Tests compare every kernel with this file, and it is the fallback where no kernel is built. An element of the batch that
ends early (see lengths) keeps its state after its last step; in the reverse direction it keeps h until its first step.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """What is to be computed, the tensors aside.

    nonlinearity: s, "tanh" or "relu".
    leak: the share of the new state, in (0, 1].
    reverse: whether the last step comes first.
    """

    nonlinearity: str
    leak: float
    reverse: bool


def kept(weight: Tensor, mask: Tensor | None) -> Tensor:
    """The weight with 0 where it is masked, even if NaN stands there; the gradient is 0 there too."""
    return weight if mask is None else torch.where(mask, weight, torch.zeros_like(weight))


def masked_rnn(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
               mask_ih: Tensor | None, mask_hh: Tensor | None, lengths: Tensor | None,
               step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the layer over a sequence. All floating tensors have one dtype.

    Args:
        x: (T, B, I), the inputs.
        h: (B, H), the first state.
        w_ih: (H, I).
        w_hh: (H, H).
        b_ih: (H,) or None.
        b_hh: (H,) or None.
        mask_ih: bool, (H, I), True = kept. None: all are.
        mask_hh: bool, (H, H), likewise.
        lengths: (B,), int64, how many steps each element of the batch has. None: all have T.
        step: what is to be computed.

    Returns:
        The output (T, B, H), the last state (B, H), and the activations s(a) (T, B, H).
    """
    w_ih, w_hh = kept(w_ih, mask_ih), kept(w_hh, mask_hh)
    inputs = x @ w_ih.t()
    for bias in (b_ih, b_hh):
        if bias is not None:
            inputs = inputs + bias
    output, activations = torch.empty_like(inputs), torch.empty_like(inputs)
    for t in _order(len(x), step.reverse):
        a = inputs[t] + h @ w_hh.t()
        activations[t] = a.tanh() if step.nonlinearity == "tanh" else a.relu()
        h_t = activations[t] if step.leak == 1 else (1 - step.leak) * h + step.leak * activations[t]
        h = h_t if lengths is None else torch.where(_active(t, lengths), h_t, h)
        output[t] = h
    return output, h.clone(), activations


class Gradients(NamedTuple):
    """The gradients, each shaped like its own tensor; None where it is not asked for. Both biases have the same one."""

    x: Tensor | None
    h: Tensor | None
    w_ih: Tensor | None
    w_hh: Tensor | None
    bias: Tensor | None


def masked_rnn_grads(grad_output: Tensor | None, grad_h_n: Tensor, x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor,
                     mask_ih: Tensor | None, mask_hh: Tensor | None, lengths: Tensor | None, output: Tensor,
                     activations: Tensor, step: Step, need_x: bool, need_h: bool, need_w_ih: bool, need_w_hh: bool,
                     need_bias: bool) -> Gradients:
    """The gradients of `masked_rnn`, whose arguments x ... lengths and step are repeated here.

    Args:
        grad_output: (T, B, H), the gradient of the output. None: 0.
        grad_h_n: (B, H), the gradient of the last state.
        output: what masked_rnn has returned.
        activations: what masked_rnn has returned.
        need_x: whether to give the gradient of x; the others likewise.
    """
    kept_ih, kept_hh = kept(w_ih, mask_ih), kept(w_hh, mask_hh)
    da = torch.empty_like(output)
    before = torch.empty_like(output)  # the state that each step began with
    d = grad_h_n
    order = _order(len(x), step.reverse)
    for k, t in enumerate(order):
        before[t] = output[order[k - 1]] if k else h
    for t in reversed(order):
        d = d if grad_output is None else d + grad_output[t]
        s = activations[t]
        slope = 1 - s * s if step.nonlinearity == "tanh" else (s > 0).to(s.dtype)
        da_t, stays = step.leak * slope * d, (1 - step.leak) * d
        if lengths is not None:
            active = _active(t, lengths)
            da_t, stays = torch.where(active, da_t, torch.zeros_like(da_t)), torch.where(active, stays, d)
        da[t] = da_t
        d = stays + da_t @ kept_hh
    flat = da.flatten(0, 1)
    return Gradients(
        da @ kept_ih if need_x else None, d.clone() if need_h else None,
        kept(flat.t() @ x.flatten(0, 1), mask_ih) if need_w_ih else None,
        kept(flat.t() @ before.flatten(0, 1), mask_hh) if need_w_hh else None,
        flat.sum(0) if need_bias else None,
    )


def _order(steps: int, reverse: bool) -> list[int]:
    """The steps in the order in which they are computed."""
    return list(range(steps))[::-1] if reverse else list(range(steps))


def _active(t: int, lengths: Tensor) -> Tensor:
    """(B, 1): whether step t is one of the steps that each element of the batch has."""
    return (t < lengths)[:, None]
