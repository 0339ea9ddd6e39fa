"""Hooks that keep masked weights at 0 while a net is trained.

    the Parameter   masks the gradient before it is accumulated, and so before clipping. Each module that holds a mask
                    of the Parameter has a hook there.
    the optimizer   one hook for every optimizer in the process masks weights after its step, so that momentum and
                    weight decay revive nothing. It finds masks by the hooks of the Parameters that were stepped.

All look up the module's mask when they run and do nothing where there is none (any more), so that one left behind is
harmless.
"""
from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..distributed import is_sharded
from .buffers import live_mask
from .zeros import zero_masked_

# --- hooks of the Parameter -------------------------------------------------------------------------------------

def register_gradient_hook(module: nn.Module, name: str) -> None:
    parameter = module._parameters.get(name)
    if parameter is not None:
        kind = _ShardGradientHook if is_sharded(parameter) else _GradientHook
        kind.register(module, name)


def gradient_hooks(parameter: Tensor | None) -> list[ParameterHook]:
    """The hooks of masks on a Parameter: one for each module that holds a mask of it."""
    found: list[ParameterHook] = []
    for hooks in () if parameter is None else (parameter._backward_hooks, parameter._post_accumulate_grad_hooks):
        if hooks:
            found += [hook for hook in hooks.values() if isinstance(hook, ParameterHook)]
    return found


def _none() -> None:
    """Stands for a weak reference to nothing."""


class ParameterHook:
    """Holds a module, weakly so that no hook keeps a model alive, and a parameter's name."""

    __torch_unserializable__ = True  # torch drops it without a warning when the parameter goes to another process

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = weakref.ref(module), name
        self.handle: Any = None  # removes the hook from where it is registered
        self.mask_changed = True  # since the last step of an optimizer
        self.optimizer: Callable[[], Any] = _none  # a weak reference to the optimizer of that step

    def belongs_to(self, module: nn.Module, name: str) -> bool:
        return self.name == name and self.module() is module

    def link(self, parameter: Any) -> None:
        """Makes sure that autograd knows the hook of this Parameter."""

    def mask(self) -> Tensor | None:
        return live_mask(self.module(), self.name)


class _GradientHook(ParameterHook):
    """Masks a gradient before it is accumulated into .grad, and so before clipping."""

    tensor: int  # the address of the C++ tensor to which the hook is linked

    @classmethod
    def register(cls, module: nn.Module, name: str) -> None:
        """Registers one hook a Parameter, and another where the Parameter was replaced or its tensor swapped."""
        parameter: Any = module._parameters[name]
        if not parameter.requires_grad or not parameter.is_leaf:
            return
        hook = next((h for h in gradient_hooks(parameter) if isinstance(h, cls) and h.belongs_to(module, name)), None)
        if hook is None:
            hook = cls(module, name)
            hook.handle, hook.tensor = parameter.register_hook(hook), parameter._cdata
        hook.link(parameter)

    def link(self, parameter: Any) -> None:
        """swap_tensors (module.to under torch.__future__'s swap) leaves the dict of hooks on the Python object but not
        on the new tensor; assigning the dict links it again."""
        if self.tensor != parameter._cdata:
            parameter._backward_hooks = parameter._backward_hooks
            self.tensor = parameter._cdata

    def __call__(self, grad: Tensor) -> Tensor | None:
        mask = self.mask()
        if mask is None:
            return None
        return torch.where(mask, grad, 0) if grad.layout == torch.strided else grad * mask


class _ShardGradientHook(ParameterHook):
    """Masks .grad of a sharded Parameter after each accumulation, and so before clipping.

    FSDP writes the gradients of shards itself, and this is the only kind of hook that it calls.
    """

    @classmethod
    def register(cls, module: nn.Module, name: str) -> None:
        """Registers one hook a Parameter, and another where the Parameter was replaced."""
        parameter: Any = module._parameters[name]
        known = any(isinstance(h, cls) and h.belongs_to(module, name) for h in gradient_hooks(parameter))
        if parameter.requires_grad and not known:
            hook = cls(module, name)
            hook.handle = parameter.register_post_accumulate_grad_hook(hook)

    def __call__(self, parameter: Tensor) -> None:
        mask = self.mask()
        if mask is not None:
            zero_masked_(cast(Tensor, parameter.grad), mask)


# --- the hook of optimizers -------------------------------------------------------------------------------------

def zero_after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """A hook after the step of every optimizer: masks the weights that it has moved.

    Where it has moved masked ones, it still has momentum or other state of them, which is set to 0 as well.
    """
    reference = weakref.ref(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for hook in gradient_hooks(parameter):
                mask = hook.mask()
                if mask is None:
                    continue
                hook.optimizer = reference
                moved = zero_masked_(parameter, mask) and parameter.device.type == "cpu"
                if moved or hook.mask_changed:
                    hook.mask_changed = False
                    _forget_masked(optimizer.state.get(parameter), parameter, mask)


def mask_changed(module: nn.Module, name: str) -> None:
    """Notes that more weights are masked: an optimizer forgets what it has gathered of them, now if it is known to have
    stepped the parameter, and at its next step.

    On the CPU the latter is seen by itself, where an optimizer has moved masked weights. Some have more to forget at
    once: schedule-free ones compute the weights from their own copy of them when they go over to evaluation. Autocast
    forgets its 16-bit copies of the weights.
    """
    torch.clear_autocast_cache()
    parameter = module._parameters.get(name)
    for hook in gradient_hooks(parameter):
        if hook.belongs_to(module, name):
            hook.mask_changed = True
            optimizer, mask = hook.optimizer(), hook.mask()
            if optimizer is not None and mask is not None:
                _forget_masked(optimizer.state.get(parameter), cast(Tensor, parameter), mask)


def _forget_masked(state: Any, parameter: Tensor, mask: Tensor) -> None:
    for value in state.values() if isinstance(state, dict) else ():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
            zero_masked_(value, mask)
