"""Hooks that keep pruned weights at 0: on the gradient of a Parameter, and on an optimizer's step.

They belong to the weights, not to a pruner: each looks up its module's mask when it runs, and does nothing
where there is none (any more), so one left behind on a parameter or an optimizer is harmless.
"""
from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import check_resharded, is_sharded
from ..masks import live_mask, zero_masked_


def attach(module: nn.Module, name: str, optimizer: torch.optim.Optimizer | None) -> None:
    """Hooks the Parameter, and the optimizer if there is one. What is hooked already stays as it is."""
    _attach_gradient_hook(module, name)
    if optimizer is not None:
        _StepHook.attach(module, name, optimizer)


def detach(module: nn.Module, name: str, optimizer: torch.optim.Optimizer | None) -> None:
    """Undoes `attach`; nothing to undo is fine, and so is a Parameter that is gone."""
    parameter = module._parameters.get(name)
    hooks = [_GradientHook.of(getattr(parameter, "_backward_hooks", None), module, name),
             _ShardGradientHook.of(getattr(parameter, "_post_accumulate_grad_hooks", None), module, name)]
    if optimizer is not None:
        hooks.append(_StepHook.of(optimizer._optimizer_step_post_hooks, module, name))
    for hook in hooks:
        if hook is not None:
            hook.handle.remove()


def _attach_gradient_hook(module: nn.Module, name: str) -> None:
    kind = _ShardGradientHook if is_sharded(module._parameters[name]) else _GradientHook
    kind.attach(module, name)


class _Hook:
    """A module, held weakly so that no hook keeps a model alive, and a parameter's name."""

    __torch_unserializable__ = True  # dropped without a warning when the parameter goes to another process

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = weakref.ref(module), name

    @classmethod
    def of(cls, hooks: dict | None, module: nn.Module, name: str) -> Any:
        """The hook of this kind for (module, name) in `hooks`, or None."""
        mine = (h for h in (hooks or {}).values() if isinstance(h, cls))
        return next((h for h in mine if h.module() is module and h.name == name), None)


class _GradientHook(_Hook):
    """Masks a gradient before it is accumulated into .grad, so before clipping."""

    @classmethod
    def attach(cls, module: nn.Module, name: str) -> None:
        """Once a Parameter; again where the module's Parameter was replaced or its tensor swapped."""
        parameter = module._parameters[name]
        if not parameter.requires_grad:
            return
        hook = cls.of(parameter._backward_hooks, module, name)
        if hook is None:
            hook = cls(module, name)
            hook.handle = parameter.register_hook(hook)
        elif hook.tensor != parameter._cdata:
            # swap_tensors (module.to with torch.__future__'s swap on) leaves the dict of hooks on the Python
            # object but not on the new tensor; assigning the dict links it again.
            parameter._backward_hooks = parameter._backward_hooks
        hook.tensor = parameter._cdata

    def __call__(self, grad: Tensor) -> Tensor | None:
        mask = live_mask(self.module(), self.name)
        if mask is None:
            return None
        return torch.where(mask, grad, 0) if grad.layout == torch.strided else grad * mask


class _ShardGradientHook(_Hook):
    """Masks .grad of a sharded Parameter after each accumulation, so before clipping: FSDP puts gradients there itself
    and calls hooks of this kind alone."""

    @classmethod
    def attach(cls, module: nn.Module, name: str) -> None:
        """Once a Parameter; again where the module's Parameter was replaced."""
        parameter = module._parameters[name]
        if parameter.requires_grad and cls.of(parameter._post_accumulate_grad_hooks, module, name) is None:
            hook = cls(module, name)
            hook.handle = parameter.register_post_accumulate_grad_hook(hook)

    def __call__(self, parameter: Tensor) -> None:
        mask = live_mask(self.module(), self.name)
        if mask is not None:
            zero_masked_(parameter.grad, mask)


class _StepHook(_Hook):
    """Masks the weight after each optimizer step, so that momentum and decay revive nothing."""

    @classmethod
    def attach(cls, module: nn.Module, name: str, optimizer: torch.optim.Optimizer) -> None:
        if cls.of(optimizer._optimizer_step_post_hooks, module, name) is None:
            hook = cls(module, name)
            hook.sharded = is_sharded(module._parameters[name])
            hook.handle = optimizer.register_step_post_hook(hook)

    def __call__(self, *_: Any) -> None:
        module = self.module()
        mask = live_mask(module, self.name)
        if mask is not None:
            parameter = module._parameters[self.name]
            if self.sharded:  # whole, it is a copy: masking it would leave the rows that were stepped as they are
                check_resharded(self.name, parameter, sharded=True)
            zero_masked_(parameter, mask)
            _attach_gradient_hook(module, self.name)
