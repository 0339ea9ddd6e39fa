"""Inhibitors as functions of tiles. All that the Triton kernels know of an inhibitor stands in this file.

An inhibitor is one function, handed to the kernels as a constant:

    function(s, p, scale, table)    f and its slope df/ds, both times `scale`, from the squared distance s. p is the
                                    tuple of its constants; table is None, or a tabulated inhibitor's pointer.

The launcher works out the constants from the op's parameters, so that the kernel doesn't: see `Inhibitor`. NaN in s
comes out as NaN. To add an inhibitor, write its function, make an `Inhibitor` of it, and list it at the end of this
file. csrc/inhibitors.h writes the same formulas for the CPU, moduli_kernels/geometry/inhibitors.py for PyTorch.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..runtime import triton_interpreted
from .math import cos_sinc, numbers, power_positive, root_and_reciprocal

LOG2_E = math.log2(math.e)


class Form(NamedTuple):
    """An inhibitor as a launcher hands it over.

    function: the kernel's constant INHIBITOR
    constants: its p
    constant: whether f is the same at all distances, so that nothing pulls at the points
    """

    function: Any
    constants: list[float]
    constant: bool = False


class Inhibitor(NamedTuple):
    """An inhibitor for the launchers.

    code: its number, the op's argument `inhibitor`
    form: from the op's `inhibitor_parameters` and the number of samples of its table (0: none) to what a kernel needs
    """

    code: int
    form: Callable[[Sequence[float], int], Form]


def form_of(code: int, parameters: Sequence[float], samples: int) -> Form:
    """The inhibitor that an op's arguments mean."""
    return INHIBITORS[code].form(parameters, samples)


