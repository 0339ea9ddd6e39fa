"""Masks: the buffers that hold them, what keeps masked weights at 0, and the weight that a forward pass uses.

    buffers         the buffer `<parameter>_mask` on the module that owns the parameter, and its name
    zeros           sets masked entries of a tensor to 0, and finds out whether they are
    holding         sets and removes masks, and registers what keeps masked weights at 0, whoever writes them
    module_hooks    that is: before a forward pass, before a state_dict is made and after one is loaded
    training_hooks  and as gradients arrive and after an optimizer's step
    averaging       torch's AveragedModel takes masks as they are
    copies          gives a copy of a model its masks
    loading         makes masks fit a checkpoint that is loaded, where they are left out of the state_dict
    effective       the weight that a module's forward pass uses, whatever it is computed from
"""
from .buffers import (
    buffer_name,
    described,
    get_mask,
    is_left_out,
    is_mask,
    leave_out,
    live_mask,
    masked_names,
    names_pruned_by_torch,
    original_name,
    replace_mask,
)
from .copies import copy_masks
from .effective import effective_weight, origin, parameters_behind
from .holding import hold, hook_of_modules, is_held, remove_mask, set_mask, stop_holding
from .loading import MasksWhileLoading
from .module_hooks import LOADED_UNDER_A_MASK
from .training_hooks import mask_changed
from .zeros import is_zero_where_masked, zero_masked_

__all__ = [
    "LOADED_UNDER_A_MASK", "MasksWhileLoading", "buffer_name", "copy_masks", "described", "effective_weight",
    "get_mask", "hold", "hook_of_modules", "is_held", "is_left_out", "is_mask", "is_zero_where_masked", "leave_out",
    "live_mask", "mask_changed", "masked_names", "names_pruned_by_torch", "origin", "original_name",
    "parameters_behind", "remove_mask", "replace_mask", "set_mask", "stop_holding", "zero_masked_",
]
