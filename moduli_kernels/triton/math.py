"""Elementary functions of tiles, by polynomials and by the approximations that the hardware offers.

float32 runs on ex2, lg2 and rsqrt (relative error below 2^-22) and on minimax polynomials; NaN comes out as NaN.
float64 aims at full precision and not at speed. float32 needs nothing from libdevice, which Triton's interpreter lacks.
csrc/math/elementary.h holds the same functions for the CPU.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

# Added to a product below a reciprocal square root: larger than every subnormal number, smaller than all that counts.
TINY = tl.constexpr(1e-36)
SIGN_BIT = tl.constexpr(-2147483648)


# --- numbers as arguments of a kernel ------------------------------------------------------------------------

def kernel_numbers(values: Sequence[float], dtype: torch.dtype) -> tuple[float, ...]:
    """The values as arguments of a kernel that computes in dtype; `number` reads them there.

    Triton hands floats over in single precision, so for float64 each value is sent as three that sum to it exactly.
    """
    if dtype != torch.float64:
        return tuple(values)
    sent = []
    for value in values:
        for _ in range(3):
            part = torch.tensor(value, dtype=torch.float32).item()
            sent.append(part)
            value -= part
    return tuple(sent)


@triton.jit
def number(values, INDEX: tl.constexpr, DTYPE: tl.constexpr):
    """Number INDEX of those that `kernel_numbers` sent, as a scalar of the type that the kernel computes in."""
    if DTYPE == tl.float64:
        return (tl.full([], values[3 * INDEX], DTYPE) + tl.full([], values[3 * INDEX + 1], DTYPE)
                + tl.full([], values[3 * INDEX + 2], DTYPE))
    else:
        return tl.full([], values[INDEX], DTYPE)


@triton.jit
def numbers(values, FIRST: tl.constexpr, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    """The tuple of COUNT such numbers from number FIRST on."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (number(values, FIRST + i, DTYPE),)
    return found


# --- functions -------------------------------------------------------------------------------------------------

@triton.jit
def signed_by(y, x):
    """Returns y times the sign of x, and 0 where x is 0 or NaN."""
    if x.dtype == tl.float32:
        bits = y.to(tl.int32, bitcast=True) ^ (x.to(tl.int32, bitcast=True) & SIGN_BIT)
        return tl.where(tl.abs(x) > 0, bits.to(tl.float32, bitcast=True), 0.0)
    else:
        return tl.where(x > 0, y, tl.where(x < 0, -y, 0.0))


@triton.jit
def power_positive(a, exponent):
    """Returns a^exponent for a >= 0 and exponent > 0, computed as 2^(exponent log2 a)."""
    return tl.exp2(exponent * tl.log2(a))


@triton.jit
def root_and_reciprocal(s):
    """Returns sqrt(s) and 1/sqrt(s) for s >= 0; the reciprocal stays finite at 0."""
    if s.dtype == tl.float64:
        root = tl.sqrt(s)
        return root, 1.0 / tl.maximum(root, 1e-150)
    else:
        reciprocal = tl.rsqrt(tl.maximum(s, TINY))
        return s * reciprocal, reciprocal


@triton.jit
def cos_sinc(x):
    """Returns cos(x) and sin(x)/x for 0 <= x < 2.5e4. In float32 the absolute error is 4.9e-9, plus rounding."""
    if x.dtype == tl.float64:
        sine = tl.sin(x)
        return tl.cos(x), tl.where(x == 0, 1.0, sine / tl.where(x == 0, 1.0, x))
    else:
        # adding 1.5 * 2^23 rounds to an integer and leaves its parity in the lowest bit
        shifted = x * 0.318309886 + 12582912.0
        n = shifted - 12582912.0
        # n pi is subtracted in three parts, of which the first two are exact for n < 2^13
        r = x - n * 3.140625
        r = r - n * 9.67502593994140625e-4
        r = r - n * 1.509957990978376432e-7
        sign = shifted.to(tl.int32, bitcast=True) << 31
        u = r * r
        c = u * -2.6075660e-7 + 2.4761808e-5
        c = c * u - 1.3888402e-3
        c = c * u + 4.1666641e-2
        c = c * u - 0.5
        c = c * u + 1.0
        s = u * 2.6087893e-6 - 1.9811053e-4
        s = s * u + 8.3330874e-3
        s = s * u - 1.6666660e-1
        s = s * u * r + r
        cosine = (c.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
        sine = (s.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
        return cosine, tl.where(x == 0, 1.0, sine / tl.where(x == 0, 1.0, x))


@triton.jit
def atan_of_ratio(q):
    """Returns atan(q) for 0 <= q <= 1. In float32 the absolute error is 2.3e-9, plus rounding; float64 is
    refined to full precision."""
    u = q * q
    p = u * -1.8271847e-3 + 1.1064315e-2
    p = p * u - 3.1455469e-2
    p = p * u + 5.8234320e-2
    p = p * u - 8.4194460e-2
    p = p * u + 1.0957572e-1
    p = p * u - 1.4265245e-1
    p = p * u + 1.9998639e-1
    p = p * u - 3.3333302e-1
    angle = p * u * q + q
    if q.dtype == tl.float64:
        # one step of refinement: what is missing is about 1e-8, and equals its own tangent to 1e-24
        sine, cosine = tl.sin(angle), tl.cos(angle)
        return angle + (q * cosine - sine) / (cosine + q * sine)
    else:
        return angle
