"""Where masks live: the buffer `<parameter>_mask` on the module that owns the parameter.

A mask is a bool tensor of the parameter's shape, True where a weight is kept. torch.nn.utils.prune uses the same name
for a float buffer of zeros and ones, and renames the parameter to `<parameter>_orig`. This file alone spells out the
two names; every other file asks it, so that a mask is found in the same place whoever set it. holding.py sets and
removes masks, since a mask that is set is also held.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

_MASK, _ORIGINAL = "_mask", "_orig"


# --- the mask of a parameter ------------------------------------------------------------------------------------

def buffer_name(name: str) -> str:
    """The name of the buffer that holds the mask of the parameter `name`; it is the mask's key in a state_dict too."""
    return name + _MASK


def get_mask(module: nn.Module, name: str) -> Tensor | None:
    """The buffer itself, whatever its dtype, or None where the parameter `name` has no mask."""
    return module._buffers.get(buffer_name(name))


def replace_mask(module: nn.Module, name: str, mask: Tensor) -> None:
    """Puts `mask` itself in place of the mask that is there; a mask left out of the state_dict stays left out."""
    module._buffers[buffer_name(name)] = mask


def leave_out(module: nn.Module, name: str) -> None:
    """Leaves the mask of the parameter `name` out of the module's state_dict, and out of what it loads."""
    module._non_persistent_buffers_set.add(buffer_name(name))


def is_left_out(module: nn.Module, name: str) -> bool:
    """Whether the module has a mask of the parameter `name` that is not in its state_dict."""
    return buffer_name(name) in module._non_persistent_buffers_set


def live_mask(module: nn.Module | None, name: str) -> Tensor | None:
    """The bool mask of a parameter that the module owns under this very name, else None.

    It is None as well for a module that is gone and for a weight that torch.nn.utils.prune has renamed.
    """
    if module is None or module._parameters.get(name) is None:
        return None
    mask = get_mask(module, name)
    return mask if mask is not None and mask.dtype == torch.bool else None


def masked_names(module: nn.Module) -> list[str]:
    """The parameters of this module, without its submodules, that have a live mask of their shape."""
    names = []
    for key in module._buffers:
        name = parameter_of_mask(key)
        mask = None if name is None else live_mask(module, name)
        if mask is not None and mask.shape == module._parameters[name].shape:  # pyright: ignore
            names.append(name)
    return names


def parameter_of_mask(key: str) -> str | None:
    """The parameter whose mask the buffer `key` would be; None where it is not named as a mask."""
    return key.removesuffix(_MASK) if key.endswith(_MASK) else None


# --- what torch.nn.utils.prune has pruned -----------------------------------------------------------------------

def names_pruned_by_torch(module: nn.Module) -> list[str]:
    """The parameters of this module, without its submodules, that torch.nn.utils.prune has pruned; their plain names"""
    hooks = module._forward_pre_hooks.values()
    return [hook._tensor_name for hook in hooks if isinstance(hook, prune.BasePruningMethod)]


def original_name(name: str) -> str:
    """The name that torch.nn.utils.prune gives the parameter `name` while it computes `name` from it and the mask."""
    return name + _ORIGINAL


# --- checks -----------------------------------------------------------------------------------------------------

def is_mask(value: Any, parameter: Tensor) -> bool:
    """Whether `value` is a mask for `parameter`: a bool tensor of its shape."""
    return isinstance(value, Tensor) and value.dtype == torch.bool and value.shape == parameter.shape


def described(value: Any) -> str:
    """Says in an error what came where a mask (or another integer tensor) was expected: its dtype and shape."""
    if value is None:
        return "none"
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
