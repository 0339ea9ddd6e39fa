"""W h of one step, for a strip of rows and a tile of the batch, in one of these ways:

    "alone"     one program has all rows: W and the states stay on its chip over all steps, nothing is waited for
    "held"      W's strip stays there; the states of the step before are read, those of all strips
    "streamed"  W's strip is read anew in every step, from the second-level cache where it fits in
    "kept"      so are the blocks and the strays that a mask keeps (rnn_kept.py)

TRANSPOSED: W^T instead, for backward. Products of 4-byte numbers run on tensor cores as PRECISION says.
"""
from __future__ import annotations

import triton
import triton.language as tl

from .kept import kept_product, strip_rows
from .parts import load_states, load_weight


@triton.jit
def weight_tile(weight, mask, row, k, n, TRANSPOSED: tl.constexpr, DOT: tl.constexpr):
    """W[row, k], or W[k, row]; row and k broadcast, and are as wide as n^2 needs."""
    if TRANSPOSED:
        at = k * n + row
    else:
        at = row * n + k
    return load_weight(weight, mask, at, (row < n) & (k < n), DOT)


@triton.jit
def hold(weight, mask, strip, begin: tl.constexpr, n, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
         SPLIT: tl.constexpr, DOT: tl.constexpr):
    """W's strip from column `begin` on, (ROWS, DEPTH) or in SPLIT parts of its depth, one a warp, (SPLIT, ROWS, DEPTH /
    SPLIT). 32 bits are enough for places in a weight of which that fits on the chip, and take half the registers."""
    row = strip * ROWS + tl.arange(0, ROWS)
    if SPLIT == 1:
        return weight_tile(weight, mask, row[:, None], begin + tl.arange(0, DEPTH)[None, :], n, TRANSPOSED, DOT)
    else:
        k = begin + part_begins(DEPTH, SPLIT)[:, None, None] + tl.arange(0, DEPTH // SPLIT)[None, None, :]
        return weight_tile(weight, mask, row[None, :, None], k, n, TRANSPOSED, DOT)


@triton.jit
def part_begins(DEPTH: tl.constexpr, SPLIT: tl.constexpr):
    return tl.arange(0, SPLIT) * (DEPTH // SPLIT)


@triton.jit
def held_product(held, held_more, before, b, n, batch, stride_row, stride_batch, DEPTH: tl.constexpr,
                 MORE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr):
    """(ROWS, BATCH) for what `hold` gave, of the first DEPTH columns and of MORE beyond, and the elements b of the
    batch: each warp its part of the depth, then added."""
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
    """The same, W and the states DEPTH at a time."""
    total = tl.zeros([ROWS, BATCH], tl.float32)
    for first in range(0, n, DEPTH):
        k = first + tl.arange(0, DEPTH)
        w = weight_tile(weight, mask, row[:, None].to(tl.int64), k[None, :].to(tl.int64), n, TRANSPOSED, DOT)
        states = load_states(before, k[:, None], b[None, :], n, batch, stride_row, stride_batch, DOT)
        total = tl.dot(w, states, total, input_precision=PRECISION)
    return total


@triton.jit
def product(weight, mask, kept, held, held_more, before, work, first, part, tiles, n, batch, stride_row, stride_batch,
            WAY: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr,
            MORE: tl.constexpr, SPLIT: tl.constexpr, ENTRIES: tl.constexpr, PRECISION: tl.constexpr,
            DOT: tl.constexpr):
    """What program (first, part) has to do as its `work` in a step: the product, and its rows and elements of the
    batch."""
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
