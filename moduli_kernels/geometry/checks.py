"""Errors about points of manifolds and about parameters of inhibitors.

Each message names the argument, what was expected, what came and what to do. Only `embedding_points` and `zero_vectors`
read values, and so wait for a GPU: a user hands over the points of an embedding once.
"""
from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..checks import FLOATING, shown

if TYPE_CHECKING:
    from .base import Manifold


def distance_arguments(manifold: Manifold, x: Tensor, y: Tensor) -> None:
    """Raises an error unless x (n, c) and y (m, c) are coordinates of points, floating point, on one device."""
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor of points, got {shown(value)}; pass torch.as_tensor(...).")
        if value.dim() != 2 or value.shape[1] != manifold.ambient_dim:
            raise ValueError(
                f"{name} must have shape (points, {manifold.ambient_dim}) for {manifold}, got "
                f"{tuple(value.shape)}; give one row a point."
            )
        if value.dtype not in FLOATING:
            raise TypeError(f"{name} must be floating point, got {value.dtype}; convert it with .float().")
    if x.device != y.device:
        raise ValueError(f"x and y must be on one device, got {x.device} and {y.device}; move one with .to().")


def embedding_points(points: Tensor, n: int, manifold: Manifold, name: str = "points") -> None:
    """Raises an error unless points (n, ambient_dim) are finite, floating point, and points of the manifold.

    name: what errors call the points.
    """
    if not isinstance(points, Tensor):
        raise TypeError(f"{name} must be a tensor, got {shown(points)}; pass torch.as_tensor({name}).")
    if tuple(points.shape) != (n, manifold.ambient_dim):
        raise ValueError(
            f"{name} must have shape ({n}, {manifold.ambient_dim}) for n={n} on {manifold}, got "
            f"{tuple(points.shape)}; give one row a neuron."
        )
    if points.dtype not in FLOATING:
        raise TypeError(f"{name} must be floating point, got {points.dtype}; convert them with .float().")
    if points.is_meta:  # there are no values to look at
        return
    if not bool(torch.isfinite(points).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity among them; clean the rows first.")
    manifold.check_points(points)


def points_to_restore(given: Tensor | None) -> Tensor:
    """The points that an embedding was given, which must be known."""
    if given is None:
        raise ValueError(
            "points must be drawn or given with values to be reset, got them on the meta device; load a state dict "
            "instead, or make the embedding without points=."
        )
    return given


def points_with_values(points: Tensor, name: str = "points") -> None:
    """Raises an error for points, called `name`, on the meta device."""
    if points.is_meta:
        raise ValueError(
            f"{name} must have values, got a tensor on the meta device; call reset_parameters() after to_empty().")


def zero_vectors(points: Tensor, manifold: Manifold) -> None:
    """Raises an error if a row of points (n, c) has no direction: the columns are those of one sphere.

    The origin has none. Nor has, in its dtype, a vector whose length rounds to 0 or overflows.
    """
    norm = points.norm(dim=1)
    zero = ((norm == 0) | norm.isinf()).nonzero()
    if len(zero):
        raise ValueError(
            f"points must not hold a zero vector on {manifold} (it cannot be normalized), got one at row "
            f"{int(zero[0])}; give every row a direction."
        )


def torus_periods(periods: Any, more: tuple[Any, ...]) -> tuple[Any, ...]:
    """The periods of a torus, which must come as one non-empty sequence."""
    if more:
        meant = ", ".join(map(str, (periods, *more)))
        raise TypeError(
            f"periods must be one tuple of positive numbers, got {1 + len(more)} arguments; pass "
            f"FlatTorus(periods=({meant}))."
        )
    try:
        periods = tuple(periods)
    except TypeError:
        raise TypeError(
            f"periods must be a tuple of positive numbers, got {periods!r}; pass for example (10.0, 10.0).") from None
    if not periods:
        raise ValueError("periods must hold at least one positive number, got (); pass for example (10.0, 10.0).")
    return periods


def ordered_sigmas(sigma1: float, sigma2: float) -> None:
    """Raises an error unless sigma1 < sigma2."""
    if not sigma1 < sigma2:
        raise ValueError(
            f"sigma1 must be smaller than sigma2 (narrow minus wide Gaussian), got sigma1={sigma1!r} and "
            f"sigma2={sigma2!r}; swap them or widen sigma2."
        )


def zero_min(value: Any) -> Any:
    """The value as a bool or "sampled", which it must be."""
    if isinstance(value, str):
        if value != "sampled":
            raise ValueError(
                f"zero_min must be True, False or 'sampled', got {value!r}; 'sampled' takes the offset from the points."
            )
        return value
    if isinstance(value, (numbers.Integral, np.bool_)) and value in (0, 1):
        return bool(value)
    raise TypeError(f"zero_min must be True, False or 'sampled', got {shown(value)}; pass True, the default.")


def sampled_offset(offset: float | None) -> float:
    """The offset that was found among points, which must be known."""
    if offset is None:
        raise ValueError(
            "zero_min='sampled' must be given points before it has values (its offset is the largest difference of "
            "Gaussians over their pairs), got none; pass the inhibitor to moduli_penalty, ModuliRegularizer or "
            "regularize, or call inhibitor.at_points(manifold, rows)."
        )
    return offset


def table_values(values: Tensor) -> None:
    """Raises an error unless all samples of f are finite."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            "f must be finite on [0, max_distance], got NaN or infinity in its samples; choose a smaller "
            "max_distance or an inhibitor without a pole."
        )
