"""Manifolds and inhibitors as the plain numbers that cross into the compiled ops, and back.

The codes stand here and in csrc/distance.h and csrc/inhibitor.h; tests/test_encoding.py holds them together.
"""
from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import inhibitors, manifolds

FLAT, SPHERE, KLEIN = 0, 1, 2
INHIBITORS = {
    inhibitors.DifferenceOfGaussians: (0, ("c", "sigma1", "sigma2", "offset")),
    inhibitors.Diffusion: (1, ("c", "exponent")),
    inhibitors.Sinusoid: (2, ("c", "mu")),
    inhibitors.RickerWavelet: (3, ("sigma", "c")),
    inhibitors.Constant: (4, ("c",)),
    inhibitors.TabulatedInhibitor: (5, ("max_distance",)),
}


class ManifoldCode(NamedTuple):
    """factors: kind and number of columns of each factor in turn. parameters, factor by factor: the period of
    each column (0 = not periodic) if FLAT, the radius if SPHERE, width and height if KLEIN."""

    factors: list[int]
    parameters: list[float]


class InhibitorCode(NamedTuple):
    kind: int
    parameters: list[float]


def encode_manifold(manifold: manifolds.Manifold) -> ManifoldCode | None:
    """None for a manifold that the kernels do not know (a user's subclass)."""
    factors, parameters = [], []
    for factor in manifold.factors():
        if type(factor) in (manifolds.Circle, manifolds.FlatTorus, manifolds.Euclidean):
            factors += [FLAT, factor.ambient_dim]
            parameters += factor._periods
        elif type(factor) is manifolds.Sphere:
            factors += [SPHERE, factor.ambient_dim]
            parameters.append(float(factor.radius))
        elif type(factor) is manifolds.KleinBottle:
            factors += [KLEIN, 2]
            parameters += [float(factor.width), float(factor.height)]
        else:
            return None
    return ManifoldCode(factors, parameters)


def encode_inhibitor(inhibitor: inhibitors.Inhibitor) -> InhibitorCode | None:
    """None for an inhibitor that the kernels do not know (a bare callable, a user's subclass)."""
    if type(inhibitor) not in INHIBITORS:
        return None
    kind, names = INHIBITORS[type(inhibitor)]
    return InhibitorCode(kind, [float(getattr(inhibitor, name)) for name in names])


def decode_manifold(factors: list[int], parameters: list[float]) -> manifolds.Manifold:
    """The manifold of a code. Flat factors come back as tori and lines side by side: the same distances."""
    made, at = [], 0
    for kind, columns in zip(factors[::2], factors[1::2]):
        if kind == SPHERE:
            made.append(manifolds.Sphere(columns - 1, parameters[at]))
            at += 1
        elif kind == KLEIN:
            made.append(manifolds.KleinBottle(parameters[at], parameters[at + 1]))
            at += 2
        else:
            made += [manifolds.FlatTorus((p,)) if p else manifolds.Euclidean(1) for p in parameters[at:at + columns]]
            at += columns
    return made[0] if len(made) == 1 else manifolds.Product(*made)


def decode_inhibitor(kind: int, parameters: list[float], table: Tensor | None) -> inhibitors.Inhibitor:
    for cls, (code, names) in INHIBITORS.items():
        if code == kind and cls is inhibitors.TabulatedInhibitor:
            return cls.from_values(table[:, 0].double().tolist(), parameters[0])
        if code == kind:
            arguments = dict(zip(names, parameters))
            if "offset" in arguments:  # c itself, or the peak of the difference, which is smaller
                arguments["zero_min"] = arguments.pop("offset") != arguments["c"]
            return cls(**arguments)
    raise ValueError(f"inhibitor must be a code from 0 to {len(INHIBITORS) - 1}, got {kind}; use encode_inhibitor.")
