"""The weight that a module's forward pass uses under a name, whatever it is computed from."""
from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .buffers import live_mask, original_name
from .holding import is_held
from .zeros import is_zero_where_masked


def origin(module: nn.Module, name: str) -> str | None:
    """Where the weight `name` of a module comes from.

    Returns:
        "parameter": it is a Parameter of that very name.
        "parametrization": torch.nn.utils.parametrize computes it.
        "hook": torch.nn.utils.spectral_norm or weight_norm in their old form compute it before each forward pass.
        "pruned by torch": torch.nn.utils.prune computes it before each forward pass.
        "attribute": it is a tensor, and nothing here knows where it comes from.
        None: the module has no tensor of that name.
    """
    if module._parameters.get(name) is not None:
        return "parameter"
    if parametrize.is_parametrized(module, name):
        return "parametrization"
    hook = _hook_of(module, name)
    if hook is not None:
        return "pruned by torch" if isinstance(hook, BasePruningMethod) else "hook"
    return "attribute" if isinstance(getattr(module, name, None), Tensor) else None


def effective_weight(module: nn.Module, name: str) -> Tensor:
    """The tensor that the module's next forward pass uses under `name`, differentiable in what it is computed from.

    A bool mask counts: masked entries are 0. Reading changes nothing: spectral_norm makes no step of its power
    iteration, which a read of the attribute would make in training.

    Raises:
        ValueError: the module has no such weight, or it is a tensor that something unknown writes.
    """
    found = origin(module, name)
    if found == "parameter":
        return _masked(module, name, cast(Tensor, module._parameters[name]))
    if found == "parametrization":
        return _parametrized(module, name)
    hook = _hook_of(module, name)
    if isinstance(hook, BasePruningMethod):
        return hook.apply_mask(module)
    if isinstance(hook, SpectralNorm):
        return _spectrally_normed(module, name, hook)
    if isinstance(hook, WeightNorm):
        return hook.compute_weight(module)
    kind = type(module).__name__
    known = ", ".join(n for n, p in module._parameters.items() if p is not None) or "none"
    if found is None:
        raise ValueError(f"name must be a weight of {kind}, got {name!r}; its own parameters are {known}.")
    raise ValueError(
        f"{name} of {kind} must be a Parameter or what torch.nn.utils.parametrize, spectral_norm, weight_norm or prune "
        f"make of one, got a plain tensor that something else writes, and that may be out of date; name the Parameter "
        f"that it is made of (its own parameters are {known})."
    )


def parameters_behind(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The Parameters that an optimizer must have to train the weight `name`; none for one of unknown origin."""
    found = origin(module, name)
    if found == "parameter":
        return [cast(nn.Parameter, module._parameters[name])]
    if found == "parametrization":
        return list(cast(Any, module.parametrizations)[name].parameters())
    hook = _hook_of(module, name)
    names = [f"{name}_g", f"{name}_v"] if isinstance(hook, WeightNorm) else [original_name(name)]
    return [p for each in names if (p := module._parameters.get(each)) is not None] if hook is not None else []


def _masked(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    """The weight with 0 where it is masked: the weight itself where it is 0 there already.

    That is looked up on the CPU. In a graph, and on a GPU, which would have to be waited for, it is relied on where
    hooks set masked weights to 0 before each forward pass.
    """
    mask = live_mask(module, name)
    if mask is None:
        return weight
    if torch.compiler.is_compiling() or weight.device.type != "cpu":
        zeroed = is_held(module, name) and not getattr(module, "applies_masks", False)
        return weight if zeroed else torch.where(mask, weight, 0)
    return weight if is_zero_where_masked(weight, mask) else torch.where(mask, weight, 0)


def _hook_of(module: nn.Module, name: str) -> Any:
    """The forward pre-hook of torch.nn.utils that computes the weight, or None."""
    for hook in module._forward_pre_hooks.values():
        computes = getattr(hook, "_tensor_name" if isinstance(hook, BasePruningMethod) else "name", None)
        if isinstance(hook, (BasePruningMethod, SpectralNorm, WeightNorm)) and computes == name:
            return hook
    return None


def _spectrally_normed(module: nn.Module, name: str, hook: SpectralNorm) -> Tensor:
    """The weight divided by its spectral norm. The vectors of the power iteration are copied, since the next forward
    pass writes into them, perhaps before the backward pass of this weight."""
    weight, u, v = (getattr(module, each) for each in (original_name(name), f"{name}_u", f"{name}_v"))
    return weight / torch.dot(u.clone(), torch.mv(hook.reshape_weight_to_matrix(weight), v.clone()))


def _parametrized(module: nn.Module, name: str) -> Tensor:
    """Reads a parametrized weight with its parametrizations in eval mode, in which they change nothing of their own.

    Inside parametrize.cached() the cached tensor is read, which is the one that the forward pass uses.
    """
    if parametrize._cache_enabled:
        return getattr(module, name)
    parametrizations = cast(Any, module.parametrizations)[name]
    training = [each for each in parametrizations.modules() if each.training]
    try:
        for each in training:
            each.training = False
        return getattr(module, name)
    finally:
        for each in training:
            each.training = True
