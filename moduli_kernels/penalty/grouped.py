"""The penalties of several weights as one differentiable function, in which small weights share launches on a GPU."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends
from ..autograd import only_once
from ..geometry import encoding
from ..geometry.inhibitors import TabulatedInhibitor
from ..ops import torch_ops
from ..ops.grouped import GroupedArguments
from ..reference import Penalty, compute_dtype
from .function import checked, refuse_second_derivative, row_strided
from .modules import ModuliRegularizer

_penalties_with_grads = torch_ops.penalties_with_grads.default
_penalties_grads = torch_ops.penalties_grads.default
_scale_penalties_grads_ = torch_ops.scale_penalties_grads_.default


class Layer(NamedTuple):
    """A weight with its points, in the compute dtype, and what is to be computed of it."""

    weight: Tensor
    rows: Tensor
    cols: Tensor | None
    what: Penalty


Gradients = list[Tensor | None]  # of L weights, L rows and L cols


def share_launches(regularizers: list[Any], weights: list[Tensor]) -> bool:
    """Whether the penalties of these weights can share launches: the weights are served by kernels that do so, and they
    have one manifold, inhibitor, power, device and compute dtype."""
    if len(weights) < 2 or torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    first = weights[0]
    # A subclass or a hook is the user's own code, which must run.
    if any(type(r) is not ModuliRegularizer or r._forward_hooks or r._forward_pre_hooks for r in regularizers):
        return False
    if any(w.layout != torch.strided or w.device != first.device or compute_dtype(w) != compute_dtype(first)
           for w in weights) or backends.active(first.device.type) != "triton":
        return False
    formulas = [(r.manifold, r.inhibitor, r.power) for r in regularizers]
    if any(formula != formulas[0] for formula in formulas):
        return False
    manifold, inhibitor, _ = formulas[0]
    if inhibitor.needs_points:  # it is another function for each weight
        return False
    return encoding.encode_manifold(manifold) is not None and encoding.encode_inhibitor(inhibitor) is not None


def layer_of(r: ModuliRegularizer, weight: Tensor) -> Layer:
    """What `r(weight)` is to compute; raises the errors of that call."""
    what, rows, cols = checked(weight, r.rows.points, None if r.cols is r.rows else r.cols.points, r.manifold,
                               r.inhibitor, r.power, r.blocks, None, r.reduction, r.strength)
    return Layer(weight, rows, cols, what)


def penalties(layers: list[Layer]) -> tuple[Tensor, Tensor]:
    """The sum of the penalties, 0-d, and the penalties, (L,), as moduli_penalty gives them one by one, by the ops.

    Weights are dense. Manifold, inhibitor, power, device and compute dtype are those of the first for all.
    """
    run = OpRunner(layers)
    weights, rows, cols, _ = zip(*layers)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*weights, *rows, *cols)):
        return _PenaltiesFunction.apply(run, *weights, *rows, *cols)
    nothing = [False] * len(layers)
    total, values, _ = run.values_and_grads((*weights, *rows, *cols), nothing, nothing)
    return total, values


class OpRunner:
    """Computes the penalties by the registered ops. `tensors` holds L weights, L rows and L cols (or None)."""

    def __init__(self, layers: list[Layer]):
        self.what = [layer.what for layer in layers]
        self.count, first = len(layers), self.what[0]
        self.code = cast(encoding.ManifoldCode, encoding.encode_manifold(first.manifold))
        self.inhibitor = cast(encoding.InhibitorCode, encoding.encode_inhibitor(first.inhibitor))

    def split(self, tensors: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """(weights, rows, cols) from `tensors`, or from one item for each of them."""
        n = self.count
        return tensors[:n], tensors[n:2 * n], tensors[2 * n:]

    def arguments(self, tensors: Sequence[Any]) -> GroupedArguments:
        """What the ops take."""
        weights, rows, cols = self.split(tensors)
        first, f = rows[0], self.what[0].inhibitor
        return GroupedArguments(
            weights=[row_strided(w) for w in weights], rows=[r.contiguous() for r in rows],
            cols=[None if c is None else c.contiguous() for c in cols],
            table=f.table(first.dtype, first.device) if isinstance(f, TabulatedInhibitor) else None,
            factors=self.code.factors, factor_parameters=self.code.parameters, inhibitor=self.inhibitor.kind,
            inhibitor_parameters=self.inhibitor.parameters, power=self.what[0].power,
            blocks=[what.blocks for what in self.what],
            scales=[what.scale for what in self.what],  # pyright: ignore[reportArgumentType]
        )

    def values_and_grads(self, tensors: Sequence[Any], need_weight: list[bool],
                         need_points: list[bool]) -> tuple[Tensor, Tensor, Gradients]:
        total, values, *grads = _penalties_with_grads(*self.arguments(tensors), need_weight, need_points)
        return total, values, self._present(grads, tensors, need_weight, need_points)

    def grads(self, grad: Tensor, tensors: Sequence[Any], need_weight: list[bool],
              need_points: list[bool]) -> Gradients:
        grads = _penalties_grads(grad, *self.arguments(tensors), need_weight, need_points)
        return self._present(grads, tensors, need_weight, need_points)

    def _present(self, grads: Sequence[list[Tensor]], tensors: Sequence[Any], need_weight: list[bool],
                 need_points: list[bool]) -> Gradients:
        """The gradients of `tensors`, None where they are not asked for."""
        _, _, cols = self.split(tensors)
        dweights, drows, dcols = grads
        present = (*need_weight, *need_points, *(p and c is not None for p, c in zip(need_points, cols)))
        return [g if p else None for g, p in zip((*dweights, *drows, *dcols), present)]

    def scale_(self, grads: list[Tensor | None], grad: Tensor) -> None:
        there = [(g, i % self.count) for i, g in enumerate(grads) if g is not None]
        _scale_penalties_grads_([g for g, _ in there], grad, [layer for _, layer in there])


class _PenaltiesFunction(torch.autograd.Function):
    """Like the autograd.Function of one weight (function.py): forward computes values and gradients in one pass, the
    first backward takes the gradients and scales them in place, and a repeated one computes them again."""

    @staticmethod
    def forward(ctx: Any, run: OpRunner, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.run = run
        ctx.set_materialize_grads(False)
        weight_needed, rows_needed, cols_needed = run.split(ctx.needs_input_grad[1:])
        ctx.needs = list(weight_needed), [r or c for r, c in zip(rows_needed, cols_needed)]
        ctx.save_for_backward(*tensors)
        weights, _, _ = run.split(tensors)
        if any(w.dtype == torch.float16 for w in weights):  # as for one weight
            nothing = [False] * run.count
            total, values, _ = run.values_and_grads(tensors, nothing, nothing)
            ctx.grads = None
        else:
            total, values, ctx.grads = run.values_and_grads(tensors, *ctx.needs)
        return total, values

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad_values: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_total is None and grad_values is None:
            return (None,) * len(ctx.needs_input_grad)
        grad = cast(Tensor, grad_values if grad_total is None else grad_total.expand(ctx.run.count))  # without a launch
        if grad_total is not None and grad_values is not None:
            grad = grad_total + grad_values
        if ctx.grads is not None:
            grads, ctx.grads = ctx.grads, None
            ctx.run.scale_(grads, grad)
        else:
            grads = ctx.run.grads(grad, ctx.saved_tensors, *ctx.needs)
        if torch.is_grad_enabled():  # create_graph=True: only a derivative of these gradients is an error
            sources = [t for t in ctx.saved_tensors if t is not None]
            grads = only_once(grads, refuse_second_derivative, grad, *sources)
        return (None, *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[1:])))
