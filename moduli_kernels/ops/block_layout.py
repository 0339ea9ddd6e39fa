"""Where the kept entries of a weight lie when rows and columns are brought into an order: in blocks, and astray.

In manifold order (ordering.py) a mask that is local on the manifold fills few blocks: those with enough kept entries
are multiplied whole, the entries outside of them one by one. A mask without such blocks is all strays: compressed rows.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SIDES = (16, 32, 64)
GROUP = 128  # columns, at most, of blocks that are taken together


class Lists(NamedTuple):
    """Blocks by block row, strays by row; of the transposed weight: by block column, by column. int32.

    starts (block rows + 1): blocks of block row i are numbers starts[i] ... starts[i + 1] - 1 of this list.
    places (blocks): where such a block lies among the layout's blocks. partners (blocks * side): rows or columns of the
    weight along the other side of each, in order; the number of these where the block reaches beyond the weight.
    stray_starts (rows + 1), stray_places, stray_partners (strays): the same of single entries, by row of the weight as
    it is, without an order.
    """

    starts: Tensor
    places: Tensor
    partners: Tensor
    stray_starts: Tensor
    stray_places: Tensor
    stray_partners: Tensor


class BlockLayout(NamedTuple):
    """Of a mask (R, C). side: rows and columns of a block. row_order, column_order: those of the weight, in the order,
    and R or C beyond them, up to a whole number of blocks; int32. block_rows, block_columns (blocks): numbers of blocks
    in the order, int32. kept (blocks, side, side): the mask in the blocks. rows, columns: the lists of W and of W^T.
    strays (strays): where these entries lie in W, row by row, int64. groups (groups, 3): first block, the one after the
    last, and block row of up to GROUP / side blocks of a block row, int32: what is multiplied together for the weight's
    gradient."""

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


def block_layout(mask: Tensor, row_order: Tensor | None = None, column_order: Tensor | None = None, *, side: int = 32,
                 threshold: int | None = None) -> BlockLayout:
    """Of a mask (R, C), bool, on its device; waits for it. row_order (R,), column_order (C,): permutations, None as it
    is. threshold: kept entries that a block needs to be multiplied whole, an eighth of it if None; side * side + 1 or
    more: no block is.

    Raises TypeError for a mask that is not bool, ValueError for one that is no matrix, another side than 16, 32 or 64,
    a threshold below 1 or orders that do not fit.
    """
    _check(mask, row_order, column_order, side, threshold)
    threshold = side * side // 8 if threshold is None else threshold
    (n_rows, n_columns), device = mask.shape, mask.device
    orders = [_padded(order, n, side, device) for order, n in ((row_order, n_rows), (column_order, n_columns))]
    ordered = mask.new_zeros(len(orders[0]), len(orders[1]))
    ordered[:n_rows, :n_columns] = mask[orders[0][:n_rows]][:, orders[1][:n_columns]]
    blocks = ordered.unflatten(0, (-1, side)).unflatten(2, (-1, side)).transpose(1, 2)
    # (block rows, block columns, side, side)
    dense = blocks.sum((2, 3)) >= threshold
    block_rows, block_columns = dense.nonzero(as_tuple=True)
    kept = blocks[block_rows, block_columns]
    astray = torch.zeros_like(ordered)
    astray.unflatten(0, (-1, side)).unflatten(2, (-1, side)).transpose(1, 2).copy_(blocks & ~dense[:, :, None, None])
    strays = torch.zeros_like(mask)
    strays[orders[0][:n_rows, None], orders[1][:n_columns]] = astray[:n_rows, :n_columns]
    stray_rows, stray_columns = strays.nonzero(as_tuple=True)
    sides = [order.unflatten(0, (-1, side)) for order in orders]
    by_row = Lists(*_list(block_rows, sides[1][block_columns], len(sides[0])),
                   *_list(stray_rows, stray_columns, n_rows))
    by_column = Lists(*_list(block_columns, sides[0][block_rows], len(sides[1])),
                      *_list(stray_columns, stray_rows, n_columns))
    return BlockLayout(side, *(order.int() for order in orders), block_rows.int(), block_columns.int(),  # pyright: ignore[reportCallIssue]
                       kept.contiguous(), by_row, by_column, stray_rows * n_columns + stray_columns,  # pyright: ignore[reportCallIssue]
                       _groups(by_row.starts.long(), GROUP // side))  # pyright: ignore[reportCallIssue]


def gather_blocks(weight: Tensor, layout: BlockLayout) -> Tensor:
    """The weight in the blocks, (blocks, side, side), 0 where it is masked, whatever stands there."""
    rows = layout.row_order.unflatten(0, (-1, layout.side))[layout.block_rows].clamp(max=weight.shape[0] - 1)
    columns = layout.column_order.unflatten(0, (-1, layout.side))[layout.block_columns].clamp(max=weight.shape[1] - 1)
    return torch.where(layout.kept, weight[rows[:, :, None], columns[:, None, :]], 0)


def _list(keys: Tensor, partners: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """starts, places and partners of what has these keys in [0, count), sorted by key and then by place."""
    keys, places = torch.sort(keys, stable=True)
    starts = torch.searchsorted(keys, torch.arange(count + 1, device=keys.device))
    return starts.int(), places.int(), partners[places].flatten().int()


def _groups(starts: Tensor, most: int) -> Tensor:
    """Of blocks starts[i] ... starts[i + 1] - 1, for each i: (groups, 3)."""
    counts = (starts.diff() + most - 1) // most
    row = torch.repeat_interleave(torch.arange(len(counts), device=starts.device), counts)
    first = starts[row] + most * (torch.arange(len(row), device=starts.device) - (counts.cumsum(0) - counts)[row])
    return torch.stack([first, torch.minimum(first + most, starts[row + 1]), row], 1).int()


def _padded(order: Tensor | None, n: int, side: int, device: torch.device) -> Tensor:
    """Up to a whole number of blocks, with n."""
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
