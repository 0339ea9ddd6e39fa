"""Sets the masked entries of a tensor to 0, and finds out whether they are."""
from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import is_sharded, shard_of


def zero_masked_(tensor: Tensor, mask: Tensor) -> bool:
    """Sets the masked entries of `tensor` to 0 in place; in a sharded tensor, in the rows that this rank holds.

    Where an entry changes, the write counts in the tensor's version, so that a backward pass through the old values is
    an error. Away from the CPU, and for what stands for a tensor, it always counts, since it is not looked up whether
    one changes.

    Returns:
        On the CPU, whether a masked entry differed from 0; where that is not looked up, True.
    """
    if _has_op(tensor, mask):
        with torch._C._AutoDispatchBelowAutograd():  # cheaper than no_grad, which counts before each forward pass
            written = bool(torch.ops.moduli_kernels.zero_masked_(tensor, mask))
        if written:
            torch.autograd.graph.increment_version(tensor)
        return written
    with torch.no_grad():
        if is_sharded(tensor):
            shard = shard_of(tensor)
            tensor, mask = shard.local, shard.rows_of(mask)
        if _may_look_at(tensor) and not tensor.masked_fill(mask, 0).any():
            return False
        tensor.masked_fill_(~mask, 0)
        return True


def is_zero_where_masked(tensor: Tensor, mask: Tensor) -> bool:
    """Whether all masked entries of `tensor` are 0, for which a GPU is waited for. Both are read once."""
    if _has_op(tensor, mask):
        with torch._C._AutoDispatchBelowAutograd():
            return not torch.ops.moduli_kernels.any_masked_nonzero(tensor, mask)
    with torch.no_grad():
        if is_sharded(tensor):
            shard = shard_of(tensor)
            tensor, mask = shard.local, shard.rows_of(mask)
        return not tensor.masked_fill(mask, 0).any()


def _has_op(tensor: Tensor, mask: Tensor) -> bool:
    """Whether the compiled ops take these tensors: plain ones on the CPU, contiguous, of one shape."""
    return (_may_look_at(tensor) and mask.is_cpu and tensor.shape == mask.shape and tensor.is_contiguous()
            and mask.is_contiguous())


def _may_look_at(tensor: Tensor) -> bool:
    """Whether it costs no waiting to decide by the numbers in the tensor: a plain one on the CPU, in eager mode."""
    return tensor.is_cpu and type(tensor) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
