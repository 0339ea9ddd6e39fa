"""W h of one step, for a strip of rows and a tile of the batch, in one of four ways:

    "alone"     One program has all rows. W and the states stay on its chip over all steps, and nobody waits.
    "held"      W's strip stays on the chip. The states of the step before are loaded, those of all strips.
    "streamed"  W's strip is loaded anew in every step, from the second-level cache where it fits in.
    "kept"      So are the blocks and strays that a mask keeps, see block_product.py.

If TRANSPOSED it is W^T that multiplies, for backward. Row r of element b of the batch stands at r * stride_row +
b * stride_batch of its step, so that the same code serves states as PyTorch has them, (T, B, H), and as compressed rows
need them, (T, H, B). Factors of 4 bytes are multiplied on tensor cores as PRECISION says.
"""
from __future__ import annotations

import triton
import triton.language as tl

from .block_product import kept_product, strip_rows

# --- addresses and loads ---------------------------------------------------------------------------------------

@triton.jit
def offset(t, size):
    """Returns t * size in 64 bits."""
    return (tl.zeros([], tl.int64) + t) * size


@triton.jit
def load_weight(weight, mask, at, inside, DOT: tl.constexpr):
    """Entries of a weight, 0 outside it and where it is masked, whatever number stands there. mask: bytes like the
    weight, or None."""
    if mask is not None:
        inside = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    return tl.load(weight + at, mask=inside, other=0.0).to(DOT)


@triton.jit
def load_states(states, row, b, n, batch, stride_row, stride_batch, DOT: tl.constexpr):
    """The states of rows `row` for elements `b` of the batch (the two broadcast), 0 outside."""
    at = row.to(tl.int64) * stride_row + b.to(tl.int64) * stride_batch
    return tl.load(states + at, mask=(row < n) & (b < batch), other=0.0).to(DOT)


# --- products --------------------------------------------------------------------------------------------------

@triton.jit
def weight_tile(weight, mask, row, k, n, TRANSPOSED: tl.constexpr, DOT: tl.constexpr):
    """W[row, k] or, if TRANSPOSED, W[k, row]. row and k broadcast, and have the bits that places up to n^2 need."""
    if TRANSPOSED:
        at = k * n + row
    else:
        at = row * n + k
    return load_weight(weight, mask, at, (row < n) & (k < n), DOT)


@triton.jit
def hold(weight, mask, strip, begin: tl.constexpr, n, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
         SPLIT: tl.constexpr, DOT: tl.constexpr):
    """W's strip from column `begin` on: (ROWS, DEPTH), or (SPLIT, ROWS, DEPTH / SPLIT) with a part of the depth for
    each warp. A weight whose strip fits on the chip is so small that 32 bits are enough for places in it; they take
    half the registers."""
    row = strip * ROWS + tl.arange(0, ROWS)
    if SPLIT == 1:
        return weight_tile(weight, mask, row[:, None], begin + tl.arange(0, DEPTH)[None, :], n, TRANSPOSED, DOT)
    else:
        k = begin + part_begins(DEPTH, SPLIT)[:, None, None] + tl.arange(0, DEPTH // SPLIT)[None, None, :]
        return weight_tile(weight, mask, row[None, :, None], k, n, TRANSPOSED, DOT)


@triton.jit
def part_begins(DEPTH: tl.constexpr, SPLIT: tl.constexpr):
    """(SPLIT,), where each part of the depth begins."""
    return tl.arange(0, SPLIT) * (DEPTH // SPLIT)


@triton.jit
def held_product(held, held_more, before, b, n, batch, stride_row, stride_batch, DEPTH: tl.constexpr,
                 MORE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr):
    """(ROWS, BATCH) for the elements b of the batch, from what `hold` returned for the first DEPTH columns and for MORE
    columns after them. Each warp multiplies its part of the depth; then the parts are added."""
    if SPLIT == 1:
        k = tl.arange(0, DEPTH)[:, None]
        states = load_states(before, k, b[None, :], n, batch, stride_row, stride_batch, DOT)
        return tl.dot(held, states, input_precision=PRECISION)
    else:
        b = b[None, None, :]
        k = part_begins(DEPTH, SPLIT)[:, None, None] + tl.arange(0, DEPTH // SPLIT)[None, :, None]
        states = load_states(before, k, b, n, batch, stride_row, stride_batch, DOT)
        total = tl.dot(held, states, input_precision=PRECISION)
        if MORE > 0:
            k = DEPTH + part_begins(MORE, SPLIT)[:, None, None] + tl.arange(0, MORE // SPLIT)[None, :, None]
            states = load_states(before, k, b, n, batch, stride_row, stride_batch, DOT)
            total = tl.dot(held_more, states, total, input_precision=PRECISION)
        return tl.sum(total, axis=0)


@triton.jit
def streamed_product(weight, mask, row, before, b, n, batch, stride_row, stride_batch, TRANSPOSED: tl.constexpr,
                     ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
                     DOT: tl.constexpr):
    """The same for the rows `row`, where W is loaded along with the states, DEPTH columns at a time."""
    total = tl.zeros([ROWS, BATCH], tl.float32)
    for first in range(0, n, DEPTH):
        k = first + tl.arange(0, DEPTH)
        w = weight_tile(weight, mask, row[:, None].to(tl.int64), k[None, :].to(tl.int64), n, TRANSPOSED, DOT)
        states = load_states(before, k[:, None], b[None, :], n, batch, stride_row, stride_batch, DOT)
        total = tl.dot(w, states, total, input_precision=PRECISION)
    return total


@triton.jit
def recurrent_product(
    # tensors: W and its mask, or what is kept of it; what `hold` returned; the states before the step
    weight, mask, kept, held, held_more, before,
    # place of the program and number of the tile among those it has to do in a step
    work, first, part,
    # sizes and strides, see forward_kernel
    tiles, n, batch, stride_row, stride_batch,
    # constants, see shares.py
    WAY: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr,
    MORE: tl.constexpr, SPLIT: tl.constexpr, ENTRIES: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
):
    """Tile number `work` of program (first, part): returns the product, its rows and its elements of the batch."""
    if WAY == "held":
        strip, tile = first, work
    else:
        strip, tile = work // tiles, part * tiles + work % tiles
    b = tile * BATCH + tl.arange(0, BATCH)
    if WAY == "kept":
        row = strip_rows(kept, strip, n, ROWS)
        return kept_product(kept, strip, row, before, b, n, batch, stride_row, TRANSPOSED, ROWS, BATCH, ENTRIES,
                            PRECISION, DOT), row, b
    else:
        row = strip * ROWS + tl.arange(0, ROWS)
        if WAY == "held":
            return held_product(held, held_more, before, b, n, batch, stride_row, stride_batch, DEPTH, MORE, SPLIT,
                                PRECISION, DOT), row, b
        else:
            return streamed_product(weight, mask, row, before, b, n, batch, stride_row, stride_batch, TRANSPOSED, ROWS,
                                    BATCH, DEPTH, PRECISION, DOT), row, b
