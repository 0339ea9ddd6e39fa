"""Inhibitors as functions of the squared distance s: f and its slope df/ds, as in csrc/inhibitor.h, both times
`scale`. Formulas: moduli_kernels/inhibitors.py. What depends on the parameters alone is worked out by `constants`.
"""
from __future__ import annotations

import math

import triton
import triton.language as tl

from .math import cos_sinc, parameter, power_positive, root_and_reciprocal

DIFFERENCE_OF_GAUSSIANS = tl.constexpr(0)
DIFFUSION = tl.constexpr(1)
SINUSOID = tl.constexpr(2)
RICKER = tl.constexpr(3)
CONSTANT = tl.constexpr(4)
TABULATED = tl.constexpr(5)
# Diffusion with the exponents 2 and 1: c s and c sqrt(s), without powers
SQUARE = tl.constexpr(6)
ROOT = tl.constexpr(7)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # which knows no machine instructions


def constants(kind: int, p: list[float], samples: int) -> tuple[int, list[float]]:
    """The code of the function below, and its parameters, from code and parameters of moduli_kernels/_encoding.py
    and the number of samples of a table."""
    if kind == DIFFERENCE_OF_GAUSSIANS.value:
        c, sigma1, sigma2, offset = p
        return kind, [c, offset, -math.log2(math.e) / sigma1, -math.log2(math.e) / sigma2, c / sigma1, c / sigma2]
    if kind == DIFFUSION.value:
        c, exponent = p
        code = {2.0: SQUARE.value, 1.0: ROOT.value}.get(exponent, kind)
        return code, [c, exponent / 2, c * exponent / 2]
    if kind == SINUSOID.value:
        c, mu = p
        return kind, [c, mu, -c * mu * mu / 2]
    if kind == RICKER.value:
        sigma, c = p
        height = c * 2 / math.sqrt(3 * sigma * math.sqrt(math.pi))
        return kind, [height, 1 / sigma**2, -math.log2(math.e) / 2, height / (2 * sigma**2)]
    if kind == TABULATED.value:
        return kind, [(samples - 1) / p[0], samples - 1.0]
    return kind, p


@triton.jit
def difference_of_gaussians(s, p, scale):
    """c, offset, -log2(e)/sigma1, -log2(e)/sigma2, c/sigma1, c/sigma2"""
    narrow = tl.exp2(s * parameter(p, 2, s.dtype))
    wide = tl.exp2(s * parameter(p, 3, s.dtype))
    f = (scale * parameter(p, 1, s.dtype)) + (scale * parameter(p, 0, s.dtype)) * (narrow - wide)
    slope = (scale * parameter(p, 5, s.dtype)) * wide - (scale * parameter(p, 4, s.dtype)) * narrow
    return f, slope


@triton.jit
def square(s, p, scale):
    """c"""
    c = scale * parameter(p, 0, s.dtype)
    return c * s, tl.where(s == s, c, s)


@triton.jit
def root(s, p, scale):
    """c"""
    c = scale * parameter(p, 0, s.dtype)
    d, reciprocal = root_and_reciprocal(s)
    return c * d, tl.where(s == 0, 0.0, tl.where(s == s, (0.5 * c) * reciprocal, s))


@triton.jit
def diffusion(s, p, scale):
    """c, exponent/2, c exponent/2. The slope diverges at 0 for exponents below 2: 0 is taken there, the limit of the
    others."""
    half = parameter(p, 1, s.dtype)
    power = power_positive(s, half)
    slope = (scale * parameter(p, 2, s.dtype)) * power / tl.where(s == 0, 1.0, s)
    return (scale * parameter(p, 0, s.dtype)) * power, slope


@triton.jit
def sinusoid(s, p, scale):
    """c, mu, -c mu^2/2"""
    c = scale * parameter(p, 0, s.dtype)
    d, _ = root_and_reciprocal(s)
    cosine, sinc = cos_sinc(parameter(p, 1, s.dtype) * d)
    return c + c * cosine, (scale * parameter(p, 2, s.dtype)) * sinc


@triton.jit
def ricker(s, p, scale):
    """height, 1/sigma^2, -log2(e)/2, height/(2 sigma^2)"""
    height = scale * parameter(p, 0, s.dtype)
    u = s * parameter(p, 1, s.dtype)
    e = tl.exp2(u * parameter(p, 2, s.dtype))
    return height - height * ((1 - u) * e), (scale * parameter(p, 3, s.dtype)) * ((3 - u) * e)


@triton.jit
def constant(s, p, scale):
    """c"""
    return tl.where(s == s, scale * parameter(p, 0, s.dtype), s), tl.where(s == s, 0.0, s)


@triton.jit
def cubic(pointer):
    """The four numbers there."""
    if INTERPRETED or pointer.dtype.element_ty == tl.float64:
        return tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2), tl.load(pointer + 3)
    else:
        # one load of 16 bytes where the entry is: for its own loads the compiler would move entries to other threads
        return tl.inline_asm_elementwise(
            "ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,l", [pointer.to(tl.int64)],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1)


@triton.jit
def tabulated(s, p, scale, table):
    """table steps a distance, last sample; table (samples, 4): the cubic v + t (m + t (c2 + t c3)) from each
    equidistant node on, t in steps."""
    steps = parameter(p, 0, s.dtype)
    last = parameter(p, 1, s.dtype)
    d, reciprocal = root_and_reciprocal(s)
    x = d * steps
    inside = x < last  # not so for NaN
    i = tl.where(inside, x, last).to(tl.int32)
    t = tl.where(inside, x - i.to(s.dtype), tl.where(x == x, 0.0, x))
    v, m, c2, c3 = cubic(table + 4 * i)
    f = v + t * (m + t * (c2 + t * c3))
    change = m + t * (2 * c2 + t * (3 * c3))
    return scale * f, tl.where(s == 0, 0.0, (0.5 * scale * steps) * change * reciprocal)


@triton.jit
def inhibitor(s, parameters, scale, table, KIND: tl.constexpr):
    """f and df/ds, times scale."""
    if KIND == DIFFERENCE_OF_GAUSSIANS:
        return difference_of_gaussians(s, parameters, scale)
    elif KIND == DIFFUSION:
        return diffusion(s, parameters, scale)
    elif KIND == SQUARE:
        return square(s, parameters, scale)
    elif KIND == ROOT:
        return root(s, parameters, scale)
    elif KIND == SINUSOID:
        return sinusoid(s, parameters, scale)
    elif KIND == RICKER:
        return ricker(s, parameters, scale)
    elif KIND == CONSTANT:
        return constant(s, parameters, scale)
    else:
        return tabulated(s, parameters, scale, table)
