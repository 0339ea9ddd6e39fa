"""Pruning of weights that are sharded over processes: the ranks find the smallest weights of all of them together.

Each rank looks at its own rows only. What travels between them is counts, and at the end the masks.
"""
from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import Shard, is_sharded, shard_of, sum_over_ranks

_DIGIT_BITS = 11  # a histogram then has 2048 counts; float32 takes 3 of them and float64 takes 6


def check_targets(parameters: dict[str, Any], in_blocks: bool, apart: bool) -> None:
    """Raises unless all parameters are sharded in rows over the same processes, and none is to be pruned in blocks.

    Args:
        parameters: by the name that an error gives them; at least one is sharded.
        in_blocks: whether some are to be pruned in blocks.
        apart: whether each is to be ranked by itself.
    """
    if apart:
        raise NotImplementedError(
            "scope must be 'global' for sharded weights (fully_shard), got 'each'; give each weight a pruner of its "
            "own."
        )
    if in_blocks:
        raise NotImplementedError(
            "block must be None for sharded weights (fully_shard), whose blocks cross from rank to rank; prune in "
            "blocks before sharding, or weight by weight."
        )
    layouts: dict[str, Any] = {}
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
    """Says of each weight whether it holds NaN where it is kept, on any rank."""
    shards = _shards(parameters)
    found = [(shard.local.isnan() & shard.rows_of(mask)).any() for shard, mask in zip(shards, masks, strict=True)]
    return sum_over_ranks(torch.stack(found).to(torch.int64), shards[0].group).bool().tolist()


def compute_masks(parameters: list[Tensor], masks: list[Tensor], count: int) -> list[Tensor]:
    """Returns the masks that are left when the `count` lowest-ranked entries of all weights are masked.

    The ranking is: masked entries first, then by |w|, then by order of parameters and flat index. The selection is a
    radix selection on the bits of |w|, which order as the numbers do.

    Args:
        parameters: DTensors, all sharded alike.
        masks: bool, whole on every rank, one a parameter and of its shape, True = kept.
        count: how many entries are masked in all, more than are masked already.

    Returns:
        Whole masks, equal on every rank.
    """
    shards = _shards(parameters)
    group = shards[0].group
    dtype = reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
    keys = [_keys(shard, mask, dtype) for shard, mask in zip(shards, masks, strict=True)]
    threshold = _threshold(torch.cat(keys), count, group)
    kept = [key > threshold.key for key in keys]
    tied = [key == threshold.key for key in keys]
    masked_ties = _local_ties(torch.stack([torch.count_nonzero(t) for t in tied]), threshold.ties, group)
    for part, ties, masked in zip(kept, tied, masked_ties, strict=True):
        part[ties.nonzero()[masked:, 0]] = True
    return [_gathered(part.view(shard.local.shape), parameter)
            for part, shard, parameter in zip(kept, shards, parameters, strict=True)]


def _shards(parameters: list[Tensor]) -> list[Shard]:
    return [shard_of(parameter.detach()) for parameter in parameters]


def _keys(shard: Shard, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns integers that order as the ranking does, flat: 0 for masked entries, else 1 + the bits of |w|."""
    bits = shard.local.to(dtype).abs().reshape(-1).view(torch.int64 if dtype == torch.float64 else torch.int32)
    return (bits + 1).masked_fill_(~shard.rows_of(mask).reshape(-1), 0)


class _Threshold(NamedTuple):
    """Where the ranking of all ranks is divided.

    key: the count-th lowest key; everything below it is masked.
    ties: how many of the entries with this very key are masked.
    """

    key: int
    ties: int


def _threshold(keys: Tensor, count: int, group: Any) -> _Threshold:
    """Finds the count-th lowest key of all ranks, digit by digit from the highest. keys: this rank's, flat."""
    bits = 8 * keys.element_size() - 1
    value = 0
    for shift in reversed(range(0, bits, _DIGIT_BITS)):
        digits = (keys >> shift) & (2**_DIGIT_BITS - 1)
        counts = sum_over_ranks(torch.bincount(digits, minlength=2**_DIGIT_BITS), group).cumsum(0)
        digit = int(torch.searchsorted(counts, count))
        count -= int(counts[digit - 1]) if digit else 0
        keys = keys[digits == digit]
        value |= digit << shift
    return _Threshold(value, ties=count)


def _local_ties(found: Tensor, ties: int, group: Any) -> list[int]:
    """Returns how many of this rank's tied entries are masked in each parameter.

    Masked are the first `ties` of all, in order of parameters, then of ranks, whose rows follow each other.

    Args:
        found: (parameters,) int64, how many tied entries this rank has in each.
        ties: how many are masked on all ranks together.
        group: the processes that share the weights, None for this one alone.
    """
    if group is None:
        everywhere, rank = found[None], 0
    else:
        gathered = [torch.empty_like(found) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, found, group=group)
        everywhere, rank = torch.stack(gathered), dist.get_rank(group)
    ranked = everywhere.T.reshape(-1)  # by parameter, then rank
    before = (ranked.cumsum(0) - ranked).view(len(found), -1)[:, rank]
    return torch.minimum((ties - before).clamp(min=0), found).tolist()


def _gathered(local: Tensor, parameter: Any) -> Tensor:
    """Joins the rows of all ranks into the whole mask, which every rank gets.

    local: this rank's rows of the mask. parameter: the DTensor whose rows they are.
    """
    from torch.distributed.tensor import DTensor

    stride = torch.empty(parameter.shape, device="meta").stride()
    rows = DTensor.from_local(local.contiguous(), parameter.device_mesh, parameter.placements, run_check=False,
                              shape=parameter.shape, stride=stride)
    return rows.full_tensor()
