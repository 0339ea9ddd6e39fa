"""Pruning in blocks: which entries of a matrix stand or fall together, and how blocks rank among single weights."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._prune_targets import Pairs


@dataclass(frozen=True)
class Blocks:
    """The blocks of a matrix (R, C) whose rows and columns are brought into an order first.

    rows (R,), columns (C,): permutations, int64. height, width: of a block, in entries; the last ones may be smaller.
    """

    rows: Tensor
    columns: Tensor
    height: int
    width: int

    def mean(self, entries: Tensor) -> Tensor:
        """(R, C) -> the mean of each block, (blocks down, blocks across)."""
        return self._sum(entries) / self._sum(torch.ones_like(entries))

    def count(self, mask: Tensor) -> Tensor:
        """(R, C) bool -> how many entries of each block are True."""
        return self._sum(mask.to(torch.float64)).long()

    def _sum(self, entries: Tensor) -> Tensor:
        device = entries.device
        ordered = entries[self.rows.to(device)[:, None], self.columns.to(device)]
        down, across = -(-ordered.shape[0] // self.height), -(-ordered.shape[1] // self.width)
        whole = ordered.new_zeros(down * self.height, across * self.width)
        whole[:ordered.shape[0], :ordered.shape[1]] = ordered
        return whole.view(down, self.height, across, self.width).sum((1, 3))

    def spread(self, blocks: Tensor) -> Tensor:
        """A number a block -> the same number at each of its entries, (R, C) in the matrix's own order."""
        device = blocks.device
        row, column = torch.argsort(self.rows.to(device)), torch.argsort(self.columns.to(device))  # the inverse orders
        return blocks[(row // self.height)[:, None], column // self.width]


def checked_blocks(block: Any, order: Any, pairs: Pairs) -> dict[tuple[int, str], Blocks]:
    """(id(module), name) -> Blocks, of what a user gave as `block` and `order`; empty for None and None."""
    if block is None and order is None:
        return {}
    if block is None or order is None:
        raise ValueError(
            f"block and order must be given together, got block={block!r} and order={'None' if order is None else 'one'}; "
            "order={(module, name): (row_permutation, column_permutation)} names the matrices that are cut in blocks."
        )
    whole = isinstance(block, (tuple, list)) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)
    if not whole:
        raise ValueError(f"block must be two positive whole numbers (rows, columns), got {block!r}; pass e.g. (16, 16).")
    if not isinstance(order, Mapping):
        raise TypeError(
            f"order must be a dict (module, name) -> (row_permutation, column_permutation), got a {type(order).__name__}; "
            "mk.manifold_order(points, manifold) makes permutations."
        )
    found = {}
    for key, permutations in order.items():
        if not any(isinstance(key, tuple) and len(key) == 2 and key[0] is m and key[1] == n for m, n in pairs):
            named = f"({type(key[0]).__name__}, {key[1]!r})" if isinstance(key, tuple) and len(key) == 2 else repr(key)
            raise ValueError(f"order must name targets of the pruner, got {named}; use the same (module, name) pairs.")
        module, name = key
        what = f"order[{type(module).__name__}, {name!r}]"
        parameter = getattr(module, name)
        if parameter.dim() != 2:
            raise ValueError(f"{what} must be of a matrix, got {tuple(parameter.shape)}; leave it out of order.")
        if not (isinstance(permutations, (tuple, list)) and len(permutations) == 2):
            raise ValueError(f"{what} must be a pair (row_permutation, column_permutation), got {type(permutations).__name__}; "
                             "for a recurrent weight pass the same one twice.")
        rows, columns = (_permutation(f"{what}[{d}]", p, parameter.shape[d]) for d, p in enumerate(permutations))
        found[id(module), name] = Blocks(rows, columns, *block)
    return found


def _permutation(what: str, permutation: Any, size: int) -> Tensor:
    fits = isinstance(permutation, Tensor) and permutation.dtype == torch.int64 and permutation.shape == (size,)
    if not fits or not torch.equal(permutation.sort().values.cpu(), torch.arange(size)):
        got = f"{permutation.dtype} {tuple(permutation.shape)}" if isinstance(permutation, Tensor) else f"a {type(permutation).__name__}"
        raise ValueError(f"{what} must be an int64 permutation of 0..{size - 1}, got {got}; mk.manifold_order makes one.")
    return permutation.detach().clone()


def keep(parameters: list[Tensor], masks: list[Tensor], blocks: list[Blocks | None], count: int) -> list[Tensor]:
    """What stays of each parameter's mask when the lowest-ranked blocks and single weights are cut.

    Blocks rank by mean |w| (masked entries as 0), single weights by |w|, all together; ties by order of parameters
    and index. The longest run from the bottom is cut that leaves at most `count` entries masked in all.
    """
    device = masks[0].device
    scores, sizes = [], []
    for parameter, mask, its in zip(parameters, masks, blocks, strict=True):
        entries = parameter.abs().masked_fill(~mask, 0).double()
        size = mask.long() if its is None else its.count(mask)
        score = (entries if its is None else its.mean(entries)).masked_fill(size == 0, -1)
        scores.append(score.reshape(-1).to(device))
        sizes.append(size.reshape(-1).to(device))
    size = torch.cat(sizes)
    rank = torch.cat(scores).argsort(stable=True)
    masked = sum(mask.numel() for mask in masks) - int(size.sum())
    stays = torch.empty_like(size, dtype=torch.bool)
    stays[rank] = masked + size[rank].cumsum(0) > count
    kept = []
    for part, mask, its in zip(stays.split([len(s) for s in sizes]), masks, blocks, strict=True):
        part = part.to(mask.device)
        if its is None:
            kept.append(part.view(mask.shape) & mask)
        else:
            down, across = -(-mask.shape[0] // its.height), -(-mask.shape[1] // its.width)
            kept.append(its.spread(part.view(down, across)) & mask)
    return kept
