"""`moduli_penalty`: the penalty of one weight as a differentiable function, and what its other forms share with it."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends, reference
from ..autograd import only_once
from ..checks import finite, one_of
from ..distributed import check_plain_points, is_sharded, shard_of, shared_by_ranks, sum_over_ranks
from ..geometry import encoding
from ..geometry.base import Inhibitor, Manifold
from ..geometry.inhibitors import Constant, DifferenceOfGaussians, TabulatedInhibitor, inhibitor as resolve_inhibitor
from ..geometry.presets import manifold as resolve_manifold
from ..ops import torch_ops
from ..ops.penalty import PenaltyArguments
from . import checks

_penalty = torch_ops.penalty.default
_penalty_with_grads = torch_ops.penalty_with_grads.default
_penalty_grads = torch_ops.penalty_grads.default
_accumulate_penalty_grad_ = torch_ops.accumulate_penalty_grad_.default
_proximal_step_ = torch_ops.proximal_step_.default
_scale_grads_ = torch_ops.scale_grads_.default


def moduli_penalty(
    weight: Tensor, rows: Tensor, cols: Tensor | None = None, *, manifold: Manifold | str,
    inhibitor: Inhibitor | Callable[[Tensor], Tensor] | None = None, power: float = 1.0, blocks: int = 1,
    mask: Tensor | None = None, reduction: str = "mean", strength: float = 1.0,
) -> Tensor:
    """strength * sum or mean over entries of f(d(rows_i, cols_j)) |w_ij|^power   (paper, eq. 6).

    Args:
        weight: (blocks*R, C), or (blocks*R, C, *kernel), where |w| is the L2 norm over the kernel. float32, float64,
            bfloat16 or float16. With any row stride and all else contiguous it is read in place, else copied once.
            Or (blocks*R, C) as torch.sparse_csr: only stored entries count, and the gradient has the same pattern.
            Or a DTensor that fully_shard has cut into rows: each rank computes its rows, so all ranks must call;
            the value and the gradients of points are summed over the ranks.
        rows: (R, k), the points of the rows.
        cols: (C, k), the points of the columns. None: rows and columns are the same neurons.
        manifold: a Manifold or a preset's name. The user's own subclass runs through the tiled PyTorch path.
        inhibitor: f. None: DifferenceOfGaussians(). A bare callable d -> f(d) runs through the tiled PyTorch path.
        power: l, at least 1.
        blocks: gate blocks that are stacked in rows and share the points (LSTM 4, GRU 3).
        mask: bool, in the weight's shape: entries where it is False cost nothing.
        reduction: "mean" divides by blocks*R*C, with or without a mask; "sum" is eq. 6.
        strength: lambda, finite.

    Returns:
        0-d tensor: float64 for float64 weights, else float32. Differentiable once in weight, rows and cols. The
        gradients are computed together with the value, in one pass over the weight, and the first backward takes
        them. NaN or infinity in weight or points make the value NaN or infinite.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which, and what to do.
        NotImplementedError: a second or a forward-mode derivative is asked for, the weight is torch.sparse_csr under
            torch.compile, or a DTensor is cut in another way. torch.func transforms are not supported.
    """
    f = resolve_inhibitor(inhibitor)
    if f.needs_points:
        return _penalty_at_points(weight, rows, cols, resolve_manifold(manifold), f, power, blocks, mask, reduction,
                                  strength)
    if is_sharded(weight):
        return _penalty_of_shard(weight, rows, cols, manifold, inhibitor, power, blocks, mask, reduction, strength)
    compiling = torch.compiler.is_compiling()
    what, rows, cols = checked(weight, rows, cols, manifold, inhibitor, power, blocks, mask, reduction,
                               1.0 if compiling else strength)
    run = runner(what, weight)
    if compiling:
        if weight.layout != torch.strided:
            raise NotImplementedError(
                "weight must be dense under torch.compile, got torch.sparse_csr; call the penalty outside the "
                "compiled function."
            )
        # The strength multiplies alone, since torch 2.10 takes a quotient of it for a constant and compiles again when
        # it changes.
        return run.traced(weight, rows, cols, mask) * strength
    tensors = (weight, rows) if cols is None else (weight, rows, cols)
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "moduli_penalty has no forward-mode derivative, got a dual tensor; use backward(), or "
            "moduli_kernels.reference.penalty_formula."
        )
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _PenaltyFunction.apply(weight, rows, cols, mask, run)
    return run.value(weight, rows, cols, mask)


def _penalty_at_points(
    weight: Tensor, rows: Tensor, cols: Tensor | None, manifold: Manifold, f: Inhibitor, power: float, blocks: int,
    mask: Tensor | None, reduction: str, strength: float,
) -> Tensor:
    """`moduli_penalty` with zero_min="sampled", whose offset is the largest difference g over all pairs of points.

    On the CPU the kernels get the offset as a number, and trained points get their gradient through it from a second
    term, which is 0 in value. Elsewhere and under torch.compile the offset must stay a tensor, so that nothing waits
    for it: the penalty with the analytic offset is then corrected by that with a constant cost.
    """
    assert isinstance(f, DifferenceOfGaussians)
    checks.penalty_arguments(weight, rows, cols, manifold, blocks, mask)
    dtype = reference.compute_dtype(weight)
    x, y = rows.to(dtype), None if cols is None else cols.to(dtype)

    def penalty(of: Tensor, inhibitor: Inhibitor, rows: Tensor, cols: Tensor | None) -> Tensor:
        return moduli_penalty(of, rows, cols, manifold=manifold, inhibitor=inhibitor, power=power, blocks=blocks,
                              mask=mask, reduction=reduction, strength=strength)

    largest = f.largest_over_pairs(manifold, x, y)
    fixed = x.detach(), None if y is None else y.detach()
    if torch.compiler.is_compiling() or largest.device.type != "cpu":
        analytic = dataclasses.replace(f, zero_min=True)
        return (penalty(weight, analytic, rows, cols)
                + (largest - analytic.offset) * penalty(weight, Constant(1.0), *fixed))
    value = penalty(weight, f.with_offset(largest.item()), rows, cols)
    if not largest.requires_grad:
        return value
    return value + (largest - largest.detach()) * penalty(weight.detach(), Constant(1.0), *fixed)


def _penalty_of_shard(
    weight: Tensor, rows: Any, cols: Any, manifold: Manifold | str,
    inhibitor: Inhibitor | Callable[[Tensor], Tensor] | None, power: float, blocks: int, mask: Tensor | None,
    reduction: str, strength: float,
) -> Tensor:
    """`moduli_penalty` of a sharded weight; rows, cols and mask are whole and equal on every rank."""
    check_plain_points(rows, cols)
    manifold = resolve_manifold(manifold)
    checks.penalty_arguments(weight, rows, cols, manifold, blocks, mask)
    scale = scale_of(weight, one_of("reduction", reduction, checks.REDUCTIONS), finite("strength", strength))
    shard = shard_of(weight)
    rows, cols = cast("tuple[Any, Any]", [
        None if points is None else shared_by_ranks(points, shard.group) for points in (rows, cols)])
    # A shard may cut through gate blocks, so the point of each of its rows is looked up.
    local_rows = torch.arange(shard.first, shard.first + shard.local.shape[0], device=rows.device)
    value = moduli_penalty(
        shard.local, rows[local_rows % max(1, rows.shape[0])], rows if cols is None else cols, manifold=manifold,
        inhibitor=inhibitor, power=power, mask=None if mask is None else shard.rows_of(mask), reduction="sum",
        strength=scale,
    )
    return sum_over_ranks(value, shard.group)


def checked(weight: Tensor, rows: Tensor, cols: Tensor | None, manifold: Manifold | str,
            inhibitor: Inhibitor | Callable[[Tensor], Tensor] | None, power: float, blocks: int, mask: Tensor | None,
            reduction: str, strength: float) -> tuple[reference.Penalty, Tensor, Tensor | None]:
    """(what is to be computed, rows, cols) from the arguments of `moduli_penalty`, with points in the compute dtype.

    Raises the errors of `moduli_penalty`, and NotImplementedError for a DTensor.
    """
    if is_sharded(weight):
        raise NotImplementedError(
            "weight must be a plain tensor where the penalty works in place, got a DTensor (fully_shard); add "
            "moduli_penalty(...) to the loss."
        )
    check_plain_points(rows, cols)
    manifold, inhibitor = resolve_manifold(manifold), resolve_inhibitor(inhibitor)
    checks.penalty_arguments(weight, rows, cols, manifold, blocks, mask)
    scale = scale_of(weight, one_of("reduction", reduction, checks.REDUCTIONS), finite("strength", strength))
    dtype = reference.compute_dtype(weight)
    rows, cols = rows.to(dtype), None if cols is None else cols.to(dtype)
    what = reference.Penalty(manifold, inhibitor.at_points(manifold, rows, cols), checks.power(power), blocks, scale)
    return what, rows, cols


def scale_of(weight: Tensor, reduction: str, strength: float) -> float:
    """What the sum over entries is multiplied by: the strength, divided for "mean" by the number of entries.

    weight: (blocks*R, C, *kernel), in which a kernel is one entry. A DTensor has the entries of all ranks.
    """
    return strength / max(1, weight.shape[0] * weight.shape[1]) if reduction == "mean" else strength


class _PenaltyFunction(torch.autograd.Function):
    """Forward computes value and gradients in one pass. The first backward takes the gradients and scales them in
    place, which costs nothing where grad is 1; a repeated one (retain_graph) computes them again.

    The gradients are a plain attribute of ctx, since saved tensors would live as long as the graph.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor, cols: Tensor | None, mask: Tensor | None,
                run: OpRunner | ReferenceRunner) -> Tensor:
        ctx.run = run
        weight_needed, rows_needed, cols_needed, *_ = ctx.needs_input_grad
        ctx.need_weight, ctx.need_points = weight_needed, rows_needed or cols_needed
        ctx.save_for_backward(weight, rows, cols, mask)
        if weight.dtype == torch.float16:
            # The gradient of a mean underflows in float16, unless the loss scale multiplies it before it is rounded.
            ctx.grads = None
            return run.value(weight, rows, cols, mask)
        value, ctx.grads = run.value_and_grads(weight, rows, cols, mask, ctx.need_weight, ctx.need_points)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is not None:
            grads, ctx.grads = ctx.grads, None
            ctx.run.scale_(grads, grad)
        else:
            grads = ctx.run.grads(grad, *ctx.saved_tensors, ctx.need_weight, ctx.need_points)
        if torch.is_grad_enabled():  # create_graph=True: only a derivative of these gradients is an error
            weight, rows, cols, _ = ctx.saved_tensors
            grads = only_once(grads, refuse_second_derivative, grad, weight, rows, cols)
        return (*(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad)), None, None)


