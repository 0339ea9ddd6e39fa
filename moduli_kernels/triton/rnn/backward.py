"""The backward steps of the masked RNN, launched like the forward ones: dL/da of every step, and dL/dh.

Step k belongs to the k-th last state. With d the gradient of that state, da = leak s'(a) d, and the step before gets
W^T da + (1 - leak) d. Step number `steps` has no da: what it gets is the gradient of h.
"""
from __future__ import annotations

import triton
import triton.language as tl

from .barrier import arrive, wait
from .nonlinearity import slope
from .recurrent import hold, load_states, offset, recurrent_product


@triton.jit
def finish_backward(total, grad_output, grad_h_n, lengths, output, da, passed, dh, step, row, b, k, t, n, batch, steps,
                    stride_row, stride_batch, leak, stays, RELU: tl.constexpr):
    """Finishes a tile of step k from total = W^T da of the step after it in time: stores its da, which it returns too.

    row, b: the tile's rows and elements of the batch. passed: (n, batch) float32, what else the steps hand on; None
    where they hand on nothing. This program alone writes and reads its part of it.
    """
    row, b = row[:, None], b[None, :]
    at = row.to(tl.int64) * stride_row + b.to(tl.int64) * stride_batch
    inside = (row < n) & (b < batch)
    d = total
    if k == 0:
        d = tl.load(grad_h_n + at, mask=inside, other=0.0).to(tl.float32)
    elif passed is not None:
        d += tl.load(passed + at, mask=inside, other=0.0)
    own = d
    if k < steps:
        if grad_output is not None:
            d += tl.load(grad_output + step + at, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(output + step + at, mask=inside, other=0.0).to(tl.float32)
        own = leak * slope(s, RELU) * d
        rest = stays * d
        if lengths is not None:
            active = t < tl.load(lengths + b, mask=b < batch, other=0)
            own, rest = tl.where(active, own, 0.0), tl.where(active, rest, d)
        tl.store(da + step + at, own.to(da.dtype.element_ty), mask=inside)
        if passed is not None:
            tl.debug_barrier()  # what one thread writes, another may have read before, and may read in the next step
            tl.store(passed + at, rest, mask=inside)
            tl.debug_barrier()
    else:
        tl.store(dh + at, d.to(dh.dtype.element_ty), mask=inside)
    return own.to(da.dtype.element_ty)


# one kernel serves sequences of any length
@triton.jit(do_not_specialize=["t_begin", "t_end", "steps"])
def backward_kernel(
    # tensors; n * batch numbers a step
    grad_output,    # (steps, n, batch) by the strides; None: 0
    grad_h_n,       # (n, batch) by the strides
    weight,         # (n, n), or None
    mask,           # bytes like the weight, or None
    kept,           # block_product.Kept of W^T as a tuple, or None
    lengths,        # (batch) int64, steps of each element; or None
    activations,    # like grad_output: s(a)
    da,             # like grad_output
    passed,         # (n, batch) by the strides, float32; or None, see finish_backward
    dh,             # like grad_h_n; None where not needed
    counters,       # one a part, 0 at the start; None without BARRIER
    # sizes, strides, steps, numbers and constants: see forward_kernel; of `steps` + 1 steps the last gives dh
    n, batch, tiles, size,
    stride_row, stride_batch,
    t_begin, t_end, steps,
    leak, stays,
    WAY: tl.constexpr, RELU: tl.constexpr, REVERSE: tl.constexpr,
    ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr, MORE: tl.constexpr, SPLIT: tl.constexpr,
    ENTRIES: tl.constexpr, VECTOR: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr,
    BARRIER: tl.constexpr,
):
    """The grid is (strips or fewer, parts of the batch)."""
    first, part = tl.program_id(0), tl.program_id(1)
    if VECTOR > 1:
        batch, size, stride_row = batch * VECTOR, size * VECTOR, stride_row * VECTOR
    begin, end, by = first, tl.cdiv(n, ROWS) * tiles, tl.num_programs(0)
    held, held_more = None, None
    if WAY == "held" or WAY == "alone":
        begin, end, by = part * tiles, tl.minimum(part * tiles + tiles, tl.cdiv(batch, BATCH)), 1
        held = hold(weight, mask, first, 0, n, True, ROWS, DEPTH, SPLIT, DOT)
        if MORE > 0:
            held_more = hold(weight, mask, first, DEPTH, n, True, ROWS, MORE, SPLIT, DOT)
    if WAY == "alone":
        own = tl.zeros([ROWS, BATCH], DOT)
        row, b = tl.arange(0, ROWS), part * BATCH + tl.arange(0, BATCH)
        if t_begin > 0:
            before = da + offset(t_begin - 1 if REVERSE else steps - t_begin, size)
            own = load_states(before, row[:, None], b[None, :], n, batch, stride_row, stride_batch, DOT)

    k = first * 0 + t_begin
    while k < t_end:  # a `for` would let Triton overlap steps
        t = k if REVERSE else steps - 1 - k
        step = offset(t, size)
        if WAY == "alone":
            total = tl.dot(held, own, input_precision=PRECISION)
            own = finish_backward(total, grad_output, grad_h_n, lengths, activations, da, passed, dh, step, row, b, k,
                                  t, n, batch, steps, stride_row, stride_batch, leak, stays, RELU).to(DOT)
        else:
            before = da + offset(t - 1 if REVERSE else t + 1, size)
            if k == 0:
                before = grad_h_n  # the product is not used then, but what it loads must exist
            if BARRIER:
                if k > t_begin:
                    wait(counters + part, (k - t_begin) * tl.num_programs(0))
            work = begin
            while work < end:
                total, row, b = recurrent_product(
                    weight, mask, kept, held, held_more, before, work, first, part, tiles, n, batch, stride_row,
                    stride_batch, WAY, True, ROWS, BATCH, DEPTH, MORE, SPLIT, ENTRIES, PRECISION, DOT)
                finish_backward(total, grad_output, grad_h_n, lengths, activations, da, passed, dh, step, row, b, k,
                                t, n, batch, steps, stride_row, stride_batch, leak, stays, RELU)
                work += by
            if BARRIER:
                if k + 1 < t_end:
                    arrive(counters + part)
        k += 1
