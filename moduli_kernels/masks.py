"""Where masks live: the buffer `<parameter>_mask` on the module that owns the parameter.

A mask is a bool tensor of the parameter's shape, True where a weight is kept. torch.nn.utils.prune uses the same buffer
name, with floats 0 and 1. This file alone knows the name, so that no other file spells it out.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .distributed import is_sharded, shard_of


def buffer_name(name: str) -> str:
    """The name of the buffer, and of its entry in a state_dict, that holds the mask of the parameter `name`."""
    return f"{name}_mask"


def get_mask(module: nn.Module, name: str) -> Tensor | None:
    """The buffer itself, whatever its dtype, or None where the parameter `name` has no mask."""
    return module._buffers.get(buffer_name(name))


def set_mask(module: nn.Module, name: str, mask: Tensor) -> None:
    """Registers `mask` itself, not a copy, as the mask of the parameter `name`, in place of one that is there."""
    module.register_buffer(buffer_name(name), mask)


def remove_mask(module: nn.Module, name: str) -> None:
    """Takes the mask of the parameter `name` away; nothing happens where there is none."""
    module._buffers.pop(buffer_name(name), None)


def live_mask(module: nn.Module | None, name: str) -> Tensor | None:
    """The bool mask of a parameter that the module owns under this very name, else None.

    It is None as well for a module that is gone and for a weight that torch.nn.utils.prune has renamed.
    """
    if module is None or module._parameters.get(name) is None:
        return None
    mask = get_mask(module, name)
    return mask if mask is not None and mask.dtype == torch.bool else None


def zero_masked_(tensor: Tensor, mask: Tensor) -> None:
    """Sets the masked entries of `tensor` to 0 in place; in a sharded tensor, in the rows that this rank holds.

    The write counts in the tensor's version, so that a backward pass through the old values is an error.
    """
    with torch.no_grad():
        if is_sharded(tensor):
            shard = shard_of(tensor)
            tensor, mask = shard.local, shard.rows_of(mask)
        tensor.masked_fill_(~mask, 0)
