"""The forward steps of the masked RNN: one launch for a whole sequence, or for its steps [t_begin, t_end).

In every step a program has the same strip of rows and part of the batch. Between two steps the programs of a part wait
for each other (barrier.py), so all of them have to be on the GPU at once, unless each step is a launch.
"""
from __future__ import annotations

import triton
import triton.language as tl

from .barrier import arrive, wait
from .nonlinearity import nonlinear
from .recurrent import hold, load_states, offset, recurrent_product


@triton.jit
def finish_forward(total, old, inputs, b_ih, b_hh, lengths, before, states, activations, step, row, b, t, n, batch,
                   stride_row, stride_batch, leak, stays, RELU: tl.constexpr, LEAKY: tl.constexpr):
    """Adds input and biases to the product `total` of a tile, applies nonlinearity, leak and lengths, and stores the
    tile's new states, which it returns too. row, b: the tile's rows and elements of the batch. old: its states before
    the step, None to load them. step: where step t begins."""
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


# one kernel serves sequences of any length
@triton.jit(do_not_specialize=["t_begin", "t_end", "steps"])
def forward_kernel(
    # tensors; n * batch numbers a step
    inputs,         # (steps, n, batch) by the strides: W_ih x of each step
    h,              # (n, batch) by the strides: the states before the first step
    b_ih, b_hh,     # (n), or None
    weight,         # (n, n); None where `kept` is given
    mask,           # bytes like the weight, or None
    kept,           # block_product.Kept as a tuple, or None
    lengths,        # (batch) int64, steps of each element; or None
    states,         # like inputs
    activations,    # like inputs: s(a), or None
    counters,       # one a part, 0 at the start; None without BARRIER
    # sizes: batch and size in units of VECTOR, so that the compiler knows what is aligned
    n, batch,
    tiles,          # how many tiles of BATCH elements a part of the batch has
    size,           # numbers in a step
    # strides; stride_row in units of VECTOR
    stride_row, stride_batch,
    # steps of this launch, and of the sequence
    t_begin, t_end, steps,
    # numbers: the leak and 1 - leak
    leak, stays,
    # constants of the step
    WAY: tl.constexpr, RELU: tl.constexpr, LEAKY: tl.constexpr, REVERSE: tl.constexpr,
    # constants of the programs, see shares.py
    ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr, MORE: tl.constexpr, SPLIT: tl.constexpr,
    ENTRIES: tl.constexpr, VECTOR: tl.constexpr,
    # how tensor cores multiply, see device.Numbers
    PRECISION: tl.constexpr, DOT: tl.constexpr,
    BARRIER: tl.constexpr,      # whether programs wait for each other
):
    """The grid is (strips or fewer, parts of the batch)."""
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
    while k < t_end:  # a `for` would let Triton overlap steps
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
                total, row, b = recurrent_product(
                    weight, mask, kept, held, held_more, before, work, first, part, tiles, n, batch, stride_row,
                    stride_batch, WAY, False, ROWS, BATCH, DEPTH, MORE, SPLIT, ENTRIES, PRECISION, DOT)
                finish_forward(total, None, inputs, b_ih, b_hh, lengths, before, states, activations, step, row, b, t,
                               n, batch, stride_row, stride_batch, leak, stays, RELU, LEAKY)
                work += by
            if BARRIER:
                if k + 1 < t_end:
                    arrive(counters + part)
        k += 1
