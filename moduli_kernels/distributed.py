"""Tensors sharded over processes, the DTensors that torch.distributed.fsdp.fully_shard makes: which rows a rank holds,
and the two sums over ranks that the penalty of such a weight needs.

torch.distributed.tensor is slow to import and missing from some builds of torch, so it is imported here only where a
DTensor has come in, and it must be loaded already.
"""
from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor."""
    if type(tensor) in (Tensor, nn.Parameter):  # the usual case, which must cost little
        return False
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def check_plain_points(rows: Tensor, cols: Tensor | None) -> None:
    """The points must be whole on every rank.

    Raises:
        NotImplementedError: they are DTensors.
    """
    for name, points in (("rows", rows), ("cols", cols)):
        if is_sharded(points):
            raise NotImplementedError(
                f"{name} must be whole on every rank, got a DTensor (fully_shard); keep the regularizer out of "
                "fully_shard, or call it in the forward of the module that is sharded."
            )


def check_resharded(what: str, tensor: Tensor, sharded: bool) -> None:
    """A pruned parameter must be sharded now if it was when its pruner was made, and whole if it was whole.

    Args:
        what: how the message names the parameter.
        tensor: the parameter as it is now.
        sharded: whether it was sharded then.

    Raises:
        RuntimeError: it is not as it was.
    """
    if is_sharded(tensor) == sharded:
        return
    if sharded:
        raise RuntimeError(
            f"{what} must be sharded as when its pruner was made, got it whole; call reshard() on its FSDP module "
            "first: a root module stays whole after a forward pass without a backward pass."
        )
    raise RuntimeError(
        f"{what} must be whole as when its pruner was made, got it sharded; make a new MagnitudePruner after "
        "fully_shard, which takes the masks over."
    )


class Shard(NamedTuple):
    """The rows of a tensor that this rank holds, possibly none.

    local: the rows, a plain tensor.
    first: the number of the first of them in the whole tensor.
    group: the processes that hold the other rows, in the order of the rows; None where this rank has all of them.
    """

    local: Tensor
    first: int
    group: Any

    def rows_of(self, whole: Tensor) -> Tensor:
        """The same rows of a plain tensor that has as many rows as the whole one: a view."""
        return whole.narrow(0, self.first, self.local.shape[0])


def shard_of(tensor: Any, name: str = "weight") -> Shard:
    """This rank's rows of a DTensor. Autograd hands the gradient of `.local` on to the DTensor.

    Args:
        tensor: the DTensor.
        name: how the message names it.

    Raises:
        NotImplementedError: the tensor is cut along another dimension than rows, or along several.
    """
    from torch.distributed.tensor import Replicate, Shard as Cut

    placements, mesh = tensor.placements, tensor.device_mesh
    cuts = [dim for dim, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    if not cuts:
        return Shard(tensor.to_local(), 0, None)
    if len(cuts) > 1 or type(placements[cuts[0]]) is not Cut or placements[cuts[0]].dim != 0:
        raise NotImplementedError(
            f"{name} must be sharded along dimension 0 and one dimension of the mesh, got {placements}; let "
            "fully_shard choose the placement (no shard_placement_fn, no tensor parallelism)."
        )
    # Shard cuts by torch.chunk's rule: all parts are equal, but the last ones may be smaller or empty.
    rows, ranks, rank = tensor.shape[0], mesh.size(cuts[0]), mesh.get_local_rank(cuts[0])
    part = -(-rows // ranks)
    first = min(rank * part, rows)
    local = tensor.to_local()
    if local.shape[0] != min(part, rows - first):
        raise NotImplementedError(
            f"{name} must be cut into rows as torch.chunk does, got {local.shape[0]} of {rows} rows on rank {rank} of "
            f"{ranks}; reshard it with fully_shard."
        )
    return Shard(local, first, mesh.get_group(cuts[0]))


def sum_over_ranks(value: Tensor, group: Any) -> Tensor:
    """The sum of the ranks' values, on every rank.

    Every rank computes the same loss from the sum, so the gradient of the sum is that of each rank's own value.

    Args:
        value: this rank's, any shape.
        group: the processes to sum over; None returns the value itself.
    """
    return value if group is None else _SumOverRanks.apply(value, group)


def shared_by_ranks(tensor: Tensor, group: Any) -> Tensor:
    """The tensor, for use in this rank's part of a sum over ranks: its gradient is the sum of the ranks' gradients.

    Args:
        tensor: equal on every rank.
        group: the processes to sum over; None returns the tensor itself.
    """
    return _SharedByRanks.apply(tensor, group) if group is not None and tensor.requires_grad else tensor


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks in forward; the gradient as it comes in backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        total = value.detach().clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SharedByRanks(torch.autograd.Function):
    """The tensor as it is in forward; the sum of the gradients over ranks in backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None
