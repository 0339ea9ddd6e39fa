"""Launch parameters by GPU generation and kind of work: a plain table, no tuning at first use.

Results depend on the table and the shapes alone, never on the number of multiprocessors.
"""
from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """What one program does at a time, and how many there are."""

    warps: int
    repeat: int  # vectors of 16 bytes a thread has of a tile of a float32 weight
    programs: int  # about as many, where the weight is large enough
    prefetch: bool = False  # ask for the weights of the next tile before working on this one
    registers: int | None = None  # a thread may have, where fewer than it would take leave room for more warps

    @property
    def rows(self) -> int:
        """Of a tile: 4 a warp."""
        return 4 * self.warps

    def vectors(self, itemsize: int) -> int:
        """A thread has of a tile: of 16-bit weights half as many, for each holds twice the entries."""
        return max(1, self.repeat * min(itemsize, 4) // 4)


# Generation (major compute capability) -> kind of work -> Tile. Kinds: "frozen" no gradient of points; else "flat" up
# to 3 coordinates, flat ones; "curved" up to 3 with a sphere or a Klein bottle; "some" up to 6; "many". Registers
# decide: nothing is spilled, and where 128 a thread suffice two programs fit a multiprocessor.
_AMPERE = {
    "frozen": Tile(8, 4, 1024), "flat": Tile(8, 2, 1024, registers=128), "curved": Tile(8, 2, 1024, registers=128),
    "some": Tile(8, 2, 1024), "many": Tile(8, 1, 1024),
}
_HOPPER = {
    "frozen": Tile(8, 4, 512, True), "flat": Tile(8, 2, 512, True, 128), "curved": Tile(8, 2, 512, True, 128),
    "some": Tile(8, 2, 512, True), "many": Tile(8, 1, 512, True),
}
_BLACKWELL = _HOPPER | {"curved": Tile(8, 1, 512, True, 128)}
TABLE: dict[int, dict[str, Tile]] = {8: _AMPERE, 9: _HOPPER, 10: _BLACKWELL, 12: _AMPERE}
# Before the table while one tunes: kind of work -> Tile.
OVERRIDES: dict[str, Tile] = {}

PARTS = 0.008  # numbers in the parts of the gradients of the points, at most, for each entry of W and coordinate; ...
SMALL = 1 << 24  # ... of a W of fewer entries as many as of one of these
FEWEST_ROWS = 64  # of a strip
LANES = 8  # as in penalty.py


def kind_of_work(coordinates: int, curved: bool, need_points: bool) -> str:
    if not need_points:
        return "frozen"
    return ("curved" if curved else "flat") if coordinates <= 3 else "some" if coordinates <= 6 else "many"


def tile_for(major: int, coordinates: int, curved: bool, need_points: bool) -> Tile:
    """The tile for a GPU of this major compute capability; a generation that is not in the table is taken as the
    newest one before it."""
    kind = kind_of_work(coordinates, curved, need_points)
    if kind in OVERRIDES:
        return OVERRIDES[kind]
    known = [g for g in TABLE if g <= major]
    return TABLE[max(known) if known else min(TABLE)][kind]


class Shares(NamedTuple):
    """How a weight is shared out: the grid of programs is (groups, strips)."""

    tiles: int  # of a strip
    group: int  # column blocks of a program
    strips: int
    groups: int


def shares_for(rows: int, columns: int, tile: Tile, block: int, need_points: bool) -> Shares:
    """Strips of whole tiles and groups of whole blocks of columns (block: their number of columns): about
    tile.programs programs, so long that the parts they leave are few, and alike in length."""
    row_tiles, blocks = -(-rows // tile.rows), -(-columns // block)
    longest = min(LANES, row_tiles)  # tiles of a strip: the row sums of each are kept by another lane
    budget = PARTS * max(rows * columns, SMALL)
    tiles, group = min(longest, -(-FEWEST_ROWS // tile.rows)), 1
    while True:
        strips, groups = -(-row_tiles // tiles), -(-blocks // group)
        enough = strips * groups <= tile.programs and (not need_points or rows * groups + columns * strips <= budget)
        # lengthen the side that leaves more
        if not enough and tiles < longest and (columns * strips >= rows * groups or groups == 1):
            tiles = min(longest, 2 * tiles)
        elif not enough and groups > 1:
            group = min(blocks, 2 * group)
        else:
            return Shares(-(-row_tiles // strips), -(-blocks // groups), strips, groups)
