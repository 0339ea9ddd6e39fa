"""The op that says how the CPU's masked RNN reads a mask: which blocks it finds, and how many strays beside them.

    found_blocks   (4,), int64: the side of the blocks, 16 or 8, or 0 where there are none; the number of blocks; the
                   kept entries inside them; the kept entries beside them, the strays

Rows and columns are brought into an order, and the mask is cut into squares from its first row and column on. A square
is a block where so many of its entries are kept that to multiply all of them costs less than its kept entries one by
one, where a stray costs as much as COST_OF_STRAY entries of a block. Of no blocks and blocks of either side, a product
takes what costs least. The masked RNN finds blocks anew at each call, which costs about as much as to compare the mask
with a copy would, so nothing about a mask has to be remembered. SparseRNN.explain() calls this op.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .registry import Op, declare

SIDES = (16, 8)
COST_OF_STRAY = 1.75  # for several elements of a batch at a time
COST_OF_STRAY_ALONE = 8.0  # for a batch of 1


class FoundBlocksArguments(NamedTuple):
    """What found_blocks takes.

    mask: (R, C), bool, contiguous, True = kept.
    row_order: (R,), int64, a permutation; None leaves the rows in their order.
    column_order: (C,), int64, likewise for columns.
    batch: the size of the batch that the weight is multiplied with.
    """

    mask: Tensor
    row_order: Tensor | None
    column_order: Tensor | None
    batch: int


def _found_blocks(a: FoundBlocksArguments) -> Tensor:
    mask = a.mask if a.row_order is None else a.mask[a.row_order]
    mask = mask if a.column_order is None else mask[:, a.column_order]
    entries = int(mask.sum())
    stray = COST_OF_STRAY_ALONE if a.batch == 1 else COST_OF_STRAY
    found, cost = [0, 0, 0, entries], stray * entries
    for side in SIDES:
        squares = pad(mask, (0, -mask.shape[1] % side, 0, -mask.shape[0] % side))
        kept = squares.unflatten(0, (-1, side)).unflatten(2, (-1, side)).sum((1, 3))
        blocks = kept >= int(side**2 / stray) + 1
        inside = int(kept[blocks].sum())
        count = int(blocks.sum())
        its_cost = count * side**2 + stray * (entries - inside)
        if its_cost < cost:
            found, cost = [side, count, inside, entries - inside], its_cost
    return torch.tensor(found, device=mask.device)


FOUND_BLOCKS = declare(Op(
    name="found_blocks", arguments=(FoundBlocksArguments,), returns="Tensor", fallback=_found_blocks,
    fake=lambda a: a.mask.new_empty(4, dtype=torch.int64)))
