"""How the steps of the masked RNN are shared out over a GPU's multiprocessors: plain arithmetic, no tuning at first
use.

What is added in which order follows from the shapes and the way alone, not from the number of multiprocessors.
"""
from __future__ import annotations

from typing import NamedTuple

SMALLEST_BATCH = 8  # of a tile: the tensor cores' own
ALONE = 128  # rows, at most, that one program keeps; of a number that is not aligned half as many, lest it spill
HELD_ROWS = 16  # of a strip
# "exact" splits each number in two, which takes registers
EXACT_ALONE, EXACT_HELD = 64, 512
WARPS, MANY_WARPS = 8, 16
ALIGNED = 16  # of what a number is a multiple when Triton takes note of it
STATES = 16  # of a tile that a thread loads at a time, at most, lest it spill; more where rows are aligned
SLACK_BYTES = 2048  # of shared memory, beside W and a tile of states
REGISTERS = 65536  # of a multiprocessor
STREAMED_BATCH = 128
# of kept entries: numbers of a tile, elements of its batch at least, entries of a row at a time at most
KEPT_TILE, KEPT_BATCH, KEPT_ENTRIES, KEPT_BUFFERS = 8192, 16, 16, 3
STREAMED_DEPTH = {2: 64, 4: 32}


class Shares(NamedTuple):
    """A launch of forward_kernel or backward_kernel: see there."""

    way: str
    rows: int
    batch: int
    depth: int
    split: int
    warps: int
    strips: int  # programs along the rows
    parts: int  # ... and along the batch
    tiles: int
    entries: int = 1
    stages: int = 3
    more: int = 0  # of the depth, beside `depth`


def power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def registers_for(warps: int) -> int:
    """A thread may have, with one program a multiprocessor; left alone, ptxas spills to fit in two."""
    return min(255, REGISTERS // (32 * warps))


def depths(n: int, parts: int) -> tuple[int, int]:
    """A depth of n or more as the sum of two, each of so many equal parts, powers of 2 from 16 on; the second is 0
    where one does as well."""
    whole = max(16, power_of_2(cdiv(n, parts)))
    first = max(16, whole // 2)
    second = max(16, power_of_2(cdiv(n, parts) - first))
    return (whole * parts, 0) if first + second >= whole else (first * parts, second * parts)


def shares_for(n: int, batch: int, itemsize: int, exact: bool, multiprocessors: int, chip: int) -> Shares:
    """For n rows, this batch and 4-byte (exact: in three products each) or 2-byte numbers. chip: bytes of shared memory
    that a program may have."""
    depth = max(16, power_of_2(n))
    if n <= (EXACT_ALONE if exact else ALONE if n % ALIGNED == 0 else ALONE // 2):
        return Shares("alone", depth, SMALLEST_BATCH, depth, 1, WARPS, 1, cdiv(batch, SMALLEST_BATCH), 1)
    strips = cdiv(n, HELD_ROWS)
    warps = MANY_WARPS if depth >= 32 * MANY_WARPS else WARPS
    first, more = depths(n, warps)
    depth, tile = first + more, SMALLEST_BATCH
    held = depth * itemsize * (HELD_ROWS + tile) + SLACK_BYTES
    fits = held <= chip and (n % ALIGNED == 0 or tile * depth <= STATES * 32 * warps)
    if strips <= multiprocessors and fits and not (exact and depth > EXACT_HELD):
        parts = min(cdiv(batch, tile), multiprocessors // strips)
        share = cdiv(batch, parts)
        while tile < share and 2 * tile * depth <= STATES * 32 * warps and held + tile * depth * itemsize <= chip:
            held += tile * depth * itemsize
            tile *= 2
        tiles = cdiv(cdiv(batch, tile), parts)
        return Shares("held", HELD_ROWS, tile, first, warps, warps, strips, cdiv(cdiv(batch, tile), tiles), tiles,
                      more=more)
    tile = min(STREAMED_BATCH, max(16, power_of_2(batch)))
    parts = min(cdiv(batch, tile), multiprocessors)
    tiles = cdiv(cdiv(batch, tile), parts)
    rows = 16
    while rows < 64 and cdiv(n, rows) * parts > multiprocessors:
        rows *= 2
    strips = max(1, min(cdiv(n, rows), multiprocessors // parts))
    return Shares("streamed", rows, tile, STREAMED_DEPTH[itemsize], 1, WARPS, strips, cdiv(cdiv(batch, tile), tiles),
                  tiles)


def kept_shares(n: int, pitch: int, side: int | None, strays: int, itemsize: int, multiprocessors: int,
                chip: int) -> Shares:
    """Of kept entries in blocks of `side` (None: there are none) and so many strays, for states (n, pitch)."""
    rows = side or 16
    while side is None and rows < 64 and cdiv(n, rows) > multiprocessors:
        rows *= 2
    strips = cdiv(n, rows)
    tile = min(power_of_2(pitch), KEPT_TILE // rows)
    while tile > KEPT_BATCH and strips * cdiv(pitch, tile // 2) <= multiprocessors:
        tile //= 2
    parts = min(cdiv(pitch, tile), multiprocessors)
    tiles = cdiv(cdiv(pitch, tile), parts)
    entries = max(1, min(power_of_2(cdiv(strays, n)), KEPT_ENTRIES, KEPT_TILE // (rows * tile)))
    # a block waits in one of these buffers; its column is read a stage ahead, so Triton takes two stages for each
    buffers = max(1, min(KEPT_BUFFERS, chip // (rows * (rows + tile) * itemsize) - 1))
    return Shares("kept", rows, tile, rows, 1, WARPS, max(1, min(strips, multiprocessors // parts)),
                  cdiv(cdiv(pitch, tile), tiles), tiles, entries, 2 * buffers + 1)


class ProductTile(NamedTuple):
    rows: int
    columns: int
    depth: int
    warps: int


def product_tile(rows: int, columns: int, itemsize: int, aligned: bool, multiprocessors: int) -> ProductTile:
    """The largest tile of which there are as many as multiprocessors; narrow where the product is. Operands that are
    not aligned are read number by number, each with an address of its own: large tiles would spill."""
    wide, depth = max(16, power_of_2(columns)), 128 // itemsize
    for side in (128, 64) if aligned else (64,):
        if cdiv(rows, side) * cdiv(columns, side) >= multiprocessors:
            return ProductTile(side, min(side, wide), depth, 8)
    return ProductTile(32, min(32, wide), depth, 4)
