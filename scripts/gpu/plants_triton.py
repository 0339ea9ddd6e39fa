"""The kernel of the planted reads of gpu_plants.py, which without Triton can be imported all the same."""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_up(numbers, out, COUNT: tl.constexpr):
    """out <- the sum of COUNT numbers, wherever they lie."""
    tl.store(out, tl.sum(tl.load(numbers + tl.arange(0, COUNT))))
