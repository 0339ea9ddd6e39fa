"""Hooks that keep pruned weights at 0: on the gradient of a Parameter, and on the step of an optimizer.

They belong to the weights, not to a pruner. Each looks up its module's mask when it runs and does nothing where there
is none (any more), so that one left behind on a Parameter or an optimizer is harmless.
"""
from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..distributed import check_resharded, is_sharded
from ..masks import live_mask, zero_masked_


def register(module: nn.Module, name: str, optimizer: torch.optim.Optimizer | None) -> None:
    """Hooks the Parameter `name` of the module, and the optimizer if there is one; what is hooked already stays so."""
    _register_gradient_hook(module, name)
    if optimizer is not None:
        _StepHook.register(module, name, optimizer)


def remove(module: nn.Module, name: str, optimizer: torch.optim.Optimizer | None) -> None:
    """Removes what `register` has registered; a hook or a Parameter that is gone is no error."""
    parameter = module._parameters.get(name)
    hooks = [_GradientHook.find(getattr(parameter, "_backward_hooks", None), module, name),
             _ShardGradientHook.find(getattr(parameter, "_post_accumulate_grad_hooks", None), module, name)]
    if optimizer is not None:
        hooks.append(_StepHook.find(optimizer._optimizer_step_post_hooks, module, name))
    for hook in hooks:
        if hook is not None:
            hook.handle.remove()


def _register_gradient_hook(module: nn.Module, name: str) -> None:
    kind = _ShardGradientHook if is_sharded(module._parameters[name]) else _GradientHook
    kind.register(module, name)


class _Hook:
    """Holds a module, weakly so that no hook keeps a model alive, and a parameter's name."""

    __torch_unserializable__ = True  # torch drops it without a warning when the parameter goes to another process

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = weakref.ref(module), name
        self.handle: Any = None  # removes the hook from where it is registered

    @classmethod
    def find(cls, hooks: dict[int, Any] | None, module: nn.Module, name: str) -> Any:
        """Returns the hook of this kind for (module, name) among `hooks`, or None."""
        mine = (h for h in (hooks or {}).values() if isinstance(h, cls))
        return next((h for h in mine if h.module() is module and h.name == name), None)


class _GradientHook(_Hook):
    """Masks a gradient before it is accumulated into .grad, and so before clipping."""

    tensor: int  # the address of the C++ tensor to which the hook is linked

    @classmethod
    def register(cls, module: nn.Module, name: str) -> None:
        """Registers one hook a Parameter, and another where the Parameter was replaced or its tensor swapped."""
        parameter: Any = module._parameters[name]
        if not parameter.requires_grad:
            return
        hook = cls.find(parameter._backward_hooks, module, name)
        if hook is None:
            hook = cls(module, name)
            hook.handle = parameter.register_hook(hook)
        elif hook.tensor != parameter._cdata:
            # swap_tensors (module.to under torch.__future__'s swap) leaves the dict of hooks on the Python object but
            # not on the new tensor; assigning the dict links it again.
            parameter._backward_hooks = parameter._backward_hooks
        hook.tensor = parameter._cdata

    def __call__(self, grad: Tensor) -> Tensor | None:
        mask = live_mask(self.module(), self.name)
        if mask is None:
            return None
        return torch.where(mask, grad, 0) if grad.layout == torch.strided else grad * mask


class _ShardGradientHook(_Hook):
    """Masks .grad of a sharded Parameter after each accumulation, and so before clipping.

    FSDP writes the gradients of shards itself, and this is the only kind of hook that it calls.
    """

    @classmethod
    def register(cls, module: nn.Module, name: str) -> None:
        """Registers one hook a Parameter, and another where the Parameter was replaced."""
        parameter: Any = module._parameters[name]
        if parameter.requires_grad and cls.find(parameter._post_accumulate_grad_hooks, module, name) is None:
            hook = cls(module, name)
            hook.handle = parameter.register_post_accumulate_grad_hook(hook)

    def __call__(self, parameter: Tensor) -> None:
        mask = live_mask(self.module(), self.name)
        if mask is not None:
            zero_masked_(cast(Tensor, parameter.grad), mask)


class _StepHook(_Hook):
    """Masks the weight after each step of the optimizer, so that momentum and weight decay revive nothing."""

    sharded: bool  # whether the Parameter was sharded when the hook was registered

    @classmethod
    def register(cls, module: nn.Module, name: str, optimizer: torch.optim.Optimizer) -> None:
        """Registers one hook for each weight on each optimizer."""
        if cls.find(optimizer._optimizer_step_post_hooks, module, name) is None:
            hook = cls(module, name)
            hook.sharded = is_sharded(module._parameters[name])
            hook.handle = optimizer.register_step_post_hook(hook)

    def __call__(self, *_: Any) -> None:
        module = self.module()
        mask = live_mask(module, self.name)
        if module is None or mask is None:
            return
        parameter = cast(Tensor, module._parameters[self.name])
        if self.sharded:  # a gathered Parameter is a copy: to mask it would leave the stepped rows as they are
            check_resharded(self.name, parameter, sharded=True)
        zero_masked_(parameter, mask)
        _register_gradient_hook(module, self.name)
