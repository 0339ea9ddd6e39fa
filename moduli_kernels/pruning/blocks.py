"""Pruning in blocks: which entries of a matrix stand or fall together, and how blocks rank among single weights."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .targets import Pairs, described


@dataclass(frozen=True)
class Blocks:
    """The blocks of a matrix (R, C) whose rows and columns are brought into an order first.

    rows (R,), columns (C,): permutations, int64. height, width: of a block, in entries; the last ones may be smaller.
    """

    rows: Tensor
    columns: Tensor
    height: int
    width: int

    def sums(self, entries: Tensor) -> Tensor:
        """(R, C) -> the sum of each block, (blocks down, blocks across), float64."""
        return _sums_of_runs(_sums_of_runs(entries, self.rows, self.height).T, self.columns, self.width).T

    def spread(self, blocks: Tensor) -> Tensor:
        """A number a block -> the same number at each of its entries, (R, C) in the matrix's own order."""
        row, column = (torch.argsort(order.to(blocks.device)) for order in (self.rows, self.columns))  # places in order
        return blocks[(row // self.height)[:, None], column // self.width]


def _sums_of_runs(entries: Tensor, order: Tensor, length: int) -> Tensor:
    """(R, C) -> (ceil(R / length), C): the rows, taken in `order`, added up in runs of `length`, float64.

    Row by row, so no copy of all entries is made, and in one order of additions, so a GPU ranks as the CPU does.
    """
    order = order.to(entries.device)
    total = torch.zeros(-(-len(order) // length), entries.shape[1], dtype=torch.float64, device=entries.device)
    for i in range(min(length, len(order))):
        rows = order[i::length]
        total[:len(rows)] += entries[rows]
    return total


def keep(parameters: list[Tensor], masks: list[Tensor], blocks: list[Blocks | None], count: int) -> list[Tensor]:
    """What stays of each parameter's mask when the lowest-ranked blocks and single weights are cut.

    Blocks rank by mean |w| (masked entries as 0), single weights by |w|, all together; ties by order of parameters
    and index. The longest run from the bottom is cut that leaves at most `count` entries masked in all.
    """
    device = masks[0].device
    scores, sizes, shapes = [], [], []  # size: how many entries are cut with it
    for parameter, mask, its in zip(parameters, masks, blocks, strict=True):
        magnitude = parameter.abs().masked_fill_(~mask, 0)
        if its is None:
            score, size = magnitude.double(), mask.long()
        else:
            score = its.sums(magnitude) / its.sums(torch.ones_like(mask))
            size = its.sums(mask).long()
        scores.append(score.reshape(-1).to(device))
        sizes.append(size.reshape(-1).to(device))
        shapes.append(size.shape)
    size = torch.cat(sizes)
    alive = size.nonzero()[:, 0]
    rank = alive[torch.cat(scores)[alive].argsort(stable=True)]
    masked = sum(mask.numel() for mask in masks) - int(size.sum())
    stays = torch.zeros_like(size, dtype=torch.bool)
    stays[rank] = masked + size[rank].cumsum(0) > count
    parts = (part.view(shape) for part, shape in zip(stays.split([shape.numel() for shape in shapes]), shapes))
    return [part.to(mask.device) if its is None else its.spread(part.to(mask.device)) & mask
            for part, mask, its in zip(parts, masks, blocks, strict=True)]


# --- checks -------------------------------------------------------------------------------------------------

def checked_blocks(block: Any, order: Any, pairs: Pairs) -> dict[int, Blocks]:
    """id(parameter) -> Blocks, of what a user gave as `block` and `order`; empty for None and None."""
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
    found: dict[int, Blocks] = {}
    for key, permutations in order.items():
        module, name = _target(key, pairs)
        what, parameter = f"order[{type(module).__name__}, {name!r}]", module._parameters[name]
        made = _blocks(what, permutations, parameter.shape, block)
        first = found.setdefault(id(parameter), made)
        if not all(torch.equal(a.cpu(), b.cpu()) for a, b in ((first.rows, made.rows), (first.columns, made.columns))):
            raise ValueError(
                f"{what} must be the order of the parameter it is tied to, got another one; name a tied parameter once."
            )
    return found


def _target(key: Any, pairs: Pairs) -> tuple[nn.Module, str]:
    """The target that a key of `order` names."""
    is_pair = isinstance(key, tuple) and len(key) == 2 and isinstance(key[1], str)
    for module, name in pairs:
        if is_pair and key[0] is module and key[1] == name:
            return module, name
    came = f"({type(key[0]).__name__}, {key[1]!r})" if is_pair else f"a {type(key).__name__}"
    raise ValueError(
        f"each key of order must be one of the targets, got {came}; use the same (module, name) pairs in both."
    )


def _blocks(what: str, permutations: Any, shape: torch.Size, block: tuple[int, int]) -> Blocks:
    if len(shape) != 2:
        raise ValueError(f"{what} must be of a matrix, got a parameter {tuple(shape)}; leave it out of order.")
    if not isinstance(permutations, (tuple, list)) or len(permutations) != 2:
        raise ValueError(
            f"{what} must be a pair (row_permutation, column_permutation), got a {type(permutations).__name__}; "
            "for a recurrent weight pass the same permutation twice."
        )
    rows, columns = (_permutation(f"{what}[{d}]", permutations[d], shape[d]) for d in range(2))
    return Blocks(rows, columns, *block)


def _permutation(what: str, permutation: Any, size: int) -> Tensor:
    fits = isinstance(permutation, Tensor) and permutation.dtype == torch.int64 and permutation.shape == (size,)
    each_once = fits and torch.equal(permutation.sort().values, torch.arange(size, device=permutation.device))
    if not each_once:
        came = described(permutation) + (" that repeats or leaves out some" if fits else "")
        raise ValueError(
            f"{what} must be an int64 permutation of range({size}), got {came}; mk.manifold_order makes one."
        )
    return permutation.detach().clone()
