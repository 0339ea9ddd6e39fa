"""Pruning of weights sharded over processes: which weights are the smallest of all ranks, each rank looking at its own
rows. What travels is counts, and the masks that come of them."""
from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import Shard, is_sharded, shard_of

_DIGIT = 11  # bits: histograms of 2048 counts, 3 of them for float32 and 6 for float64


def check_targets(parameters: dict[str, Tensor], in_blocks: bool) -> None:
    """Of parameters by name, some of them sharded: all are, over the same processes, and none is pruned in blocks."""
    if in_blocks:
        raise NotImplementedError(
            "block must be None for sharded weights (fully_shard), whose blocks cross from rank to rank; prune in "
            "blocks before sharding, or weight by weight."
        )
    layouts = {}
    for name, parameter in parameters.items():
        if is_sharded(parameter):
            shard_of(parameter, name)  # raises for what is not sharded in rows
            layouts[name] = parameter.device_mesh, parameter.placements
        else:
            layouts[name] = None
    (first, layout), *others = layouts.items()
    for name, other in others:
        if other != layout:
            raise NotImplementedError(
                f"targets must be sharded over the same processes, or none of them, got {first} and {name} that "
                "differ; give each kind a pruner of its own."
            )


def any_nan(parameters: list[Tensor], masks: list[Tensor]) -> list[bool]:
    """Which of the weights hold NaN where they are kept, on any rank."""
    shards = _shards(parameters)
    found = [(shard.local.isnan() & shard.rows_of(mask)).any() for shard, mask in zip(shards, masks, strict=True)]
    return _summed(torch.stack(found).to(torch.int64), shards[0].group).bool().tolist()


def keep(parameters: list[Tensor], masks: list[Tensor], count: int) -> list[Tensor]:
    """Whole masks, equal on every rank, with the `count` lowest of all weights cut: masked first, then by |w|, then by
    order of parameters and flat index. count is more than is cut already.

    By radix selection on the bits of |w|, which order as the numbers do.
    """
    shards = _shards(parameters)
    group = shards[0].group
    dtype = reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
    keys = [_keys(shard, mask, dtype) for shard, mask in zip(shards, masks, strict=True)]
    threshold, ties = _lowest(torch.cat(keys), count, group)
    kept = [key > threshold for key in keys]
    equal = [key == threshold for key in keys]
    mine = _ties_here(torch.stack([torch.count_nonzero(e) for e in equal]), ties, group)
    for part, tied, cut in zip(kept, equal, mine, strict=True):
        part[tied.nonzero()[cut:, 0]] = True
    return [_whole(part.view(shard.local.shape), parameter)
            for part, shard, parameter in zip(kept, shards, parameters, strict=True)]


def _shards(parameters: list[Tensor]) -> list[Shard]:
    return [shard_of(parameter.detach()) for parameter in parameters]


def _keys(shard: Shard, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers >= 0 in the order of the ranking, flat: 0 for masked entries, else 1 + the bits of |w|."""
    bits = shard.local.to(dtype).abs().reshape(-1).view(torch.int64 if dtype == torch.float64 else torch.int32)
    return (bits + 1).masked_fill_(~shard.rows_of(mask).reshape(-1), 0)


def _lowest(keys: Tensor, count: int, group: Any) -> tuple[int, int]:
    """(The count-th lowest key of all ranks, how many of those equal to it are among the count lowest.)"""
    bits = 8 * keys.element_size() - 1
    value = 0
    for shift in reversed(range(0, bits, _DIGIT)):
        digits = (keys >> shift) & (2**_DIGIT - 1)
        counts = _summed(torch.bincount(digits, minlength=2**_DIGIT), group).cumsum(0)
        digit = int(torch.searchsorted(counts, count))
        count -= int(counts[digit - 1]) if digit else 0
        keys = keys[digits == digit]
        value |= digit << shift
    return value, count


def _ties_here(found: Tensor, ties: int, group: Any) -> list[int]:
    """How many of this rank's ties to cut in each parameter, the first `ties` of all in order of parameters, then ranks
    (whose rows follow each other). found: this rank's ties by parameter."""
    if group is None:
        everywhere, rank = found[None], 0
    else:
        gathered = [torch.empty_like(found) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, found, group=group)
        everywhere, rank = torch.stack(gathered), dist.get_rank(group)
    ranked = everywhere.T.reshape(-1)  # by parameter, then rank
    before = (ranked.cumsum(0) - ranked).view(len(found), -1)[:, rank]
    return torch.minimum((ties - before).clamp(min=0), found).tolist()


def _summed(counts: Tensor, group: Any) -> Tensor:
    if group is not None:
        dist.all_reduce(counts, group=group)
    return counts


def _whole(local: Tensor, parameter: Tensor) -> Tensor:
    """The rows of all ranks, of a mask sharded as its parameter is."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(parameter.shape, device="meta").stride()
    rows = DTensor.from_local(local.contiguous(), parameter.device_mesh, parameter.placements, run_check=False,
                              shape=parameter.shape, stride=stride)
    return rows.full_tensor()
