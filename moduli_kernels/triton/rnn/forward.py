"""The forward steps of the masked RNN, one launch for a whole sequence (or for steps [t_begin, t_end) of it).

A program has a strip of rows and a part of the batch, in every step; between two steps the programs of that part wait
for each other (rnn_parts.wait). All of them must therefore be on the GPU at once, unless it is launched step by step.
"""
from __future__ import annotations

import triton
import triton.language as tl

from .parts import arrive, load_states, nonlinear, offset, wait
from .recurrent import hold, product


@triton.jit
def finish_forward(total, old, inputs, b_ih, b_hh, lengths, before, states, activations, step, row, b, t, n, batch,
                   stride_row, stride_batch, leak, stays, RELU: tl.constexpr, LEAKY: tl.constexpr):
    """Input, biases, nonlinearity, leak and lengths of a tile of `row` and `b`; its states are stored, and returned.
    old: its states before, None to read them. step: where step t begins."""
    row, b = row[:, None], b[None, :]
    at = row.to(tl.int64) * stride_row + b.to(tl.int64) * stride_batch
    inside = (row < n) & (b < batch)
    a = total + tl.load(inputs + step + at, mask=inside, other=0.0).to(tl.float32)
    if b_ih is not None:
        a += tl.load(b_ih + row, mask=row < n, other=0.0).to(tl.float32)
    if b_hh is not None:
        a += tl.load(b_hh + row, mask=row < n, other=0.0).to(tl.float32)
    s = nonlinear(a, RELU)
    if activations is not None:
        tl.store(activations + step + at, s.to(activations.dtype.element_ty), mask=inside)
    if LEAKY or lengths is not None:
        if old is None:
            old = tl.load(before + at, mask=inside, other=0.0)
        if LEAKY:
            s = stays * old.to(tl.float32) + leak * s
        if lengths is not None:
            s = tl.where(t < tl.load(lengths + b, mask=b < batch, other=0), s, old.to(tl.float32))
    new = s.to(states.dtype.element_ty)
    tl.store(states + step + at, new, mask=inside)
    return new


# one kernel for sequences of any length
@triton.jit(do_not_specialize=["t_begin", "t_end", "steps"])
def forward_kernel(
    inputs, h, b_ih, b_hh, weight, mask, kept, lengths, states, activations, counters, n, batch, tiles, size,
    stride_row, stride_batch, t_begin, t_end, steps, leak, stays, WAY: tl.constexpr, RELU: tl.constexpr,
    LEAKY: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr,
    MORE: tl.constexpr, SPLIT: tl.constexpr, ENTRIES: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
    DOT: tl.constexpr, BARRIER: tl.constexpr,
):
    """inputs, states, activations (or None): (steps, n, batch) by their strides, a step of `size` numbers; h one step
    of these; weight (n, n); mask bytes or None; kept instead of both: rnn_kept.Kept; lengths (batch) int64 or None.
    batch, size and stride_row are multiples of VECTOR, in units of it. stays: 1 - leak. tiles: of BATCH elements, in a
    part of the batch; grid: (strips or fewer, parts). counters: 0 at the start, one a part; None without BARRIER."""
    first, part = tl.program_id(0), tl.program_id(1)
    if VECTOR > 1:
        batch, size, stride_row = batch * VECTOR, size * VECTOR, stride_row * VECTOR
    begin, end, by = first, tl.cdiv(n, ROWS) * tiles, tl.num_programs(0)
    held, held_more = None, None
    if WAY == "held" or WAY == "alone":
        begin, end, by = part * tiles, tl.minimum(part * tiles + tiles, tl.cdiv(batch, BATCH)), 1
        held = hold(weight, mask, first, 0, n, False, ROWS, DEPTH, SPLIT, DOT)
        if MORE > 0:
            held_more = hold(weight, mask, first, DEPTH, n, False, ROWS, MORE, SPLIT, DOT)
    if WAY == "alone":
        before = h
        if t_begin > 0:
            before = states + offset(steps - t_begin if REVERSE else t_begin - 1, size)
        row, b = tl.arange(0, ROWS), part * BATCH + tl.arange(0, BATCH)
        own = load_states(before, row[:, None], b[None, :], n, batch, stride_row, stride_batch, DOT)

    k = first * 0 + t_begin
    while k < t_end:  # no `for`: Triton must not overlap steps
        t = steps - 1 - k if REVERSE else k
        step = offset(t, size)
        if WAY == "alone":
            total = tl.dot(held, own, input_precision=PRECISION)
            own = finish_forward(total, own, inputs, b_ih, b_hh, lengths, None, states, activations, step, row, b, t, n,
                                 batch, stride_row, stride_batch, leak, stays, RELU, LEAKY).to(DOT)
        else:
            before = h
            if k > 0:
                before = states + offset(t + 1 if REVERSE else t - 1, size)
            if BARRIER:
                if k > t_begin:
                    wait(counters + part, (k - t_begin) * tl.num_programs(0))
            work = begin
            while work < end:
                total, row, b = product(weight, mask, kept, held, held_more, before, work, first, part, tiles, n, batch,
                                        stride_row, stride_batch, WAY, False, ROWS, BATCH, DEPTH, MORE, SPLIT, ENTRIES,
                                        PRECISION, DOT)
                finish_forward(total, None, inputs, b_ih, b_hh, lengths, before, states, activations, step, row, b, t,
                               n, batch, stride_row, stride_batch, leak, stays, RELU, LEAKY)
                work += by
            if BARRIER:
                if k + 1 < t_end:
                    arrive(counters + part)
        k += 1
