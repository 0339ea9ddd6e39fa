"""How the programs of a launch share out the steps of the masked RNN: plain arithmetic, nothing is tuned at the first
call.

The order in which sums are made follows from the shapes and the way alone (recurrent.py lists the ways), not from the
number of multiprocessors.
"""
from __future__ import annotations

from typing import NamedTuple

from ..device import Device

SMALLEST_BATCH = 8  # elements of a tile, as many as the tensor cores' own tiles have
ALONE = 128  # rows that one program keeps, at most; half as many if the number is not aligned, or it would spill
HELD_ROWS = 16  # rows of a strip
# Limits for products that are as exact as float32: they split each factor in two, which takes registers.
EXACT_ALONE, EXACT_HELD = 64, 512
WARPS, MANY_WARPS = 8, 16
ALIGNED = 16  # Triton takes note of numbers that are multiples of this
STATES = 16  # a thread loads so many of a tile at a time, at most, or it would spill; more where rows are aligned
SLACK_BYTES = 2048  # shared memory for what is neither W nor a tile of states
REGISTERS = 65536  # a multiprocessor has
STREAMED_BATCH = 128
# for kept entries: numbers of a tile, elements of its batch at least, entries of a row at a time at most, buffers
KEPT_TILE, KEPT_BATCH, KEPT_ENTRIES, KEPT_BUFFERS = 8192, 16, 16, 3
STREAMED_DEPTH = {2: 64, 4: 32}  # by the bytes of a number


class Shares(NamedTuple):
    """A launch of forward_kernel or backward_kernel, in a grid of (strips, parts).

    way: "alone", "held", "streamed" or "kept", see recurrent.py
    rows: of a strip
    batch: elements of a tile
    depth: columns of W that are multiplied at a time
    split: parts of the depth, one a warp
    warps: of a program
    strips: programs along the rows
    parts: programs along the batch
    tiles: of the batch, in a part
    entries: strays of a row at a time
    stages: of Triton's pipeline
    more: further columns of W, held besides `depth`
    """

    way: str
    rows: int
    batch: int
    depth: int
    split: int
    warps: int
    strips: int
    parts: int
    tiles: int
    entries: int = 1
    stages: int = 3
    more: int = 0


def power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def registers_for(warps: int) -> int:
    """Registers that a thread may use with one program on a multiprocessor. Without a limit of its own ptxas spills to
    fit in two programs."""
    return min(255, REGISTERS // (32 * warps))


def depths(n: int, parts: int) -> tuple[int, int]:
    """Two depths with a sum of n or more. Each has so many equal parts, as long as a power of 2 from 16 on; the second
    depth is 0 where the first alone does as well."""
    whole = max(16, power_of_2(cdiv(n, parts)))
    first = max(16, whole // 2)
    second = max(16, power_of_2(cdiv(n, parts) - first))
    return (whole * parts, 0) if first + second >= whole else (first * parts, second * parts)


def shares_for(n: int, batch: int, itemsize: int, exact: bool, device: Device) -> Shares:
    """The shares for n rows and this batch, where a number has 4 or 2 bytes. exact: those of 4 are multiplied in three
    products each."""
    multiprocessors, chip = device.multiprocessors, device.shared
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


def kept_shares(n: int, pitch: int, side: int | None, strays: int, itemsize: int, device: Device) -> Shares:
    """The shares for states (n, pitch) where the mask keeps blocks of `side` rows and columns (None: no block) and so
    many strays."""
    multiprocessors, chip = device.multiprocessors, device.shared
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
    # Blocks wait in these buffers. A block's column is loaded a stage before it, so Triton takes two stages a buffer.
    buffers = max(1, min(KEPT_BUFFERS, chip // (rows * (rows + tile) * itemsize) - 1))
    return Shares("kept", rows, tile, rows, 1, WARPS, max(1, min(strips, multiprocessors // parts)),
                  cdiv(cdiv(pitch, tile), tiles), tiles, entries, 2 * buffers + 1)


class ProductTile(NamedTuple):
    """A tile of product_kernel's result, the depth that is multiplied at a time, and the warps of a program."""

    rows: int
    columns: int
    depth: int
    warps: int


def product_tile(rows: int, columns: int, itemsize: int, aligned: bool, multiprocessors: int) -> ProductTile:
    """The largest tile of which there are as many as multiprocessors; narrow where the product is. Factors that are not
    aligned are loaded number by number, each with its own address, so that large tiles would spill."""
    wide, depth = max(16, power_of_2(columns)), 128 // itemsize
    for side in (128, 64) if aligned else (64,):
        if cdiv(rows, side) * cdiv(columns, side) >= multiprocessors:
            return ProductTile(side, min(side, wide), depth, 8)
    return ProductTile(32, min(32, wide), depth, 4)
