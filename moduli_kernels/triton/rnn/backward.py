"""The backward steps of the masked RNN, in the manner of rnn_forward.py: dL/da of every step, and dL/dh.

Step k is that of k-th last state: with d its gradient, da = leak s'(a) d, and the step before gets W^T da + (1 - leak)
d. The last one, number `steps`, has no step of its own: what it gets is the gradient of h.
"""
from __future__ import annotations

import triton
import triton.language as tl

from .parts import arrive, load_states, offset, slope, wait
from .recurrent import hold, product


@triton.jit
def finish_backward(total, grad_output, grad_h_n, lengths, output, da, passed, dh, step, row, b, k, t, n, batch, steps,
                    stride_row, stride_batch, leak, stays, RELU: tl.constexpr):
    """A tile of step k, of `row` and `b`, from total = W^T da of the step after it in time; returns its da. passed:
    what else goes from step to step, (n, batch) float32, None where nothing does; written and read by this program
    alone."""
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
            tl.debug_barrier()  # what one thread writes another may have read, or may read in the next step
            tl.store(passed + at, rest, mask=inside)
            tl.debug_barrier()
    else:
        tl.store(dh + at, d.to(dh.dtype.element_ty), mask=inside)
    return own.to(da.dtype.element_ty)


# one kernel for sequences of any length
@triton.jit(do_not_specialize=["t_begin", "t_end", "steps"])
def backward_kernel(
    grad_output, grad_h_n, weight, mask, kept, lengths, activations, da, passed, dh, counters, n, batch, tiles, size,
    stride_row, stride_batch, t_begin, t_end, steps, leak, stays, WAY: tl.constexpr, RELU: tl.constexpr,
    REVERSE: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr, MORE: tl.constexpr,
    SPLIT: tl.constexpr, ENTRIES: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    BARRIER: tl.constexpr,
):
    """Steps [t_begin, t_end) of 0 ... `steps`; grad_output (None: 0), activations, da (steps, n, batch), grad_h_n, dh
    one step of these; kept: of W^T; the others as in forward_kernel."""
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
    while k < t_end:  # no `for`: Triton must not overlap steps
        t = k if REVERSE else steps - 1 - k
        step = offset(t, size)
        if WAY == "alone":
            total = tl.dot(held, own, input_precision=PRECISION)
            own = finish_backward(total, grad_output, grad_h_n, lengths, activations, da, passed, dh, step, row, b, k,
                                  t, n, batch, steps, stride_row, stride_batch, leak, stays, RELU).to(DOT)
        else:
            before = da + offset(t - 1 if REVERSE else t + 1, size)
            if k == 0:
                before = grad_h_n  # what is made of it is not used, but it can be read
            if BARRIER:
                if k > t_begin:
                    wait(counters + part, (k - t_begin) * tl.num_programs(0))
            work = begin
            while work < end:
                total, row, b = product(weight, mask, kept, held, held_more, before, work, first, part, tiles, n, batch,
                                        stride_row, stride_batch, WAY, True, ROWS, BATCH, DEPTH, MORE, SPLIT, ENTRIES,
                                        PRECISION, DOT)
                finish_backward(total, grad_output, grad_h_n, lengths, activations, da, passed, dh, step, row, b, k,
                                t, n, batch, steps, stride_row, stride_batch, leak, stays, RELU)
                work += by
            if BARRIER:
                if k + 1 < t_end:
                    arrive(counters + part)
        k += 1
