"""W h of one step where a mask keeps few entries, for a strip of rows: blocks on tensor cores, then strays one by one.

States are (n, pitch), each row contiguous along the batch: a block needs whole rows of them, a stray one row. The lists
are those of moduli_kernels/ops/block_layout.py. Blocks and strays hold 0 where W is masked.
"""
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Kept(NamedTuple):
    """What is kept of W or of W^T, as a kernel takes it: a tuple of tensors. Absent blocks or strays are None.

    order: (strips * ROWS), the rows of the strips; None if they follow each other
    blocks: (blocks, ROWS, ROWS)
    starts: (strips + 1), where a strip's blocks begin in the next two
    places: numbers of the blocks
    partners: (blocks * ROWS), the rows of the states that the blocks multiply
    strays: (strays), their values
    stray_starts: (rows + 1), where a row's strays begin in the next two
    stray_places: where a stray stands in `strays`; None if they are in the order of their rows
    stray_partners: the row of the states that a stray multiplies
    """

    order: object
    blocks: object
    starts: object
    places: object
    partners: object
    strays: object
    stray_starts: object
    stray_places: object
    stray_partners: object


# The kernel reads the tuple by these places.
ORDER, BLOCKS, STARTS, PLACES, PARTNERS, STRAYS, STRAY_STARTS, STRAY_PLACES, STRAY_PARTNERS = (
    tl.constexpr(place) for place in range(len(Kept._fields)))


@triton.jit
def strip_rows(kept, strip, n, ROWS: tl.constexpr):
    """(ROWS,), the rows of a strip; n where there is none."""
    at = strip * ROWS + tl.arange(0, ROWS)
    if kept[ORDER] is None:
        return tl.minimum(at, n)
    else:
        return tl.load(kept[ORDER] + at)


@triton.jit
def add_blocks(total, kept, strip, before, b, n, batch, stride_row, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr,
               PRECISION: tl.constexpr, DOT: tl.constexpr):
    """Returns total (ROWS, BATCH) plus the strip's blocks (ROWS, ROWS) times the states."""
    blocks, starts, places, partners = kept[BLOCKS], kept[STARTS], kept[PLACES], kept[PARTNERS]
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
    """Where entry number `at` stands."""
    if places is None:
        return at
    else:
        return tl.load(places + at, mask=inside, other=0)


@triton.jit
def add_strays(total, kept, row, before, b, n, batch, stride_row, ROWS: tl.constexpr, BATCH: tl.constexpr,
               ENTRIES: tl.constexpr):
    """Returns total plus the strays of these rows times the states, ENTRIES of each row at a time. While they are
    multiplied, the places of the next ones are loaded."""
    values, starts, places, partners = kept[STRAYS], kept[STRAY_STARTS], kept[STRAY_PLACES], kept[STRAY_PARTNERS]
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
    if kept[BLOCKS] is not None:
        total = add_blocks(total, kept, strip, before, b, n, batch, stride_row, TRANSPOSED, ROWS, PRECISION, DOT)
    if kept[STRAYS] is not None:
        total = add_strays(total, kept, row, before, b, n, batch, stride_row, ROWS, BATCH, ENTRIES)
    return total
