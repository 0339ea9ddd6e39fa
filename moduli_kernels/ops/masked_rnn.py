"""The ops of the masked RNN, one layer in one direction over a whole sequence: their arguments, fake kernels, autograd
formula and fallbacks, and declarations. reference/rnn.py has the equations.

    masked_rnn        output (T, B, H); the last state (B, H); the activations s(a) (T, B, H), which come back without
                      elements where they are not kept, and where the leak is 1, since they equal the output then
    masked_rnn_grads  the gradients of x, h, w_ih, w_hh, and one for both biases; those that are not asked for come back
                      without elements

keep: whether activations are kept for backward. All tensors are contiguous, and all that are not masks, indices or
lengths have one dtype: float32 or float64 on the CPU.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import rnn as reference_rnn
from ..reference.rnn import Step
from .registry import Derivative, Op, declare

LAUNCHER = "rnn.masked"

LEAVES = ("x", "h", "w_ih", "w_hh", "b_ih", "b_hh")  # the arguments that have gradients
GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"  # of x, h, w_ih, w_hh and the biases


class MaskedRNNArguments(NamedTuple):
    """What masked_rnn takes, the step's settings aside: T steps, a batch of B, I inputs and H neurons.

    x: (T, B, I).
    h: (B, H), the first state.
    w_ih: (H, I). Or (entries,), the values of a torch.sparse_csr matrix, without a mask and without gradients.
    w_hh: (H, H). Or (entries,), likewise.
    b_ih: (H,) or None.
    b_hh: (H,) or None.
    mask_ih: bool, like w_ih, True = kept; None: all are.
    mask_hh: bool, like w_hh, likewise.
    crow_ih: (H + 1,), int64: the row pointers of the values of w_ih; None where w_ih is a matrix.
    col_ih: (entries,), int64: their columns; None where w_ih is a matrix.
    crow_hh: (H + 1,), int64, likewise for w_hh.
    col_hh: (entries,), int64, likewise for w_hh.
    lengths: (B,), int64: how many steps each element of the batch has. None: all have T.
    order_x: (I,), int64, a permutation: the order of inputs in which kept entries of w_ih fall into blocks. None: their
        own. An order says where to look for blocks, and changes speed only; results may differ by rounding.
    order_h: (H,), int64, likewise for neurons, the rows of both weights and the columns of w_hh.
    """

    x: Tensor
    h: Tensor
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    mask_ih: Tensor | None
    mask_hh: Tensor | None
    crow_ih: Tensor | None
    col_ih: Tensor | None
    crow_hh: Tensor | None
    col_hh: Tensor | None
    lengths: Tensor | None
    order_x: Tensor | None
    order_h: Tensor | None


class MaskedRNNGradArguments(NamedTuple):
    """What masked_rnn_grads takes, the step's settings and the needs aside.

    grad_output: (T, B, H); None: 0, where only the last state is used.
    grad_h_n: (B, H).
    x, h, w_ih, w_hh, mask_ih, mask_hh, lengths, order_x, order_h: as masked_rnn has taken them; weights are matrices.
    output: what masked_rnn gave.
    activations: what masked_rnn gave.
    """

    grad_output: Tensor | None
    grad_h_n: Tensor
    x: Tensor
    h: Tensor
    w_ih: Tensor
    w_hh: Tensor
    mask_ih: Tensor | None
    mask_hh: Tensor | None
    lengths: Tensor | None
    order_x: Tensor | None
    order_h: Tensor | None
    output: Tensor
    activations: Tensor


class Needs(NamedTuple):
    """Which of the five gradients are asked for."""

    need_x: bool
    need_h: bool
    need_w_ih: bool
    need_w_hh: bool
    need_bias: bool

    @classmethod
    def of(cls, leaves: Sequence[bool]) -> Needs:
        """From whether each of LEAVES needs a gradient."""
        x, h, w_ih, w_hh, b_ih, b_hh = leaves
        return cls(x, h, w_ih, w_hh, b_ih or b_hh)


def gradients_of_leaves(gradients: Sequence[Tensor], leaves: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of LEAVES from the five that an op gives, None where none is needed. leaves: as Needs.of takes."""
    *_, bias = gradients
    *_, b_ih, b_hh = leaves
    # The biases get two tensors, since each may become a .grad that is written in place.
    second_bias = bias.clone() if b_ih and b_hh else bias
    return [gradient if needed else None for gradient, needed in zip((*gradients, second_bias), leaves)]


