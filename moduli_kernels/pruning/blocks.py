"""Pruning of matrices in blocks: a grid of blocks over a matrix, and their ranking among single weights.

A block here is a rectangle of neighbouring entries, as in "block sparsity". (The penalty's argument `blocks` is another
thing: the number of gate matrices stacked in the rows of an LSTM's or a GRU's weight.)
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..checks import shown
from ..masks import described
from .targets import Pairs


@dataclass(frozen=True)
class BlockGrid:
    """Divides a matrix (R, C) into blocks after its rows and columns have been put in an order.

    rows: (R,) int64, the permutation that puts the rows in order.
    columns: (C,) int64, the permutation that puts the columns in order.
    height: rows of a block; those at the bottom may have fewer.
    width: columns of a block; those at the right may have fewer.
    """

    rows: Tensor
    columns: Tensor
    height: int
    width: int

    def sums(self, entries: Tensor) -> Tensor:
        """Returns the sum of the entries in each block: (R, C) -> (ceil(R / height), ceil(C / width)), float64."""
        return _sums_of_runs(_sums_of_runs(entries, self.rows, self.height).T, self.columns, self.width).T

    def spread(self, values: Tensor) -> Tensor:
        """Gives each entry the value of its block: (ceil(R / height), ceil(C / width)) -> (R, C), original order."""
        row, column = (torch.argsort(order.to(values.device)) for order in (self.rows, self.columns))  # places in order
        return values[(row // self.height)[:, None], column // self.width]


def _sums_of_runs(entries: Tensor, order: Tensor, length: int) -> Tensor:
    """Takes the rows in `order` and adds them up in runs of `length`: (R, C) -> (ceil(R / length), C), float64.

    Rows are added one by one. So no copy of all entries is made, and the order of additions is fixed, which makes a GPU
    rank as the CPU does.
    """
    order = order.to(entries.device)
    total = torch.zeros(-(-len(order) // length), entries.shape[1], dtype=torch.float64, device=entries.device)
    for i in range(min(length, len(order))):
        rows = order[i::length]
        total[:len(rows)] += entries[rows]
    return total


def compute_masks(parameters: list[Tensor], masks: list[Tensor], grids: list[BlockGrid | None],
                  count: int) -> list[Tensor]:
    """Returns the masks that are left when the lowest-ranked blocks and single weights are masked.

    Blocks rank by mean |w| (masked entries count as 0), single weights by |w|, all in one ranking; ties go by order of
    parameters, then by index. What is masked is the longest run from the bottom that leaves at most `count` entries
    masked, those counted that were masked before.

    Args:
        parameters: the weights, of any shapes; matrices where they have a grid.
        masks: bool, one a parameter and of its shape, True = kept.
        grids: the blocks of each parameter; None where it is ranked weight by weight.
        count: how many entries may be masked in all.
    """
    device = masks[0].device
    scores: list[Tensor] = []  # by which the candidates, blocks or single weights, are ranked
    sizes: list[Tensor] = []  # how many kept entries each candidate has
    shapes: list[torch.Size] = []
    for parameter, mask, grid in zip(parameters, masks, grids, strict=True):
        magnitude = parameter.abs().masked_fill_(~mask, 0)
        if grid is None:
            score, size = magnitude.double(), mask.long()
        else:
            score = grid.sums(magnitude) / grid.sums(torch.ones_like(mask))
            size = grid.sums(mask).long()
        scores.append(score.reshape(-1).to(device))
        sizes.append(size.reshape(-1).to(device))
        shapes.append(size.shape)
    size = torch.cat(sizes)
    candidates = size.nonzero()[:, 0]
    ranking = candidates[torch.cat(scores)[candidates].argsort(stable=True)]
    masked = sum(mask.numel() for mask in masks) - int(size.sum())
    stays = torch.zeros_like(size, dtype=torch.bool)
    stays[ranking] = masked + size[ranking].cumsum(0) > count
    parts = (part.view(shape) for part, shape in zip(stays.split([shape.numel() for shape in shapes]), shapes))
    return [part.to(mask.device) if grid is None else grid.spread(part.to(mask.device)) & mask
            for part, mask, grid in zip(parts, masks, grids, strict=True)]


# --- checks -------------------------------------------------------------------------------------------------

def block_grids(block: Any, order: Any, pairs: Pairs, keys: list[str]) -> dict[int, BlockGrid]:
    """Checks `block` and `order` as a user gave them; returns a grid by id(parameter), none where both are None.

    pairs: the pruner's targets. keys: their names.
    """
    if block is None and order is None:
        return {}
    if block is None or order is None:
        given = f"block={block!r} without order" if order is None else "order without block"
        raise ValueError(
            f"block and order must be given together, got {given}; pass block=(16, 16) and "
            "order={(module, name): (row_permutation, column_permutation)}, which names the matrices cut in blocks."
        )
    is_pair = isinstance(block, (tuple, list)) and len(block) == 2
    if not is_pair or not all(type(side) is int and side > 0 for side in block):
        raise ValueError(
            f"block must be two positive whole numbers (rows, columns), got {block!r}; pass e.g. (16, 16)."
        )
    if not isinstance(order, Mapping):
        raise TypeError(
            "order must be a dict {(module, name): (row_permutation, column_permutation)}, got a "
            f"{type(order).__name__}; mk.manifold_order(points, manifold) makes permutations."
        )
    grids: dict[int, BlockGrid] = {}
    for key, permutations in order.items():
        module, name = _target(key, pairs, keys)
        what, parameter = f"order[{type(module).__name__}, {name!r}]", cast(Tensor, module._parameters[name])
        grid = _block_grid(what, permutations, parameter.shape, height=block[0], width=block[1])
        first = grids.setdefault(id(parameter), grid)
        if not all(torch.equal(a.cpu(), b.cpu()) for a, b in ((first.rows, grid.rows), (first.columns, grid.columns))):
            raise ValueError(
                f"{what} must be the order of the parameter it is tied to, got another one; name a tied parameter once."
            )
    return grids


def _target(key: Any, pairs: Pairs, keys: list[str]) -> tuple[nn.Module, str]:
    """Returns the target that a key of `order`, a pair or a name, means; raises where it means none."""
    if isinstance(key, str) and key in keys:
        return pairs[keys.index(key)]
    is_pair = isinstance(key, tuple) and len(key) == 2 and isinstance(key[1], str)
    for module, name in pairs:
        if is_pair and key[0] is module and key[1] == name:
            return module, name
    came = f"({type(key[0]).__name__}, {key[1]!r})" if is_pair else shown(key)
    raise ValueError(
        f"each key of order must be one of the targets, got {came}; use the same (module, name) pairs in both, or the "
        f"targets' names: {', '.join(keys)}."
    )


def _block_grid(what: str, permutations: Any, shape: torch.Size, height: int, width: int) -> BlockGrid:
    """Checks one value of `order`, which errors call `what`, for a parameter of this shape."""
    if len(shape) != 2:
        raise ValueError(f"{what} must be of a matrix, got a parameter {tuple(shape)}; leave it out of order.")
    if not isinstance(permutations, (tuple, list)) or len(permutations) != 2:
        raise ValueError(
            f"{what} must be a pair (row_permutation, column_permutation), got a {type(permutations).__name__}; "
            "for a recurrent weight pass the same permutation twice."
        )
    rows, columns = (_permutation(f"{what}[{d}]", permutations[d], shape[d]) for d in range(2))
    return BlockGrid(rows, columns, height=height, width=width)


def _permutation(what: str, permutation: Any, size: int) -> Tensor:
    """Returns a copy of a permutation (size,), int64; raises where it is none."""
    fits = isinstance(permutation, Tensor) and permutation.dtype == torch.int64 and permutation.shape == (size,)
    each_once = fits and torch.equal(permutation.sort().values, torch.arange(size, device=permutation.device))
    if not each_once:
        came = described(permutation) + (" that repeats or leaves out some" if fits else "")
        raise ValueError(
            f"{what} must be an int64 permutation of range({size}), got {came}; mk.manifold_order makes one."
        )
    return permutation.detach().clone()
