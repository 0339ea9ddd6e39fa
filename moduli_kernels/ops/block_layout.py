"""How the kept entries of a mask are laid out in blocks and strays, its rows and columns brought into an order.

In manifold order (geometry/ordering.py) a mask that is local on the manifold fills few blocks. A block with enough kept
entries is multiplied whole; the kept entries outside of such blocks, the strays, are multiplied one by one. Where no
block has enough, all kept entries are strays, and the layout equals compressed rows.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SIDES = (16, 32, 64)
GROUP = 128  # columns, at most, of the blocks that are multiplied together for the weight's gradient


class Lists(NamedTuple):
    """The blocks of each block row, and the strays of each row; for the transposed weight, of each (block) column.

    All tensors are int32. For the transposed weight, read column for row and row for column.

    starts: (block rows + 1,): block row i has the blocks starts[i] ... starts[i + 1] - 1 of this list.
    places: (blocks,): where each block of this list stands among the layout's blocks.
    partners: (blocks * side,): the columns of the weight that each block covers, in order; the number of columns where
        the block reaches beyond the weight.
    stray_starts: (rows + 1,): row i, counted in the weight's own order, has the strays stray_starts[i] ...
        stray_starts[i + 1] - 1 of this list.
    stray_places: (strays,): where each of them stands among the layout's strays.
    stray_partners: (strays,): the column of each.
    """

    starts: Tensor
    places: Tensor
    partners: Tensor
    stray_starts: Tensor
    stray_places: Tensor
    stray_partners: Tensor


class BlockLayout(NamedTuple):
    """The layout of a mask (R, C).

    side: rows and columns of a block.
    row_order: (R up to a whole number of blocks,), int32: the weight's rows in the order, and R beyond them.
    column_order: (C up to a whole number of blocks,), int32: the weight's columns in the order, and C beyond them.
    block_rows: (blocks,), int32: the block row of each block, counted in the order.
    block_columns: (blocks,), int32: the block column of each block, counted in the order.
    kept: (blocks, side, side), bool: the mask inside the blocks.
    rows: the lists of the weight.
    columns: the lists of the transposed weight.
    strays: (strays,), int64: the place of each stray in the flattened weight, row by row.
    groups: (groups, 3), int32: blocks of one block row, at most GROUP columns of them, which are multiplied together
        for the weight's gradient: the first block, the one after the last, and the block row.
    """

    side: int
    row_order: Tensor
    column_order: Tensor
    block_rows: Tensor
    block_columns: Tensor
    kept: Tensor
    rows: Lists
    columns: Lists
    strays: Tensor
    groups: Tensor


def lay_out_blocks(mask: Tensor, row_order: Tensor | None = None, column_order: Tensor | None = None, *, side: int = 32,
                   threshold: int | None = None) -> BlockLayout:
    """Finds the blocks and strays of a mask, on its device, for which it waits.

    Args:
        mask: (R, C), bool, True = kept.
        row_order: (R,), a permutation of the rows; None leaves them in their order.
        column_order: (C,), a permutation of the columns, likewise.
        side: rows and columns of a block: 16, 32 or 64.
        threshold: how many kept entries make a block worth multiplying whole; None: an eighth of its entries. With
            side * side + 1 or more no block is.

    Raises:
        TypeError: the mask is not bool.
        ValueError: the mask is no matrix, the side is another one, the threshold is below 1, or an order does not fit.
    """
    _check(mask, row_order, column_order, side, threshold)
    threshold = side * side // 8 if threshold is None else threshold
    (n_rows, n_columns), device = mask.shape, mask.device
    padded_rows = _padded(row_order, n_rows, side, device)
    padded_columns = _padded(column_order, n_columns, side, device)
    rows, columns = padded_rows[:n_rows], padded_columns[:n_columns]
    ordered = mask.new_zeros(len(padded_rows), len(padded_columns))
    ordered[:n_rows, :n_columns] = mask[rows][:, columns]
    blocks = _in_blocks(ordered, side)
    whole = blocks.sum((2, 3)) >= threshold
    block_rows, block_columns = whole.nonzero(as_tuple=True)
    ordered_strays = torch.zeros_like(ordered)
    _in_blocks(ordered_strays, side).copy_(blocks & ~whole[:, :, None, None])
    strays = torch.zeros_like(mask)
    strays[rows[:, None], columns] = ordered_strays[:n_rows, :n_columns]
    stray_rows, stray_columns = strays.nonzero(as_tuple=True)
    rows_of_blocks, columns_of_blocks = padded_rows.unflatten(0, (-1, side)), padded_columns.unflatten(0, (-1, side))
    by_row = Lists(*_list(block_rows, columns_of_blocks[block_columns], len(rows_of_blocks)),
                   *_list(stray_rows, stray_columns, n_rows))
    by_column = Lists(*_list(block_columns, rows_of_blocks[block_rows], len(columns_of_blocks)),
                      *_list(stray_columns, stray_rows, n_columns))
    return BlockLayout(
        side, row_order=padded_rows.int(), column_order=padded_columns.int(), block_rows=block_rows.int(),
        block_columns=block_columns.int(), kept=blocks[block_rows, block_columns].contiguous(), rows=by_row,
        columns=by_column, strays=stray_rows * n_columns + stray_columns,
        groups=_groups(by_row.starts.long(), GROUP // side))


def _in_blocks(ordered: Tensor, side: int) -> Tensor:
    """A view (block rows, block columns, side, side) of a matrix of whole blocks."""
    return ordered.unflatten(0, (-1, side)).unflatten(2, (-1, side)).transpose(1, 2)


def gather_blocks(weight: Tensor, layout: BlockLayout) -> Tensor:
    """The weight (R, C) inside the blocks, (blocks, side, side): 0 where it is masked, even if NaN stands there."""
    rows = layout.row_order.unflatten(0, (-1, layout.side))[layout.block_rows].clamp(max=weight.shape[0] - 1)
    columns = layout.column_order.unflatten(0, (-1, layout.side))[layout.block_columns].clamp(max=weight.shape[1] - 1)
    return torch.where(layout.kept, weight[rows[:, :, None], columns[:, None, :]], 0)


def _list(keys: Tensor, partners: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """starts, places and partners of the items with these keys in [0, count), sorted by key and then by place."""
    keys, places = torch.sort(keys, stable=True)
    starts = torch.searchsorted(keys, torch.arange(count + 1, device=keys.device))
    return starts.int(), places.int(), partners[places].flatten().int()


def _groups(starts: Tensor, most: int) -> Tensor:
    """(groups, 3): the blocks starts[i] ... starts[i + 1] - 1 of each block row i in groups of at most `most`."""
    counts = (starts.diff() + most - 1) // most
    row = torch.repeat_interleave(torch.arange(len(counts), device=starts.device), counts)
    first = starts[row] + most * (torch.arange(len(row), device=starts.device) - (counts.cumsum(0) - counts)[row])
    return torch.stack([first, torch.minimum(first + most, starts[row + 1]), row], 1).int()


def _padded(order: Tensor | None, n: int, side: int, device: torch.device) -> Tensor:
    """The order, or 0 ... n - 1, filled up with n to a whole number of blocks."""
    whole = -(-n // side) * side
    out = torch.full((whole,), n, device=device)
    out[:n] = torch.arange(n, device=device) if order is None else order.to(device)
    return out


def _check(mask: Tensor, row_order: Tensor | None, column_order: Tensor | None, side: int,
           threshold: int | None) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = kept), got {mask.dtype}; compare it with 0.")
    if mask.dim() != 2:
        raise ValueError(f"mask must have two dimensions, got shape {tuple(mask.shape)}; pass that of a weight matrix.")
    if side not in SIDES:
        raise ValueError(f"side must be one of {', '.join(map(str, SIDES))}, got {side}; pick one of them.")
    if threshold is not None and threshold < 1:
        raise ValueError(f"threshold must be at least 1, got {threshold}; a block without kept entries is left out "
                         "anyway.")
    for name, order, n in (("row_order", row_order, mask.shape[0]), ("column_order", column_order, mask.shape[1])):
        if order is not None and not torch.equal(order.sort().values.cpu(), torch.arange(n, device="cpu")):
            raise ValueError(f"{name} must be a permutation of 0 ... {n - 1}, got shape {tuple(order.shape)} with "
                             "other entries; manifold_order(points, manifold) gives one.")
