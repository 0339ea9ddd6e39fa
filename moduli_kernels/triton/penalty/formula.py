"""f(d) |w|^power as the kernels take it, from the arguments of an op: what all launchers begin with."""
from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..inhibitors import form_of
from ..manifolds import FIRST_COORDINATE, Factor, factors_of
from ..math import kernel_numbers


class Formula(NamedTuple):
    """Manifold, inhibitor and power.

    dtype: what the kernels compute in, that of the points
    constant: whether f is constant, so that the points have no gradient and their distances don't matter
    curved: whether distances are measured on a curved manifold
    factors: FACTORS for what finishes the gradients of the points
    constants: FACTORS, COORDINATES, INHIBITOR and DTYPE of a kernel that measures distances
    factor_parameters, inhibitor_parameters: arguments of the same name of such a kernel
    power: POWER of a kernel, which is 0 where the power is neither 1 nor 2 and comes as a number
    """

    dtype: torch.dtype
    constant: bool
    curved: bool
    factors: tuple[Factor, ...]
    constants: dict[str, Any]
    factor_parameters: tuple[float, ...]
    inhibitor_parameters: tuple[float, ...]
    power: int

    def numbers(self, *values: float) -> tuple[float, ...]:
        """Further numbers as a kernel's arguments."""
        return kernel_numbers(list(values), self.dtype)


def formula_of(a: Any, points: Tensor) -> Formula:
    """The formula that the arguments `a` of an op mean; points: some of its points (n, coordinates)."""
    return _formula(tuple(a.factors), tuple(a.factor_parameters), a.inhibitor, tuple(a.inhibitor_parameters),
                    0 if a.table is None else a.table.shape[0], a.power, points.dtype, points.shape[1])


# for the sake of small weights, whose launches take as long as all the rest
@functools.lru_cache(maxsize=256)
def _formula(codes: tuple[int, ...], factor_parameters: tuple[float, ...], inhibitor: int,
             inhibitor_parameters: tuple[float, ...], samples: int, power: float, dtype: torch.dtype,
             coordinates: int) -> Formula:
    manifold = factors_of(codes, factor_parameters)
    form = form_of(inhibitor, inhibitor_parameters, samples)
    constants = {
        "FACTORS": FIRST_COORDINATE if form.constant else manifold.factors, "COORDINATES": coordinates,
        "INHIBITOR": form.function, "DTYPE": tl.float64 if dtype == torch.float64 else tl.float32}
    return Formula(dtype, form.constant, manifold.curved and not form.constant, manifold.factors, constants,
                   kernel_numbers(manifold.parameters, dtype), kernel_numbers(form.constants, dtype),
                   int(power) if power in (1, 2) else 0)
