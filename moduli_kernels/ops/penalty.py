"""The ops of the penalty of one weight: arguments, fallbacks, fake kernels, autograd formula and declarations.

    penalty                   value alone
    penalty_with_grads        value and gradients in one pass over the weight
    penalty_grads             the gradients times a factor: what backward of `penalty` computes under torch.compile
    accumulate_penalty_grad_  value and gradients of the points; the weight's gradient is added into a given tensor
    proximal_step_            a soft threshold of the weight in place, for power 1
    scale_grads_              multiplies gradients in place by a factor

Values are 0-d and in the dtype of the points. Gradients are contiguous and shaped like what they belong to; those that
are not asked for come back without elements. A factor `grad` is 0-d, on the weight's device and in the dtype of the
points.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..geometry import encoding
from .registry import Derivative, Op, declare

LAUNCHER = "penalty.dense"
PROXIMAL_LAUNCHER = "penalty.proximal"

NEEDS = ("bool need_weight", "bool need_points")
GRADIENTS = "(Tensor, Tensor, Tensor)"  # of weight, rows and cols
VALUE_AND_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor)"


class PenaltyArguments(NamedTuple):
    """What the ops of one weight take.

    weight: (blocks*R, C, *kernel), with any row stride and all else contiguous. Or (entries,), contiguous: the values
        of a torch.sparse_csr matrix (blocks*R, C), and its gradient is then that of the values.
    rows: (R, k), contiguous, float64 for a float64 weight, else float32: the points of the rows.
    cols: (C, k), likewise: the points of the columns. None: rows and columns are the same neurons, and the gradient of
        rows holds the columns' part too.
    mask: bool, like weight, contiguous: entries where it is False cost nothing. None: all entries count.
    crow_indices: (blocks*R + 1,), int64: the row pointers of compressed values. None for a dense weight.
    col_indices: (entries,), int64: their columns. None for a dense weight.
    table: (samples, 4), in the dtype of the points: the tabulated inhibitor's cubics. None for the others.
    factors: code and number of columns of each factor of the manifold, in turn.
    factor_parameters: the parameters of the factors, in turn.
    inhibitor: the inhibitor's code.
    inhibitor_parameters: the inhibitor's parameters.
    power: l of |w|^l, at least 1.
    blocks: gate blocks stacked in rows, which share the points.
    scale: what the sum is multiplied by: the strength, over the number of entries where the mean is asked for.
    """

    weight: Tensor
    rows: Tensor
    cols: Tensor | None
    mask: Tensor | None
    crow_indices: Tensor | None
    col_indices: Tensor | None
    table: Tensor | None
    factors: list[int]
    factor_parameters: list[float]
    inhibitor: int
    inhibitor_parameters: list[float]
    power: float
    blocks: int
    scale: float


# --- fallbacks: the reference, in plain PyTorch --------------------------------------------------------------------

def _penalty_of(a: PenaltyArguments) -> reference.Penalty:
    return reference.Penalty(
        encoding.decode_manifold(a.factors, a.factor_parameters),
        encoding.decode_inhibitor(a.inhibitor, a.inhibitor_parameters, a.table), a.power, a.blocks, a.scale)


def _matrix_of(a: PenaltyArguments) -> Tensor:
    """The weight, or the torch.sparse_csr matrix that has these values."""
    if a.crow_indices is None or a.col_indices is None:
        return a.weight
    size = (a.blocks * len(a.rows), len(a.rows if a.cols is None else a.cols))
    return torch.sparse_csr_tensor(a.crow_indices, a.col_indices, a.weight, size, check_invariants=False)


def _penalty_with_grads(a: PenaltyArguments, need_weight: bool,
                        need_points: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    value, grads = reference.penalty_with_grads(_matrix_of(a), a.rows, a.cols, a.mask, _penalty_of(a), need_weight,
                                                need_points)
    dweight = grads.weight if a.crow_indices is None or grads.weight is None else grads.weight.values()
    return (value, a.weight.new_empty(0) if dweight is None else dweight,
            a.rows.new_empty(0) if grads.rows is None else grads.rows,
            a.rows.new_empty(0) if grads.cols is None else grads.cols)


def _penalty(a: PenaltyArguments) -> Tensor:
    value, *_ = _penalty_with_grads(a, False, False)
    return value


def _penalty_grads(grad: Tensor, a: PenaltyArguments, need_weight: bool, need_points: bool) -> tuple[Tensor, ...]:
    _, *grads = _penalty_with_grads(a._replace(scale=a.scale * grad), need_weight, need_points)  # pyright: ignore[reportArgumentType]
    return tuple(grads)


def _accumulate_penalty_grad_(grad: Tensor, a: PenaltyArguments, need_points: bool) -> tuple[Tensor, Tensor, Tensor]:
    value, dweight, drows, dcols = torch.ops.moduli_kernels.penalty_with_grads(*a, True, need_points)
    grad.add_(dweight)
    return value, drows, dcols


def _proximal_step_(a: PenaltyArguments, step: float) -> None:
    reference.proximal_step_(_matrix_of(a), a.rows, a.cols, a.mask, _penalty_of(a), step)


def _scale_grads_(grads: list[Tensor], grad: Tensor) -> None:
    for tensor in grads:
        tensor.mul_(grad)


# --- fake kernels --------------------------------------------------------------------------------------------------

def fake_gradients(weight: Tensor, rows: Tensor, cols: Tensor | None, need_weight: bool,
                   need_points: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, rows and cols without numbers in them."""
    return (
        torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else weight.new_empty(0),
        torch.empty_like(rows) if need_points else rows.new_empty(0),
        torch.empty_like(cols) if need_points and cols is not None else rows.new_empty(0),
    )


