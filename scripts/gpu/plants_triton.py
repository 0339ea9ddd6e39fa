"""The Triton kernel that plants.py uses, in a file of its own because plants.py must import without Triton too."""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_up(numbers, out, COUNT: tl.constexpr):
    """Writes the sum of the first COUNT numbers to out, without any check of bounds."""
    tl.store(out, tl.sum(tl.load(numbers + tl.arange(0, COUNT))))
