"""Parts of the kernels of the masked RNN: the barrier between steps, loads under a mask, tanh and its slope.

A tile of states is (rows, batch): row r of element b of the batch stands at r * stride_row + b * stride_batch of its
step, so one kernel serves states as PyTorch has them, (T, B, H), and as compressed rows want them, (T, H, B).
"""
from __future__ import annotations

import triton
import triton.language as tl

# --- the barrier of the programs of one part of the batch ------------------------------------------------------

@triton.jit
def wait(counter, target):
    """Until `counter` holds `target`: what other programs stored before they arrived can then be read. One thread
    asks; its acquire at the scope of the GPU drops what the first-level cache holds, and the barrier hands it on."""
    tl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .b32 v;
        mov.u32 v, %tid.x; setp.ne.u32 p, v, 0; @p bra done;
        again: ld.acquire.gpu.global.u32 v, [$1]; setp.lt.u32 p, v, $2; @p bra again;
        done: mov.u32 $0, 0; }""",
        "=r,l,r", [counter.to(tl.int64), target], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def arrive(counter):
    """One more, once all threads of this program have stored what they had to. The counter only grows, so there is no
    reset that a slow program could miss."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


# --- addresses and loads -----------------------------------------------------------------------------------------

@triton.jit
def offset(t, size):
    """t * size in 64 bits."""
    return (tl.zeros([], tl.int64) + t) * size


@triton.jit
def load_weight(weight, mask, at, inside, DOT: tl.constexpr):
    """Entries of a weight, 0 where it is masked (whatever stands there) and outside. mask: bytes like weight, or
    None."""
    if mask is not None:
        inside = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    return tl.load(weight + at, mask=inside, other=0.0).to(DOT)


@triton.jit
def load_states(states, row, b, n, batch, stride_row, stride_batch, DOT: tl.constexpr):
    """States of these rows and elements of the batch (which broadcast), 0 outside."""
    at = row.to(tl.int64) * stride_row + b.to(tl.int64) * stride_batch
    return tl.load(states + at, mask=(row < n) & (b < batch), other=0.0).to(DOT)


# --- nonlinearities --------------------------------------------------------------------------------------------

@triton.jit
def tanh(x):
    """Relative error 2e-7: an odd polynomial where 1 - 2 / (e^2x + 1) would cancel. NaN comes out as NaN."""
    a, u = tl.abs(x), x * x
    p = u * 0.01645876 - 0.052684147
    p = p * u + 0.13320942
    p = p * u - 0.3333296
    large = 1 - 2 / (tl.exp2(a * 2.8853900817779268) + 1)
    return tl.where(a < 0.55, x + x * u * p, tl.where(x < 0, -large, tl.where(x > 0, large, x)))


@triton.jit
def nonlinear(a, RELU: tl.constexpr):
    if RELU:
        return tl.where(a < 0, 0.0, a)  # maximum() would lose NaN
    else:
        return tanh(a)


@triton.jit
def slope(s, RELU: tl.constexpr):
    """ds/da, from s."""
    if RELU:
        return tl.where(s > 0, 1.0, 0.0)
    else:
        return 1 - s * s