@triton.jit
def inhibitor(s, constants, scale, table, INHIBITOR: tl.constexpr):
    """f and df/ds, times scale. constants: those of the Form, as `kernel_numbers` sent them."""
    if s.dtype == tl.float64:  # three numbers for each
        p = numbers(constants, 0, len(constants) // 3, s.dtype)
    else:
        p = numbers(constants, 0, len(constants), s.dtype)
    return INHIBITOR(s, p, scale, table)


# --- difference of Gaussians -----------------------------------------------------------------------------------

@triton.jit
def difference_of_gaussians(s, p, scale, table):
    """p: c, offset, -log2(e)/sigma1, -log2(e)/sigma2, c/sigma1, c/sigma2."""
    narrow = tl.exp2(s * p[2])
    wide = tl.exp2(s * p[3])
    f = (scale * p[1]) + (scale * p[0]) * (narrow - wide)
    slope = (scale * p[5]) * wide - (scale * p[4]) * narrow
    return f, slope


def difference_of_gaussians_form(parameters: Sequence[float], samples: int) -> Form:
    c, sigma1, sigma2, offset = parameters
    return Form(difference_of_gaussians, [c, offset, -LOG2_E / sigma1, -LOG2_E / sigma2, c / sigma1,
                                          c / sigma2])


# --- diffusion: powers of the distance -------------------------------------------------------------------------

@triton.jit
def square(s, p, scale, table):
    """f = c s, which is `diffusion` with exponent 2. p: c."""
    c = scale * p[0]
    return c * s, tl.where(s == s, c, s)


@triton.jit
def root(s, p, scale, table):
    """f = c sqrt(s), which is `diffusion` with exponent 1. p: c."""
    c = scale * p[0]
    d, reciprocal = root_and_reciprocal(s)
    return c * d, tl.where(s == 0, 0.0, tl.where(s == s, (0.5 * c) * reciprocal, s))


@triton.jit
def diffusion(s, p, scale, table):
    """f = c s^(exponent/2). At s = 0 the slope diverges for exponents below 2; it is taken as 0, the limit for the
    others. p: c, exponent/2, c exponent/2."""
    power = power_positive(s, p[1])
    slope = (scale * p[2]) * power / tl.where(s == 0, 1.0, s)
    return (scale * p[0]) * power, slope


def diffusion_form(parameters: Sequence[float], samples: int) -> Form:
    """The exponents 2 and 1 do without powers."""
    c, exponent = parameters
    return Form({2.0: square, 1.0: root}.get(exponent, diffusion), [c, exponent / 2, c * exponent / 2])


# --- sinusoid --------------------------------------------------------------------------------------------------

@triton.jit
def sinusoid(s, p, scale, table):
    """p: c, mu, -c mu^2/2."""
    c = scale * p[0]
    d, _ = root_and_reciprocal(s)
    cosine, sinc = cos_sinc(p[1] * d)
    return c + c * cosine, (scale * p[2]) * sinc


def sinusoid_form(parameters: Sequence[float], samples: int) -> Form:
    c, mu = parameters
    return Form(sinusoid, [c, mu, -c * mu * mu / 2])


# --- Ricker wavelet --------------------------------------------------------------------------------------------

@triton.jit
def ricker(s, p, scale, table):
    """p: height, 1/sigma^2, -log2(e)/2, height/(2 sigma^2)."""
    height = scale * p[0]
    u = s * p[1]
    e = tl.exp2(u * p[2])
    return height - height * ((1 - u) * e), (scale * p[3]) * ((3 - u) * e)


def ricker_form(parameters: Sequence[float], samples: int) -> Form:
    sigma, c = parameters
    height = c * 2 / math.sqrt(3 * sigma * math.sqrt(math.pi))
    return Form(ricker, [height, 1 / sigma**2, -LOG2_E / 2, height / (2 * sigma**2)])


# --- constant --------------------------------------------------------------------------------------------------

@triton.jit
def constant(s, p, scale, table):
    """f = c, and NaN where s is. p: c."""
    return tl.where(s == s, scale * p[0], s), tl.where(s == s, 0.0, s)


def constant_form(parameters: Sequence[float], samples: int) -> Form:
    return Form(constant, list(parameters), constant=True)


# --- tabulated -------------------------------------------------------------------------------------------------

INTERPRETED = tl.constexpr(triton_interpreted)  # the interpreter knows no machine instructions


@triton.jit
def cubic(pointer):
    """The four numbers at `pointer`."""
    if INTERPRETED or pointer.dtype.element_ty == tl.float64:
        return tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2), tl.load(pointer + 3)
    else:
        # One load of 16 bytes by the thread that has the entry. Before loads of its own, the compiler would move the
        # entries to other threads.
        return tl.inline_asm_elementwise(
            "ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,l", [pointer.to(tl.int64)],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1)


@triton.jit
def tabulated(s, p, scale, table):
    """table (samples, 4): v, m, c2, c3 at equidistant nodes. From each on, f = v + t (m + t (c2 + t c3)), t in steps of
    the table; beyond the last f is constant. p: steps a unit of distance, the number of the last node."""
    steps, last = p[0], p[1]
    d, reciprocal = root_and_reciprocal(s)
    x = d * steps
    inside = x < last  # not so for NaN
    i = tl.where(inside, x, last).to(tl.int32)
    t = tl.where(inside, x - i.to(s.dtype), tl.where(x == x, 0.0, x))
    v, m, c2, c3 = cubic(table + 4 * i)
    f = v + t * (m + t * (c2 + t * c3))
    change = m + t * (2 * c2 + t * (3 * c3))
    return scale * f, tl.where(s == 0, 0.0, (0.5 * scale * steps) * change * reciprocal)


def tabulated_form(parameters: Sequence[float], samples: int) -> Form:
    return Form(tabulated, [(samples - 1) / parameters[0], samples - 1.0])


# --- all of them -----------------------------------------------------------------------------------------------

INHIBITORS: dict[int, Inhibitor] = {entry.code: entry for entry in (
    Inhibitor(0, difference_of_gaussians_form), Inhibitor(1, diffusion_form), Inhibitor(2, sinusoid_form),
    Inhibitor(3, ricker_form), Inhibitor(4, constant_form), Inhibitor(5, tabulated_form))}
