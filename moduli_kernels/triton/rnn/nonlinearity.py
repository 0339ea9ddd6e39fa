"""The nonlinearity s(a) of the masked RNN and its slope."""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh(x) with relative error 2e-7. An odd polynomial where 1 - 2 / (e^2x + 1) would cancel. NaN stays NaN."""
    a, u = tl.abs(x), x * x
    p = u * 0.01645876 - 0.052684147
    p = p * u + 0.13320942
    p = p * u - 0.3333296
    large = 1 - 2 / (tl.exp2(a * 2.8853900817779268) + 1)
    return tl.where(a < 0.55, x + x * u * p, tl.where(x < 0, -large, tl.where(x > 0, large, x)))


@triton.jit
def nonlinear(a, RELU: tl.constexpr):
    """s(a): relu or tanh."""
    if RELU:
        return tl.where(a < 0, 0.0, a)  # maximum() would lose NaN
    else:
        return tanh(a)


@triton.jit
def slope(s, RELU: tl.constexpr):
    """ds/da, from s = s(a)."""
    if RELU:
        return tl.where(s > 0, 1.0, 0.0)
    else:
        return 1 - s * s
