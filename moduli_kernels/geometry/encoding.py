"""Manifolds and inhibitors as the plain numbers that cross into the compiled ops, and the way back.

Each class declares its own numbers (`kernel_form`, `from_kernel`); the functions here serve every class that does.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from .base import INHIBITORS, MANIFOLDS, Inhibitor, Manifold
from .product import Product


class ManifoldCode(NamedTuple):
    """A manifold as the kernels take it: a product of factors.

    factors: for each factor in turn its code and its number of columns.
    parameters: for each factor in turn the numbers that its `kernel_form` names.
    """

    factors: list[int]
    parameters: list[float]


class InhibitorCode(NamedTuple):
    """An inhibitor as the kernels take it.

    kind: its code.
    parameters: the numbers that its `kernel_form` names.
    """

    kind: int
    parameters: list[float]


def encode_manifold(manifold: Manifold) -> ManifoldCode | None:
    """The numbers of a manifold; None if the kernels do not know it, as a user's subclass."""
    factors: list[int] = []
    parameters: list[float] = []
    for factor in manifold.factors():
        form = factor.kernel_form
        if form is None:
            return None
        factors += [form.code, factor.ambient_dim]
        parameters += form.values(factor)
    return ManifoldCode(factors, parameters)


def encode_inhibitor(inhibitor: Inhibitor) -> InhibitorCode | None:
    """The numbers of an inhibitor; None if the kernels do not know it, as a bare callable or a user's subclass."""
    form = inhibitor.kernel_form
    return None if form is None else InhibitorCode(form.code, form.values(inhibitor))


def decode_manifold(factors: list[int], parameters: list[float]) -> Manifold:
    """The manifold that these numbers stand for. Flat factors come back as circles and lines: distances are equal."""
    made: list[Manifold] = []
    left = iter(parameters)
    for i in range(0, len(factors), 2):
        cls = _class_of(factors[i], MANIFOLDS, f"factors[{i}]", "encode_manifold")
        made += cls.from_kernel(factors[i + 1], left)
    return made[0] if len(made) == 1 else Product(*made)


def decode_inhibitor(kind: int, parameters: list[float], table: Tensor | None) -> Inhibitor:
    """The inhibitor that these numbers stand for.

    kind: its code.
    parameters: its parameters.
    table: (samples, 4), the cubics of a TabulatedInhibitor; None for the others.
    """
    return _class_of(kind, INHIBITORS, "inhibitor", "encode_inhibitor").from_kernel(parameters, table)


_Class = TypeVar("_Class", bound="type[Manifold] | type[Inhibitor]")


def _class_of(code: int, registry: Sequence[_Class], name: str, encoder: str) -> _Class:
    """The class that the kernels know by this code; classes that share a code share their way back."""
    known = {cls.kernel_form.code: cls for cls in reversed(registry) if cls.kernel_form is not None}
    if code not in known:
        raise ValueError(f"{name} must be a code from 0 to {max(known)}, got {code}; use {encoder}.")
    return known[code]