# --- fallbacks: the reference, in plain PyTorch --------------------------------------------------------------------

def _matrix_of(values: Tensor, crow: Tensor | None, col: Tensor | None, rows: int, columns: int) -> Tensor:
    """The weight itself, or the dense matrix of its values."""
    if crow is None or col is None:
        return values
    return torch.sparse_csr_tensor(crow, col, values, (rows, columns), check_invariants=False).to_dense()


def _masked_rnn(a: MaskedRNNArguments, step: Step, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    neurons, inputs = a.h.shape[1], a.x.shape[2]
    w_ih = _matrix_of(a.w_ih, a.crow_ih, a.col_ih, neurons, inputs)
    w_hh = _matrix_of(a.w_hh, a.crow_hh, a.col_hh, neurons, neurons)
    output, h_n, activations = reference_rnn.masked_rnn(
        a.x, a.h, w_ih, w_hh, a.b_ih, a.b_hh, a.mask_ih, a.mask_hh, a.lengths, step)
    return output, h_n, activations if keep and step.leak != 1 else output.new_empty(0)


def _masked_rnn_grads(a: MaskedRNNGradArguments, step: Step, needs: Needs) -> tuple[Tensor, ...]:
    gradients = reference_rnn.masked_rnn_grads(
        a.grad_output, a.grad_h_n, a.x, a.h, a.w_ih, a.w_hh, a.mask_ih, a.mask_hh, a.lengths, a.output,
        a.output if step.leak == 1 else a.activations, step, *needs)
    return tuple(a.x.new_empty(0) if gradient is None else gradient for gradient in gradients)


# --- fake kernels --------------------------------------------------------------------------------------------------

def _fake_masked_rnn(a: MaskedRNNArguments, step: Step, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    output = a.x.new_empty(a.x.shape[0], a.x.shape[1], a.h.shape[1])
    activations = torch.empty_like(output) if keep and step.leak != 1 else a.x.new_empty(0)
    return output, torch.empty_like(a.h), activations


def fake_rnn_gradients(a: Any, step: Step, needs: Needs) -> tuple[Tensor, ...]:
    """The five gradients without numbers in them. a: the arguments of masked_rnn_grads or blocked_rnn_grads."""
    likes = (a.x, a.h, a.w_ih, a.w_hh, a.w_hh.new_empty(a.w_hh.shape[0]))
    return tuple(torch.empty_like(like) if need else a.x.new_empty(0) for like, need in zip(likes, needs))


# --- the autograd formula ------------------------------------------------------------------------------------------

class ChangeableOutput:
    """Lets the user change the output in place (`output += x`) before the backward pass, which reads it.

    PyTorch refuses a backward pass where a saved tensor has another version than it had when it was saved. Therefore
    `output.data` is saved, which shares the output's memory and has a version of its own, and `as_it_was` runs the op
    again where the output was changed; it gives the same bits again. This object shares the version of the output, and
    keeps neither its memory nor its graph alive.
    """

    def __init__(self, output: Tensor, run: Callable[..., Any], b_ih: Tensor | None, b_hh: Tensor | None):
        """run: the op masked_rnn, or what has its schema. b_ih, b_hh: what it takes, which nothing else needs again."""
        self._run, self._biases = run, (b_ih, b_hh)
        with torch._C._DisableTorchDispatch():  # no tracer need see this
            self._output = output.detach()
            self._output.data = output.new_empty(0)
        self._versions = self._output._version, *map(_version, self._biases)

    def as_it_was(self, x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, mask_ih: Tensor | None,
                  mask_hh: Tensor | None, lengths: Tensor | None, order_x: Tensor | None, order_h: Tensor | None,
                  output: Tensor, activations: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The output that the op has given, from what was saved, and its activations."""
        version, *versions = self._versions
        if self._output._version == version:
            return output, activations
        if [*map(_version, self._biases)] != versions:
            raise RuntimeError(
                "the masked RNN's output and a bias have both been modified by an inplace operation before backward; "
                "change the output out of place (output = output + x).")
        output, _, activations = self._run(x, h, w_ih, w_hh, *self._biases, mask_ih, mask_hh, *[None] * 4, lengths,
                                           order_x, order_h, *step, True)
        return output, activations


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def saved_output(output: Tensor, run: Callable[..., Any], b_ih: Tensor | None,
                 b_hh: Tensor | None) -> tuple[Tensor, ChangeableOutput | None]:
    """What a backward pass saves of the output, and what tells it whether the output was changed since.

    Where a compiler records the call, it is a copy, and nothing else: the compiler can tell whether it needs one.
    """
    if torch.jit.is_tracing():
        return output, None
    if type(output) is not Tensor or torch.compiler.is_compiling():
        return output.clone(), None
    return output.data, ChangeableOutput(output, run, b_ih, b_hh)


def _save(ctx: Any, results: tuple[Tensor, ...], a: MaskedRNNArguments, step: Step, keep: bool) -> None:
    if any(part is not None for part in (a.crow_ih, a.col_ih, a.crow_hh, a.col_hh)):
        raise NotImplementedError("compressed weights must not require gradients: train the SparseRNN they came from")
    if step.leak != 1 and not keep:
        raise RuntimeError("keep must be True where a gradient is needed")
    output, _, activations = results
    ctx.mark_non_differentiable(activations)
    ctx.set_materialize_grads(False)
    ctx.step = step
    output, ctx.changeable = saved_output(output, torch.ops.moduli_kernels.masked_rnn, a.b_ih, a.b_hh)
    ctx.save_for_backward(a.x, a.h, a.w_ih, a.w_hh, a.mask_ih, a.mask_hh, a.lengths, a.order_x, a.order_h, output,
                          activations)


def _formula(ctx: Any, needs: dict[str, bool], grad_output: Tensor | None, grad_h_n: Tensor | None,
             grad_activations: None) -> dict[str, Any]:
    *inputs, output, activations = saved = ctx.saved_tensors
    if ctx.changeable is not None:
        output, activations = ctx.changeable.as_it_was(*saved, ctx.step)
    leaves = [needs[name] for name in LEAVES]
    a = MaskedRNNGradArguments(
        None if grad_output is None else grad_output.contiguous(),
        torch.zeros_like(inputs[1]) if grad_h_n is None else grad_h_n.contiguous(), *inputs, output, activations)
    gradients = torch.ops.moduli_kernels.masked_rnn_grads(*a, *ctx.step, *Needs.of(leaves))
    return dict(zip(LEAVES, gradients_of_leaves(gradients, leaves)))


# --- declarations --------------------------------------------------------------------------------------------------

MASKED_RNN = declare(Op(
    "masked_rnn", (MaskedRNNArguments, Step, "bool keep"), "(Tensor, Tensor, Tensor)",
    fallback=_masked_rnn, fake=_fake_masked_rnn, launcher=LAUNCHER, derivative=Derivative(_save, _formula)))

MASKED_RNN_GRADS = declare(Op(
    "masked_rnn_grads", (MaskedRNNGradArguments, Step, Needs), GRADIENTS,
    fallback=_masked_rnn_grads, fake=fake_rnn_gradients, launcher=LAUNCHER))
