"""The penalty without autograd: its gradient added straight into `.grad`, and its proximal step on the weight."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import finite
from ..geometry.base import Inhibitor, Manifold
from ..geometry.inhibitors import Constant, DifferenceOfGaussians, inhibitor as resolve_inhibitor
from ..reference import Penalty, compute_dtype
from .function import checked, runner, stored


@torch.no_grad()
def accumulate_penalty_grad_(
    weight: Tensor, rows: Tensor, cols: Tensor | None = None, *, manifold: Manifold | str,
    inhibitor: Inhibitor | Callable[[Tensor], Tensor] | None = None, power: float = 1.0, blocks: int = 1,
    mask: Tensor | None = None, reduction: str = "mean", strength: float = 1.0,
) -> Tensor:
    """Adds the penalty's gradients into `.grad` of weight, rows and cols, each where it requires grad, and returns the
    value (paper, eq. 6). It does what `moduli_penalty(...).backward()` does, without a graph and without a second
    matrix for the gradient. Call it after the loss's backward and before the optimizer's step.

    The arguments are those of `moduli_penalty`; weight, rows and cols must be leaves where they require grad. A `.grad`
    that is None is made; one that is not contiguous is added to by way of a copy.

    Returns:
        0-d tensor, without a graph: float64 for float64 weights, else float32. The version counters of what is written
        go up.

    Raises:
        ValueError, TypeError: as `moduli_penalty`. ValueError also where a tensor that requires grad is no leaf.
        NotImplementedError: the weight is a DTensor.
    """
    what, row_points, column_points = checked(weight, rows, cols, manifold, inhibitor, power, blocks, mask, reduction,
                                              strength)
    for name, tensor in (("weight", weight), ("rows", rows), ("cols", cols)):
        if tensor is not None and tensor.requires_grad and not tensor.is_leaf:
            raise ValueError(
                f"{name} must be a leaf to have its .grad added to, got the result of {tensor.grad_fn.name()}; call "  # pyright: ignore[reportOptionalMemberAccess]
                "moduli_penalty and let backward() carry the gradient on."
            )
    need_points = any(t is not None and t.requires_grad for t in (rows, cols))
    run = runner(what, weight)
    into = weight.grad if weight.requires_grad else None
    if into is not None and can_take_in_place(into, weight):
        value, drows, dcols = run.accumulate_(stored(into), weight, row_points, column_points, mask, need_points)
        torch.autograd.graph.increment_version(into)
    else:
        value, (dweight, drows, dcols) = run.value_and_grads(weight, row_points, column_points, mask,
                                                             weight.requires_grad, need_points)
        _add_grad(weight, dweight)
    _add_grad(rows, drows)
    if cols is not None:
        _add_grad(cols, dcols)
    f = resolve_inhibitor(inhibitor)
    if need_points and f.needs_points:
        _add_grad_through_offset(f, what, weight, rows, cols, mask)
    return value


@torch.no_grad()
def proximal_step_(
    weight: Tensor, rows: Tensor, cols: Tensor | None = None, *, step: float, manifold: Manifold | str,
    inhibitor: Inhibitor | Callable[[Tensor], Tensor] | None = None, blocks: int = 1, mask: Tensor | None = None,
    reduction: str = "mean", strength: float = 1.0,
) -> None:
    """Applies the proximal operator of step * moduli_penalty, with power 1, to the weight in place: a soft threshold

        w_ij <- sign(w_ij) max(|w_ij| - step * strength * f(d(rows_i, cols_j)) / N, 0)

    where N is the number of entries for reduction="mean" and 1 for "sum". A kernel shrinks as a whole, by the factor
    max(1 - threshold / |w|, 0). The step makes exact zeros, where the penalty's gradient only makes small weights. With
    the learning rate as the step it takes the place of the penalty in the loss (ISTA).

    All arguments but step are those of `moduli_penalty`. Entries where a mask is False keep their values.

    Args:
        step: at least 0 and finite, for example the learning rate.

    Raises:
        ValueError, TypeError: as `moduli_penalty`. ValueError also for a step that is negative or not finite.
        NotImplementedError: the weight is a DTensor.
    """
    step = finite("step", step)
    if step < 0:
        raise ValueError(f"step must be >= 0, got {step}; pass the learning rate.")
    what, rows, cols = checked(weight, rows, cols, manifold, inhibitor, 1.0, blocks, mask, reduction, strength)
    runner(what, weight).proximal_step_(weight, rows, cols, mask, step)
    torch.autograd.graph.increment_version(weight)


def can_take_in_place(gradient: Tensor, weight: Tensor) -> bool:
    """Whether a kernel can add the weight's gradient into this one entry by entry."""
    if gradient.layout != weight.layout:
        return False
    if weight.layout == torch.strided:
        return gradient.dtype == weight.dtype and gradient.is_contiguous()
    # Our gradients have the weight's own index tensors. Comparing what indices hold would wait for the device.
    return (gradient.values().dtype == weight.values().dtype and gradient.values().is_contiguous()
            and gradient.crow_indices().data_ptr() == weight.crow_indices().data_ptr()
            and gradient.col_indices().data_ptr() == weight.col_indices().data_ptr())


def _add_grad_through_offset(f: Inhibitor, what: Penalty, weight: Tensor, rows: Tensor, cols: Tensor | None,
                             mask: Tensor | None) -> None:
    """Adds the points' gradients through the offset of zero_min="sampled" into their `.grad`, as `moduli_penalty` has
    them: the largest difference times scale * sum of |w|^l."""
    assert isinstance(f, DifferenceOfGaussians)
    dtype = compute_dtype(weight)
    x, y = rows.detach().to(dtype), None if cols is None else cols.detach().to(dtype)
    plain = what._replace(inhibitor=Constant(1.0))
    cost = runner(plain, weight).value(weight, x, y, mask)
    with torch.enable_grad():
        largest = f.largest_over_pairs(what.manifold, rows.to(dtype), None if cols is None else cols.to(dtype))
        points = [t for t in (rows, cols) if t is not None and t.requires_grad]
        for leaf, gradient in zip(points, torch.autograd.grad(largest, points, cost)):
            _add_grad(leaf, gradient)


def _add_grad(leaf: Tensor, gradient: Tensor | None) -> None:
    """Adds a gradient into leaf.grad, or sets it, where the leaf requires grad."""
    if gradient is None or not leaf.requires_grad:
        return
    gradient = gradient.to(leaf.dtype)
    if leaf.grad is None:
        leaf.grad = gradient
    elif leaf.grad.layout == gradient.layout != torch.strided:
        leaf.grad = leaf.grad + gradient
    else:
        leaf.grad += gradient
