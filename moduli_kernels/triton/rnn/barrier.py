"""The barrier between two steps: the programs of one part of the batch wait for each other.

All of them have to be on the GPU at once, which a cooperative launch makes sure of.
"""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wait(counter, target):
    """Waits until `counter` holds `target`. Then all can be read that other programs stored before they arrived.

    One thread asks. Its acquire at the scope of the GPU drops what the first-level cache holds, and the barrier after
    it makes that hold for all threads.
    """
    tl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .b32 v;
        mov.u32 v, %tid.x; setp.ne.u32 p, v, 0; @p bra done;
        again: ld.acquire.gpu.global.u32 v, [$1]; setp.lt.u32 p, v, $2; @p bra again;
        done: mov.u32 $0, 0; }""",
        "=r,l,r", [counter.to(tl.int64), target], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def arrive(counter):
    """Adds 1 to the counter, once all threads of this program have stored what they had to. The counter only grows:
    there is no reset that a slow program could miss."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
