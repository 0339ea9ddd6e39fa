"""`moduli_penalty`: the penalty as a differentiable function."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends, checks, reference
from ..autograd import only_once
from ..distributed import check_plain_points, is_sharded, shard_of, shared_by_ranks, sum_over_ranks
from ..geometry import encoding
from ..geometry.inhibitors import Inhibitor, TabulatedInhibitor, inhibitor as resolve_inhibitor
from ..geometry.manifolds import Manifold, manifold as resolve_manifold
from ..ops import torch_ops

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
        weight: (blocks*R, C), or (R, C, *kernel), where |w| is the L2 norm of the kernel slice. float32, float64,
            bfloat16, float16; any row stride, else one copy. Or (blocks*R, C) torch.sparse_csr: only stored entries
            count, and the gradient has the same pattern. Or a DTensor sharded in rows (fully_shard): each rank
            computes its rows, and all must call; value and gradients of points are summed over ranks.
        rows: (R, k) points of the rows.
        cols: (C, k) points of the columns, None = rows.
        manifold: a Manifold or a preset's name; a subclass of one's own runs through the tiled PyTorch path.
        inhibitor: None = DifferenceOfGaussians(); a bare callable d -> f(d) runs through the tiled PyTorch path.
        power: l >= 1.
        blocks: gate blocks stacked in rows that share the points (LSTM 4, GRU 3).
        mask: bool, weight's shape: True entries count, the others cost nothing.
        reduction: "mean" divides by blocks*R*C, with or without a mask; "sum" is eq. 6.
        strength: lambda, finite.

    Returns:
        0-d tensor: float64 for float64 weights, else float32. Differentiable once in weight, rows and cols. The
        gradients are made together with the value, in one pass over the weight, and handed over to the first
        backward. NaN or infinity in weight or points reach the value.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which, and what to do.
        NotImplementedError: on a second or a forward-mode derivative, for a torch.sparse_csr weight under
            torch.compile, and for a DTensor cut in another way. torch.func transforms are not supported.
    """
    if is_sharded(weight):
        return _of_shard(weight, rows, cols, manifold, inhibitor, power, blocks, mask, reduction, strength)
    what, rows, cols = checked(weight, rows, cols, manifold, inhibitor, power, blocks, mask, reduction, strength)
    run = runner(what, weight)
    if torch.compiler.is_compiling():
        return run.traced(weight, rows, cols, mask)
    tensors = (weight, rows) if cols is None else (weight, rows, cols)
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "moduli_penalty has no forward-mode derivative, got a dual tensor; use backward(), or "
            "moduli_kernels.reference.penalty_formula."
        )
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _PenaltyFunction.apply(weight, rows, cols, mask, run)
    return run.value(weight, rows, cols, mask)


def _of_shard(
    weight: Tensor, rows: Any, cols: Any, manifold: Manifold | str,
    inhibitor: Inhibitor | Callable[[Tensor], Tensor] | None, power: float, blocks: int, mask: Tensor | None,
    reduction: str, strength: float,
) -> Tensor:
    """`moduli_penalty` of a sharded weight. rows, cols and mask are whole and equal on every rank."""
    check_plain_points(rows, cols)
    manifold = resolve_manifold(manifold)
    checks.penalty_arguments(weight, rows, cols, manifold, blocks, mask)
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    scale = checks.finite("strength", strength)
    if reduction == "mean":  # over the entries of all ranks
        scale /= max(1, weight.shape[0] * weight.shape[1])
    shard = shard_of(weight)
    rows, cols = cast("tuple[Any, Any]", [
        None if points is None else shared_by_ranks(points, shard.group) for points in (rows, cols)])
    # a shard may cut through gate blocks: the point of each of its rows, by index
    row = torch.arange(shard.first, shard.first + shard.local.shape[0], device=rows.device) % max(1, rows.shape[0])
    value = moduli_penalty(
        shard.local, rows[row], rows if cols is None else cols, manifold=manifold, inhibitor=inhibitor, power=power,
        mask=None if mask is None else shard.rows_of(mask), reduction="sum", strength=scale,
    )
    return sum_over_ranks(value, shard.group)


def checked(weight: Tensor, rows: Tensor, cols: Tensor | None, manifold: Manifold | str,
            inhibitor: Inhibitor | Callable[[Tensor], Tensor] | None, power: float, blocks: int, mask: Tensor | None,
            reduction: str, strength: float) -> tuple[reference.Penalty, Tensor, Tensor | None]:
    """(what is computed, rows, cols) from the arguments of `moduli_penalty`, points in the compute dtype."""
    if is_sharded(weight):
        raise NotImplementedError(
            "weight must be a plain tensor where the penalty works in place, got a DTensor (fully_shard); add "
            "moduli_penalty(...) to the loss."
        )
    check_plain_points(rows, cols)
    manifold, inhibitor = resolve_manifold(manifold), resolve_inhibitor(inhibitor)
    checks.penalty_arguments(weight, rows, cols, manifold, blocks, mask)
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    scale = checks.finite("strength", strength)
    if reduction == "mean":
        scale /= max(1, weight.shape[0] * weight.shape[1])
    what = reference.Penalty(manifold, inhibitor, checks.power(power), blocks, scale)
    dtype = reference.compute_dtype(weight)
    return what, rows.to(dtype), None if cols is None else cols.to(dtype)


