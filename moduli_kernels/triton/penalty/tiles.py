"""How the kernels cut a weight: the tiles of each GPU generation, a plain table, and the programs that share them out.

Nothing is tuned at the first call. Results depend on this table and on the shapes alone, never on the number of
multiprocessors.
"""
from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

LANES = 8  # lanes of a warp that share a row of a tile; the warp has 4 rows
VECTOR_BYTES = 16  # what a lane loads and stores at a time


class Tile(NamedTuple):
    """What one program works on at a time.

    warps: how many a program has
    repeat: vectors of 16 bytes that a lane has of a tile of a float32 weight
    programs: about how many a launch has, where the weight is large enough
    prefetch: whether the weights of the next tile are asked for before the work on this one
    registers: the most that a thread may use, where a limit leaves room for more warps; None sets no limit
    """

    warps: int
    repeat: int
    programs: int
    prefetch: bool = False
    registers: int | None = None

    @property
    def rows(self) -> int:
        """Rows of a tile: 4 a warp."""
        return 4 * self.warps

    def vectors(self, itemsize: int) -> int:
        """Vectors that a lane has of a tile. Of 16-bit weights it has half as many, since each holds twice the
        entries."""
        return max(1, self.repeat * min(itemsize, 4) // 4)


# Generation (major compute capability) -> kind of work -> Tile. Kinds: "frozen" has no gradient of points; "flat" has
# up to 3 coordinates of flat manifolds, "curved" up to 3 with a curved one among them, "some" up to 6, "many" more.
# Registers decide: nothing is spilled, and where 128 a thread suffice two programs fit on a multiprocessor.
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
# Kind of work -> Tile, preferred to the table: for tuning.
OVERRIDES: dict[str, Tile] = {}

PARTS = 0.008  # at most so many numbers in the parts of the points' gradients, for each entry of W and coordinate; ...
SMALL = 1 << 24  # ... where W has fewer entries than this, as many as for one of this size
FEWEST_ROWS = 64  # that a strip has, in a tall weight


def kind_of_work(coordinates: int, curved: bool, need_points: bool) -> str:
    """The key of the table. curved: whether a factor of the manifold is; need_points: whether gradients of the points
    are computed."""
    if not need_points:
        return "frozen"
    return ("curved" if curved else "flat") if coordinates <= 3 else "some" if coordinates <= 6 else "many"


def tile_for(generation: int, coordinates: int, curved: bool, need_points: bool) -> Tile:
    """The tile for a GPU of this generation; one that is not in the table is taken as the newest one before it."""
    kind = kind_of_work(coordinates, curved, need_points)
    if kind in OVERRIDES:
        return OVERRIDES[kind]
    known = [g for g in TABLE if g <= generation]
    return TABLE[max(known) if known else min(TABLE)][kind]


class Partition(NamedTuple):
    """How the programs of a launch share out a weight: there are `groups` x `strips` of them.

    tiles: tiles of a strip, below each other
    group: column blocks, each as wide as a tile, of a group
    strips: how many strips of rows there are
    groups: how many groups of column blocks there are
    """

    tiles: int
    group: int
    strips: int
    groups: int


def partition_of(rows: int, columns: int, tile: Tile, block: int, need_points: bool) -> Partition:
    """Strips of whole tiles and groups of whole column blocks, alike in length, for a weight (rows, columns).

    There are about tile.programs programs, each so long that the parts of gradients that they leave are few.
    block: columns of a column block.
    """
    row_tiles, blocks = -(-rows // tile.rows), -(-columns // block)
    longest = min(LANES, row_tiles)  # tiles of a strip, since another lane keeps the row sums of each
    budget = PARTS * max(rows * columns, SMALL)
    tiles, group = min(longest, -(-FEWEST_ROWS // tile.rows)), 1
    while True:
        strips, groups = -(-row_tiles // tiles), -(-blocks // group)
        enough = strips * groups <= tile.programs and (not need_points or rows * groups + columns * strips <= budget)
        # lengthen the side that leaves more parts
        if not enough and tiles < longest and (columns * strips >= rows * groups or groups == 1):
            tiles = min(longest, 2 * tiles)
        elif not enough and groups > 1:
            group = min(blocks, 2 * group)
        else:
            return Partition(-(-row_tiles // strips), -(-blocks // groups), strips, groups)


# --- the weight in memory --------------------------------------------------------------------------------------

def piece_width(weight: Tensor) -> int:
    """Columns of a piece of a tile: 8 lanes with a vector each, which are 128 bytes."""
    return LANES * VECTOR_BYTES // weight.element_size()


def row_stride(weight: Tensor) -> int:
    """Elements from a row to the next. PyTorch gives a single row any stride."""
    return weight.stride(0) if weight.shape[0] > 1 else weight.numel()


def vector_length(weight: Tensor, dweight: Tensor | None, columns: int, stride: int) -> int:
    """Elements that a lane can load, and store to dweight, at once: 16 bytes if every row begins at a multiple of 16,
    else one. stride: elements between rows of the weight."""
    vector = VECTOR_BYTES // weight.element_size()
    tensors = [weight] if dweight is None else [weight, dweight]
    aligned = columns % vector == 0 and stride % vector == 0 and all(t.data_ptr() % VECTOR_BYTES == 0 for t in tensors)
    return vector if aligned else 1
