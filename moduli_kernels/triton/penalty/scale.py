"""Multiplies gradients in place by numbers on the device, and leaves those alone whose number is 1."""
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
def scale_kernel(tensors, sizes, grad, OFFSETS: tl.constexpr, BLOCK: tl.constexpr):
    """Each of the tensors, of so many elements, times the number at its offset from grad."""
    for i in tl.static_range(len(OFFSETS)):
        factor = tl.load(grad + OFFSETS[i])
        if factor != 1:
            scale_part(tensors[i], sizes[i], factor, BLOCK)