class _PenaltyFunction(torch.autograd.Function):
    """One pass in forward makes value and gradients; the first backward takes the gradients and scales them in place
    (free where grad is 1), a repeated one (retain_graph) computes them again. They hang on ctx as a plain attribute:
    saved tensors would keep them until the graph dies."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor, cols: Tensor | None, mask: Tensor | None,
                run: _OpRunner | _ReferenceRunner) -> Tensor:
        ctx.run = run
        ctx.need_weight, ctx.need_points = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(weight, rows, cols, mask)
        if weight.dtype == torch.float16:
            # The gradient of a mean underflows in float16 unless it meets the loss scale before it is rounded.
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
            grads = only_once(grads, refuse_second_derivative, grad, *ctx.saved_tensors[:3])
        return (*(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad)), None, None)


def refuse_second_derivative() -> None:
    raise NotImplementedError(
        "moduli_penalty is differentiable once, got a second derivative (double backward); leave the penalty out "
        "of the loss you differentiate twice, or use moduli_kernels.reference.penalty_formula."
    )


class _OpRunner:
    """Through the registered ops (compiled kernels)."""

    def __init__(self, what: reference.Penalty, code: encoding.ManifoldCode, inhibitor: encoding.InhibitorCode):
        self.table_source = what.inhibitor if isinstance(what.inhibitor, TabulatedInhibitor) else None
        self.code = (*code, *inhibitor, what.power, what.blocks, what.scale)

    def arguments(self, weight: Tensor, rows: Tensor, cols: Tensor | None, mask: Tensor | None) -> tuple[Any, ...]:
        """Those of the ops, up to what they need."""
        table = None if self.table_source is None else self.table_source.table(rows.dtype, rows.device)
        crow = col = None
        if weight.layout == torch.sparse_csr:
            crow, col = (index.to(torch.int64).contiguous() for index in (weight.crow_indices(), weight.col_indices()))
            weight = weight.values().contiguous()
        return (row_strided(weight), rows.contiguous(), None if cols is None else cols.contiguous(),
                None if mask is None else mask.contiguous(), crow, col, table, *self.code)

    def value(self, *tensors: Any) -> Tensor:
        return _penalty(*self.arguments(*tensors))

    def traced(self, *tensors: Any) -> Tensor:
        """By the op with a registered autograd formula. The scale stays outside: shapes and a strength that change from
        step to step are symbols to the compiler, and the op's own numbers are constants."""
        _refuse_traced_csr(tensors[0])
        *arguments, scale = self.arguments(*tensors)
        return _penalty(*arguments, 1.0) * scale

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
        values, *arguments = self.arguments(weight, rows, cols, mask)
        _proximal_step_(values, *arguments, step)
        if values.data_ptr() != stored(weight).data_ptr():  # a weight of other strides went through a copy
            stored(weight).copy_(values)

    @staticmethod
    def _present(grads: Sequence[Tensor | None], weight: Tensor, need_weight: bool, need_points: bool,
                 cols: Tensor | None) -> Sequence[Tensor | None]:
        if need_weight and weight.layout == torch.sparse_csr:  # the weight's own pattern
            grads = (torch.sparse_csr_tensor(weight.crow_indices(), weight.col_indices(), grads[0], weight.shape,  # pyright: ignore[reportArgumentType]
                                             check_invariants=False), *grads[1:])
        present = (need_weight, need_points, need_points and cols is not None)
        return tuple(g if p else None for g, p in zip(grads, present))

    @staticmethod
    def scale_(grads: Sequence[Tensor | None], grad: Tensor) -> None:
        if grad.device.type == "cpu" and grad.item() == 1:  # loss = criterion + penalty: nothing to do
            return
        _scale_grads_([stored(g) for g in grads if g is not None], grad)


class _ReferenceRunner:
    """Through `reference.py`, for what no kernel knows and where none is built."""

    def __init__(self, what: reference.Penalty):
        self.what = what

    def value(self, weight: Tensor, rows: Tensor, cols: Tensor | None, mask: Tensor | None) -> Tensor:
        with torch.no_grad():
            return reference.penalty_with_grads(weight, rows, cols, mask, self.what, False, False)[0]

    def traced(self, weight: Tensor, rows: Tensor, cols: Tensor | None, mask: Tensor | None) -> Tensor:
        _refuse_traced_csr(weight)
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
    """The numbers of a gradient: itself, or the values of a compressed one."""
    return gradient if gradient.layout == torch.strided else gradient.values()


def _refuse_traced_csr(weight: Tensor) -> None:
    if weight.layout != torch.strided:
        raise NotImplementedError(
            "weight must be dense under torch.compile, got torch.sparse_csr; call the penalty outside the "
            "compiled function."
        )


def runner(what: reference.Penalty, weight: Tensor) -> _OpRunner | _ReferenceRunner:
    """What computes it: the ops or, for what they do not know, the reference."""
    backend = backends.active(weight.device.type)
    code, inhibitor = encoding.encode_manifold(what.manifold), encoding.encode_inhibitor(what.inhibitor)
    if (code is None or inhibitor is None) and not torch.compiler.is_compiling():
        if code is None:
            Manifold.warn_tiled(type(what.manifold).__name__, "the manifold")
        if inhibitor is None:
            Manifold.warn_tiled(repr(what.inhibitor), "the inhibitor")
    if backend == "reference" or code is None or inhibitor is None:
        return _ReferenceRunner(what)
    return _OpRunner(what, code, inhibitor)


def row_strided(weight: Tensor) -> Tensor:
    """weight with any row stride and the rest of it contiguous: itself where it is so, else one copy."""
    expected = 1
    for size, stride in zip(reversed(weight.shape[1:]), reversed(weight.stride()[1:])):
        if size != 1 and stride != expected:
            return weight.contiguous()
        expected *= size
    return weight
