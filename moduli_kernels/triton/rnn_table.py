"""How the steps of the masked RNN are shared out over a GPU's multiprocessors: plain arithmetic, no tuning at first use.

What is added in which order follows from the shapes and the way alone, not from the number of multiprocessors.
"""
from __future__ import annotations

from typing import NamedTuple

SMALLEST_BATCH = 8  # of a tile: the tensor cores' own
ALONE = 128  # rows, at most, that one program keeps
HELD_ROWS = 16  # of a strip
# "exact" splits each number in two, which takes registers
EXACT_ALONE, EXACT_HELD = 64, 512
WARPS, MANY_WARPS = 8, 16
ALIGNED = 16  # of what a number is a multiple when Triton takes note of it
STATES = 16  # of a tile that a thread loads at a time, at most, lest it spill; more where rows are aligned
SLACK_BYTES = 2048  # of shared memory, beside W and a tile of states
REGISTERS = 65536  # of a multiprocessor
STREAMED_BATCH = 128
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


def power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def registers_for(warps: int) -> int:
    """A thread may have, with one program a multiprocessor; left alone, ptxas spills to fit in two."""
    return min(255, REGISTERS // (32 * warps))


def shares_for(n: int, batch: int, itemsize: int, exact: bool, multiprocessors: int, chip: int) -> Shares:
    """For n rows, this batch and 4-byte (exact: in three products each) or 2-byte numbers. chip: bytes of shared memory
    that a program may have."""
    depth = max(16, power_of_2(n))
    if n <= (EXACT_ALONE if exact else ALONE):
        return Shares("alone", depth, SMALLEST_BATCH, depth, 1, WARPS, 1, cdiv(batch, SMALLEST_BATCH), 1)
    strips = cdiv(n, HELD_ROWS)
    warps = MANY_WARPS if depth >= 32 * MANY_WARPS else WARPS
    tile = SMALLEST_BATCH
    held = depth * itemsize * (HELD_ROWS + tile) + SLACK_BYTES
    fits = held <= chip and (n % ALIGNED == 0 or tile * depth <= STATES * 32 * warps) and not (exact and depth > EXACT_HELD)
    if strips <= multiprocessors and fits:
        parts = min(cdiv(batch, tile), multiprocessors // strips)
        share = cdiv(batch, parts)
        while tile < share and 2 * tile * depth <= STATES * 32 * warps and held + tile * depth * itemsize <= chip:
            held += tile * depth * itemsize
            tile *= 2
        tiles = cdiv(cdiv(batch, tile), parts)
        return Shares("held", HELD_ROWS, tile, depth, warps, warps, strips, cdiv(cdiv(batch, tile), tiles), tiles)
    tile = min(STREAMED_BATCH, max(16, power_of_2(batch)))
    parts = min(cdiv(batch, tile), multiprocessors)
    tiles = cdiv(cdiv(batch, tile), parts)
    rows = 16
    while rows < 64 and cdiv(n, rows) * parts > multiprocessors:
        rows *= 2
    strips = max(1, min(cdiv(n, rows), multiprocessors // parts))
    return Shares("streamed", rows, tile, STREAMED_DEPTH[itemsize], 1, WARPS, strips, cdiv(cdiv(batch, tile), tiles), tiles)


class ProductTile(NamedTuple):
    rows: int
    columns: int
    depth: int
    warps: int


def product_tile(rows: int, columns: int, itemsize: int, aligned: bool, multiprocessors: int) -> ProductTile:
    """The largest tile of which there are as many as multiprocessors; narrow where the product is. Operands that are not
    aligned are read number by number, each with an address of its own: large tiles would spill."""
    wide, depth = max(16, power_of_2(columns)), 128 // itemsize
    for side in (128, 64) if aligned else (64,):
        if cdiv(rows, side) * cdiv(columns, side) >= multiprocessors:
            return ProductTile(side, min(side, wide), depth, 8)
    return ProductTile(32, min(32, wide), depth, 4)
