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
