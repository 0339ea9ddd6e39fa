"""Sets and removes masks, and registers what keeps masked weights at 0, whoever writes them.

A mask that is set is held by four kinds of hooks:

    the module      module_hooks.py: before a forward pass, before its state_dict is made and after one is loaded. A
                    module that multiplies by its masks itself says so by `applies_masks = True`, and needs none before
                    forward.
    the Parameter   training_hooks.py: as a gradient arrives
    the optimizer   training_hooks.py: after its step
    torch's prune   a mask that torch.nn.utils.prune puts in the place of ours keeps what ours has masked
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_buffer_registration_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from .averaging import keep_masks_when_averaging
from .buffers import buffer_name, get_mask, live_mask, masked_names, parameter_of_mask
from .module_hooks import (
    note_held,
    release,
    released_names,
    zero_after_loading,
    zero_before_forward,
    zero_before_saving,
)
from .training_hooks import gradient_hooks, register_gradient_hook, zero_after_step

# --- setting and removing ---------------------------------------------------------------------------------------

def set_mask(module: nn.Module, name: str, mask: Tensor) -> None:
    """Registers `mask` itself, not a copy, as the mask of the parameter `name`, in place of one that is there, and
    holds it. Masked weights become 0 when one of the hooks runs next; zero_masked_ sets them to 0 at once."""
    module.register_buffer(buffer_name(name), mask)
    hold(module, name)


def remove_mask(module: nn.Module, name: str) -> None:
    """Takes the mask of the parameter `name` and its hooks away; nothing happens where there is none."""
    stop_holding(module, name)
    if get_mask(module, name) is not None:
        delattr(module, buffer_name(name))
    released_names(module).discard(name)
    if not masked_names(module):
        _remove_module_hooks(module)


def hold(module: nn.Module, name: str) -> None:
    """Registers what keeps the masked weights of the parameter `name` at 0; what is registered stays so."""
    _hold_in_the_process()
    released_names(module).discard(name)
    if not getattr(module, "applies_masks", False):
        _register_once(module._forward_pre_hooks, module.register_forward_pre_hook, zero_before_forward)
    _register_once(module._state_dict_pre_hooks, module.register_state_dict_pre_hook, zero_before_saving)
    _register_once(module._load_state_dict_post_hooks, module.register_load_state_dict_post_hook, zero_after_loading)
    register_gradient_hook(module, name)
    note_held(module)


def stop_holding(module: nn.Module, name: str) -> None:
    """Removes what `hold` has registered for the parameter `name`; a hook or a Parameter that is gone is no error."""
    parameter = module._parameters.get(name)
    for hook in gradient_hooks(parameter):
        if hook.belongs_to(module, name):
            hook.handle.remove()
    if get_mask(module, name) is not None:
        release(module, name)


def is_held(module: nn.Module, name: str) -> bool:
    """Whether hooks keep the masked weights of the parameter `name` at 0."""
    return (name not in released_names(module) and live_mask(module, name) is not None
            and any(hook is zero_before_saving for hook in module._state_dict_pre_hooks.values()))


def hook_of_modules(name: str) -> Callable[..., None] | None:
    """The hook of modules that a pickle asks for by its name; None where there is no such hook.

    A module that comes out of a pickle has masks that nothing has set in this process, and is held as others are.
    """
    hook = next((hook for hook in (zero_before_forward, zero_before_saving, zero_after_loading) if hook.name == name),
                None)
    if hook is not None:
        _hold_in_the_process()
    return hook


def _register_once(hooks: dict[int, Any], register: Any, function: Any) -> None:
    if not any(hook is function for hook in hooks.values()):
        register(function)


def _remove_module_hooks(module: nn.Module) -> None:
    for hooks, function in ((module._forward_pre_hooks, zero_before_forward),
                            (module._state_dict_pre_hooks, zero_before_saving),
                            (module._load_state_dict_post_hooks, zero_after_loading)):
        for key in [key for key, hook in hooks.items() if hook is function]:
            del hooks[key]


# --- hooks of the process ---------------------------------------------------------------------------------------

def _keep_our_mask(module: nn.Module, key: str, buffer: Tensor | None) -> Tensor | None:
    """A hook of every register_buffer: where torch.nn.utils.prune puts its float mask in the place of a held bool mask,
    returns the product of both."""
    name = parameter_of_mask(key)
    if name is None or buffer is None or not buffer.is_floating_point():
        return None
    ours = get_mask(module, name)
    if ours is None or ours.dtype != torch.bool or ours.shape != buffer.shape or name in released_names(module):
        return None
    return buffer * ours


_held_in_the_process = False


def _hold_in_the_process() -> None:
    """Registers, once, the hooks that are there for all optimizers, averages and modules."""
    global _held_in_the_process
    if not _held_in_the_process:
        _held_in_the_process = True
        # In a compiled step, dynamo would trace the hook, and sees no hooks of Parameters. Making an optimizer has
        # imported dynamo already, so that this decorator, which imports it at the first call, costs nothing.
        register_optimizer_step_post_hook(torch._compile._disable_dynamo(zero_after_step))  # pyright: ignore
        register_module_buffer_registration_hook(_keep_our_mask)  # pyright: ignore[reportArgumentType]
        keep_masks_when_averaging(set_mask, remove_mask)