def _fake_penalty(a: PenaltyArguments) -> Tensor:
    return a.rows.new_empty(())


def _fake_penalty_with_grads(a: PenaltyArguments, need_weight: bool, need_points: bool) -> tuple[Tensor, ...]:
    return a.rows.new_empty(()), *fake_gradients(a.weight, a.rows, a.cols, need_weight, need_points)


def _fake_penalty_grads(grad: Tensor, a: PenaltyArguments, need_weight: bool, need_points: bool) -> tuple[Tensor, ...]:
    return fake_gradients(a.weight, a.rows, a.cols, need_weight, need_points)


def _fake_accumulate_penalty_grad_(grad: Tensor, a: PenaltyArguments, need_points: bool) -> tuple[Tensor, ...]:
    _, drows, dcols = fake_gradients(a.weight, a.rows, a.cols, False, need_points)
    return a.rows.new_empty(()), drows, dcols


def fake_nothing(*arguments: Any) -> None:
    """The fake kernel of an op that gives nothing back."""


# --- the autograd formula ------------------------------------------------------------------------------------------

TENSORS = ("weight", "rows", "cols", "mask", "crow_indices", "col_indices", "table")


def _save(ctx: Any, value: Tensor, a: PenaltyArguments) -> None:
    ctx.save_for_backward(*(getattr(a, name) for name in TENSORS))
    ctx.settings = a._replace(**dict.fromkeys(TENSORS))


def _formula(ctx: Any, needs: dict[str, bool], grad: Tensor) -> dict[str, Any]:
    a = ctx.settings._replace(**dict(zip(TENSORS, ctx.saved_tensors)))
    dweight, drows, dcols = torch.ops.moduli_kernels.penalty_grads(
        grad, *a, needs["weight"], needs["rows"] or needs["cols"])
    found = {"weight": dweight, "rows": drows, "cols": dcols}
    return {name: gradient for name, gradient in found.items() if needs[name]}


# --- declarations --------------------------------------------------------------------------------------------------

PENALTY = declare(Op(
    "penalty", (PenaltyArguments,), "Tensor",
    fallback=_penalty, fake=_fake_penalty, launcher=LAUNCHER, derivative=Derivative(_save, _formula)))

PENALTY_WITH_GRADS = declare(Op(
    "penalty_with_grads", (PenaltyArguments, *NEEDS), VALUE_AND_GRADIENTS,
    fallback=_penalty_with_grads, fake=_fake_penalty_with_grads, launcher=LAUNCHER))

PENALTY_GRADS = declare(Op(
    "penalty_grads", ("Tensor grad", PenaltyArguments, *NEEDS), GRADIENTS,
    fallback=_penalty_grads, fake=_fake_penalty_grads, launcher=LAUNCHER))

# grad: like weight, contiguous. Gives the value and the gradients of rows and cols.
ACCUMULATE_PENALTY_GRAD_ = declare(Op(
    "accumulate_penalty_grad_", ("Tensor grad", PenaltyArguments, "bool need_points"), "(Tensor, Tensor, Tensor)",
    fallback=_accumulate_penalty_grad_, fake=_fake_accumulate_penalty_grad_, launcher=LAUNCHER, mutates="grad"))

# weight <- sign(w) max(|w| - step scale f, 0). The power is 1.
PROXIMAL_STEP_ = declare(Op(
    "proximal_step_", (PenaltyArguments, "float step"), "()",
    fallback=_proximal_step_, fake=fake_nothing, launcher=PROXIMAL_LAUNCHER, mutates="weight"))

# Kernels return at once where the factor is 1.
SCALE_GRADS_ = declare(Op(
    "scale_grads_", ("Tensor[] grads", "Tensor grad"), "()",
    fallback=_scale_grads_, fake=fake_nothing, launcher=LAUNCHER, mutates="grads"))
