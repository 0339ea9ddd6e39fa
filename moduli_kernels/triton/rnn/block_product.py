"""W h of one step for a mask that keeps few entries: blocks on tensor cores, then strays one by one, of a strip of
rows.

States are (n, pitch): a block reads whole rows of them, an entry one, each contiguous along the batch. Lists: see
block_layout.py. W's blocks and strays hold 0 where it is masked.
"""
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Kept(NamedTuple):
    """What the kernel walks, of W or of W^T; a tuple of tensors or None. order: rows of the strips, None as they are;
    stray_places: None where the strays lie in the order of their rows."""

    order: object
    blocks: object
    starts: object
    places: object
    partners: object
    strays: object
    stray_starts: object
    stray_places: object
    stray_partners: object


@triton.jit
def strip_rows(kept, strip, n, ROWS: tl.constexpr):
    """(ROWS,): n where there is none."""
    at = strip * ROWS + tl.arange(0, ROWS)
    if kept[0] is None:
        return tl.minimum(at, n)
    else:
        return tl.load(kept[0] + at)


@triton.jit
def add_blocks(total, kept, strip, before, b, n, batch, stride_row, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr,
               PRECISION: tl.constexpr, DOT: tl.constexpr):
    """total (ROWS, BATCH) + the strip's blocks, of ROWS rows and columns, times the states."""
    blocks, starts, places, partners = kept[1], kept[2], kept[3], kept[4]
    out, along = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)
    if TRANSPOSED:
        within = along[None, :] * ROWS + out
    else:
        within = out * ROWS + along[None, :]
    for e in range(tl.load(starts + strip), tl.load(starts + strip + 1)):
        w = tl.load(blocks + tl.load(places + e).to(tl.int64) * (ROWS * ROWS) + within).to(DOT)
        partner = tl.load(partners + e * ROWS + along)[:, None]
        at = partner.to(tl.int64) * stride_row + b[None, :]
        states = tl.load(before + at, mask=(partner < n) & (b < batch)[None, :], other=0.0).to(DOT)
        total = tl.dot(w, states, total, input_precision=PRECISION)
    return total


@triton.jit
def place_of(places, at, inside):
    if places is None:
        return at
    else:
        return tl.load(places + at, mask=inside, other=0)


@triton.jit
def add_strays(total, kept, row, before, b, n, batch, stride_row, ROWS: tl.constexpr, BATCH: tl.constexpr,
               ENTRIES: tl.constexpr):
    """total + the strays of these rows, ENTRIES of each at a time; where the next ones lie is asked for meanwhile."""
    values, starts, places, partners = kept[5], kept[6], kept[7], kept[8]
    at = tl.load(starts + row, mask=row < n, other=0)[:, None] + tl.arange(0, ENTRIES)[None, :]
    end = tl.load(starts + row + 1, mask=row < n, other=0)[:, None]
    parts = tl.zeros([ROWS, ENTRIES, BATCH], tl.float32)
    inside = at < end
    partner = tl.load(partners + at, mask=inside, other=0)
    w = tl.load(values + place_of(places, at, inside), mask=inside, other=0.0)
    left = tl.max(tl.max(end - at, axis=1), axis=0)
    while left > 0:
        now = inside[:, :, None] & (b < batch)[None, None, :]
        states = tl.load(before + partner.to(tl.int64)[:, :, None] * stride_row + b[None, None, :], mask=now, other=0.0)
        own = w.to(tl.float32)
        at += ENTRIES
        inside = at < end
        partner = tl.load(partners + at, mask=inside, other=0)
        w = tl.load(values + place_of(places, at, inside), mask=inside, other=0.0)
        parts += own[:, :, None] * states.to(tl.float32)
        left -= ENTRIES
    return total + tl.sum(parts, axis=1)


@triton.jit
def kept_product(kept, strip, row, before, b, n, batch, stride_row, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr,
                 BATCH: tl.constexpr, ENTRIES: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr):
    """(ROWS, BATCH) for the rows of the strip and the elements b of the batch."""
    total = tl.zeros([ROWS, BATCH], tl.float32)
    if kept[1] is not None:
        total = add_blocks(total, kept, strip, before, b, n, batch, stride_row, TRANSPOSED, ROWS, PRECISION, DOT)
    if kept[5] is not None:
        total = add_strays(total, kept, row, before, b, n, batch, stride_row, ROWS, BATCH, ENTRIES)
    return total
