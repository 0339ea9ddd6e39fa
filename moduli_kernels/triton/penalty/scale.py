"""Multiplies gradients in place by numbers on the device. Gradients whose number is 1 are left alone."""
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..device import on_device

BLOCK, PROGRAMS = 4096, 1024
TENSORS = 24  # a launch takes no more


@triton.jit
def scale_part(tensor, n, factor, BLOCK: tl.constexpr):
    """Multiplies tensor (n) by the factor, in the factor's type. All programs share it out."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < n:
        at = start + tl.arange(0, BLOCK)
        x = tl.load(tensor + at, mask=at < n, other=0.0)
        tl.store(tensor + at, (x.to(factor.dtype) * factor).to(tensor.dtype.element_ty), mask=at < n)
        start += tl.num_programs(0).to(tl.int64) * BLOCK


@triton.jit
def scale_kernel(
    tensors,    # tuple of contiguous tensors
    grad,       # the numbers that multiply them
    sizes,      # elements of each tensor
    OFFSETS: tl.constexpr,  # place of each tensor's number, from grad on
    BLOCK: tl.constexpr,
):
    """Multiplies each tensor by its number."""
    for i in tl.static_range(len(OFFSETS)):
        factor = tl.load(grad + OFFSETS[i])
        if factor != 1:
            scale_part(tensors[i], sizes[i], factor, BLOCK)


def scale_each_(grads: list[Tensor], grad: Tensor, offsets: list[int]) -> None:
    """Multiplies each of grads (contiguous) by the number that stands at its offset from the first of grad."""
    pairs = [(g, offset) for g, offset in zip(grads, offsets) if g.numel()]
    for first in range(0, len(pairs), TENSORS):
        tensors, here = zip(*pairs[first:first + TENSORS])
        sizes = tuple(g.numel() for g in tensors)
        with on_device(grad):
            scale_kernel[(min(PROGRAMS, triton.cdiv(max(sizes), BLOCK)),)](
                tensors, grad, sizes, OFFSETS=here, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=True)
