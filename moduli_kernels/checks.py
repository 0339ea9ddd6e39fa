"""Checks of arguments that every part of the package makes; the checks of one part stand in its own folder's checks.py.

Each message names the argument, says what was expected and what came, and what to do. Checks don't wait for a GPU,
unless they look at values that the user hands over once, such as the points of an embedding.
"""
from __future__ import annotations

import math
import numbers
from typing import Any

import torch

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def shown(value: Any) -> str:
    """How an error shows the value that came: a number or a text as it is, anything else by its type."""
    return f"{value!r}" if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"


def positive(name: str, value: float) -> float:
    """The value as a float, which must be a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a positive finite number, got {shown(value)}; pass a float such as 5.0.")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}; pass a float such as 5.0.")
    return float(value)


def finite(name: str, value: float) -> float:
    """The value as a float, which must be a finite number."""
    if torch.compiler.is_compiling():  # a strength that changes is a symbol there, and was checked when it was set
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a finite number, got {shown(value)}; pass a float such as 0.1.")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}; pass a float such as 0.1.")
    return float(value)


def positive_int(name: str, value: int, minimum: int = 1) -> int:
    """The value, which must be an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer of at least {minimum}, got {shown(value)}; pass an int.")
    if value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value}; pass a larger one.")
    return value


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """The value, which must be one of the allowed ones."""
    if value not in allowed:
        choices = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{name} must be one of {choices}, got {shown(value)}; pick one of them.")
    return value


def ordered_sigmas(sigma1: float, sigma2: float) -> None:
    if not sigma1 < sigma2:
        raise ValueError(
            f"sigma1 must be smaller than sigma2 (narrow minus wide Gaussian), got sigma1={sigma1!r} and "
            f"sigma2={sigma2!r}; swap them or widen sigma2."
        )


def table_values(values: torch.Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            "f must be finite on [0, max_distance], got NaN or infinity in its samples; choose a smaller "
            "max_distance or an inhibitor without a pole."
        )


# --- points ----------------------------------------------------------------------------------------------------

def distance_arguments(manifold: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    """x (n, c) and y (m, c) as a manifold's distances take them."""
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, torch.Tensor):
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


def embedding_points(points: torch.Tensor, n: int, manifold: Any) -> None:
    """Points a user gives to ManifoldEmbedding; reads their values once."""
    if not isinstance(points, torch.Tensor):
        raise TypeError(f"points must be a tensor, got {shown(points)}; pass torch.as_tensor(points).")
    if tuple(points.shape) != (n, manifold.ambient_dim):
        raise ValueError(
            f"points must have shape ({n}, {manifold.ambient_dim}) for n={n} on {manifold}, got "
            f"{tuple(points.shape)}; give one row a neuron."
        )
    if points.dtype not in FLOATING:
        raise TypeError(f"points must be floating point, got {points.dtype}; convert them with .float().")
    if not bool(torch.isfinite(points).all()):
        raise ValueError("points must be finite, got NaN or infinity among them; clean the rows first.")
    manifold.check_points(points)


def zero_vectors(points: torch.Tensor, manifold: Any) -> None:
    """points (n, c): columns of one sphere; the origin has no direction to normalize, nor has, in its dtype, a vector
    whose length rounds to 0 or overflows."""
    norm = points.norm(dim=1)
    zero = ((norm == 0) | norm.isinf()).nonzero()
    if len(zero):
        raise ValueError(
            f"points must not hold a zero vector on {manifold} (it cannot be normalized), got one at row "
            f"{int(zero[0])}; give every row a direction."
        )
