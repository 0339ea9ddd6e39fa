"""Multiplies gradients in place by a number on the device, and returns at once where that is 1."""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_part(tensor, n, factor, BLOCK: tl.constexpr):
    """tensor (n) *= factor, in the compute type, shared out over all programs."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < n:
        at = start + tl.arange(0, BLOCK)
        x = tl.load(tensor + at, mask=at < n, other=0.0)
        tl.store(tensor + at, (x.to(factor.dtype) * factor).to(tensor.dtype.element_ty), mask=at < n)
        start += tl.num_programs(0).to(tl.int64) * BLOCK


@triton.jit
def scale_kernel(a, b, c, n_a, n_b, n_c, grad, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """COUNT of the tensors a, b, c with n_* elements, each times grad (0-d)."""
    factor = tl.load(grad)
    if factor != 1:
        scale_part(a, n_a, factor, BLOCK)
        if COUNT > 1:
            scale_part(b, n_b, factor, BLOCK)
        if COUNT > 2:
            scale_part(c, n_c, factor, BLOCK)