def refuse_second_derivative() -> NoReturn:
    """Raises for a derivative of the penalty's gradients."""
    raise NotImplementedError(
        "moduli_penalty is differentiable once, got a second derivative (double backward); leave the penalty out "
        "of the loss you differentiate twice, or use moduli_kernels.reference.penalty_formula."
    )


class OpRunner:
    """Computes the penalty by the registered ops, which have kernels."""

    def __init__(self, what: reference.Penalty, code: encoding.ManifoldCode, inhibitor: encoding.InhibitorCode):
        self.what, self.code, self.inhibitor = what, code, inhibitor

    def arguments(self, weight: Tensor, rows: Tensor, cols: Tensor | None, mask: Tensor | None) -> PenaltyArguments:
        """What the ops take, made of the arguments of `moduli_penalty`."""
        what, f = self.what, self.what.inhibitor
        crow = col = None
        if weight.layout == torch.sparse_csr:
            crow, col = (index.to(torch.int64).contiguous() for index in (weight.crow_indices(), weight.col_indices()))
            weight = weight.values().contiguous()
        return PenaltyArguments(
            weight=row_strided(weight), rows=rows.contiguous(), cols=None if cols is None else cols.contiguous(),
            mask=None if mask is None else mask.contiguous(), crow_indices=crow, col_indices=col,
            table=f.table(rows.dtype, rows.device) if isinstance(f, TabulatedInhibitor) else None,
            factors=self.code.factors, factor_parameters=self.code.parameters, inhibitor=self.inhibitor.kind,
            inhibitor_parameters=self.inhibitor.parameters, power=what.power, blocks=what.blocks,
            scale=what.scale,  # pyright: ignore[reportArgumentType]
        )

    def value(self, *tensors: Any) -> Tensor:
        return _penalty(*self.arguments(*tensors))

    def traced(self, weight: Tensor, rows: Tensor, cols: Tensor | None, mask: Tensor | None) -> Tensor:
        """The value for torch.compile, by the op with a registered autograd formula. The scale is multiplied outside of
        the op: the compiler takes the op's own numbers for constants, and would compile again when they change."""
        a = self.arguments(weight, rows, cols, mask)
        return _penalty(*a._replace(scale=1.0)) * a.scale

    def value_and_grads(self, weight: Tensor, rows: Tensor, cols: Tensor | None, mask: Tensor | None, need_weight: bool,
                        need_points: bool) -> tuple[Tensor, Sequence[Tensor | None]]:
        value, *grads = _penalty_with_grads(*self.arguments(weight, rows, cols, mask), need_weight, need_points)
        return value, self._present(grads, weight, need_weight, need_points, cols)

    def grads(self, grad: Tensor, weight: Tensor, rows: Tensor, cols: Tensor | None, mask: Tensor | None,
              need_weight: bool, need_points: bool) -> Sequence[Tensor | None]:
        grads = _penalty_grads(grad, *self.arguments(weight, rows, cols, mask), need_weight, need_points)
        return self._present(grads, weight, need_weight, need_points, cols)

    def accumulate_(self, into: Tensor, weight: Tensor, rows: Tensor, cols: Tensor | None, mask: Tensor | None,
                    need_points: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        value, drows, dcols = _accumulate_penalty_grad_(into, *self.arguments(weight, rows, cols, mask), need_points)
        return value, drows if need_points else None, dcols if need_points and cols is not None else None

    def proximal_step_(self, weight: Tensor, rows: Tensor, cols: Tensor | None, mask: Tensor | None,
                       step: float) -> None:
        a = self.arguments(weight, rows, cols, mask)
        _proximal_step_(*a, step)
        if a.weight.data_ptr() != stored(weight).data_ptr():  # a weight of other strides went through a copy
            stored(weight).copy_(a.weight)

    @staticmethod
    def _present(grads: Sequence[Tensor | None], weight: Tensor, need_weight: bool, need_points: bool,
                 cols: Tensor | None) -> Sequence[Tensor | None]:
        """The gradients of weight, rows and cols, None where they are not asked for."""
        dweight, drows, dcols = grads
        if need_weight and weight.layout == torch.sparse_csr:  # the gradient has the weight's own pattern
            dweight = torch.sparse_csr_tensor(weight.crow_indices(), weight.col_indices(), dweight, weight.shape,  # pyright: ignore[reportArgumentType]
                                              check_invariants=False)
        return (dweight if need_weight else None, drows if need_points else None,
                dcols if need_points and cols is not None else None)

    @staticmethod
    def scale_(grads: Sequence[Tensor | None], grad: Tensor) -> None:
        if grad.device.type == "cpu" and grad.item() == 1:  # as in loss = criterion + penalty: nothing to do
            return
        _scale_grads_([stored(g) for g in grads if g is not None], grad)


class ReferenceRunner:
    """Computes the penalty by the reference: for a manifold or inhibitor without kernels, and where none are built."""

    def __init__(self, what: reference.Penalty):
        self.what = what

    def value(self, weight: Tensor, rows: Tensor, cols: Tensor | None, mask: Tensor | None) -> Tensor:
        with torch.no_grad():
            return reference.penalty_with_grads(weight, rows, cols, mask, self.what, False, False)[0]

    def traced(self, weight: Tensor, rows: Tensor, cols: Tensor | None, mask: Tensor | None) -> Tensor:
        return reference.penalty_formula(weight, rows, cols, mask, self.what)

    def value_and_grads(self, weight: Tensor, rows: Tensor, cols: Tensor | None, mask: Tensor | None, need_weight: bool,
                        need_points: bool) -> tuple[Tensor, Sequence[Tensor | None]]:
        return reference.penalty_with_grads(weight, rows, cols, mask, self.what, need_weight, need_points)

    def grads(self, grad: Tensor, weight: Tensor, rows: Tensor, cols: Tensor | None, mask: Tensor | None,
              need_weight: bool, need_points: bool) -> Sequence[Tensor | None]:
        what = self.what._replace(scale=self.what.scale * grad)
        return reference.penalty_with_grads(weight, rows, cols, mask, what, need_weight, need_points)[1]

    def accumulate_(self, into: Tensor, weight: Tensor, rows: Tensor, cols: Tensor | None, mask: Tensor | None,
                    need_points: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        value, (dweight, drows, dcols) = self.value_and_grads(weight, rows, cols, mask, True, need_points)
        assert dweight is not None  # asked for
        into.add_(stored(dweight))
        return value, drows, dcols

    def proximal_step_(self, weight: Tensor, rows: Tensor, cols: Tensor | None, mask: Tensor | None,
                       step: float) -> None:
        reference.proximal_step_(weight, rows, cols, mask, self.what, step)

    @staticmethod
    def scale_(grads: Sequence[Tensor | None], grad: Tensor) -> None:
        for g in grads:
            if g is not None:
                stored(g).mul_(grad)


def stored(gradient: Tensor) -> Tensor:
    """The entries that a gradient stores: all of them, or the values of a torch.sparse_csr one."""
    return gradient if gradient.layout == torch.strided else gradient.values()


def runner(what: reference.Penalty, weight: Tensor) -> OpRunner | ReferenceRunner:
    """What computes this penalty: the ops or, where they do not serve it, the reference."""
    backend = backends.active(weight.device.type)
    code, inhibitor = encoding.encode_manifold(what.manifold), encoding.encode_inhibitor(what.inhibitor)
    if (code is None or inhibitor is None) and not torch.compiler.is_compiling():
        if code is None:
            Manifold.warn_tiled(type(what.manifold).__name__, "the manifold")
        if inhibitor is None:
            Manifold.warn_tiled(repr(what.inhibitor), "the inhibitor")
    if backend == "reference" or code is None or inhibitor is None:
        return ReferenceRunner(what)
    return OpRunner(what, code, inhibitor)


def row_strided(weight: Tensor) -> Tensor:
    """The weight with any row stride and all else contiguous: itself where it has such strides, else a copy."""
    expected = 1
    for size, stride in zip(reversed(weight.shape[1:]), reversed(weight.stride()[1:])):
        if size != 1 and stride != expected:
            return weight.contiguous()
        expected *= size
    return weight
