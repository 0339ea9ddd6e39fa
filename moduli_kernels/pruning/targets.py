"""What a pruner prunes: the targets a user names, checked, and grouped by the Parameter behind them."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from ..distributed import check_resharded, is_sharded
from ..masks import live_mask

Pairs = list[tuple[nn.Module, str]]


# --- checks -------------------------------------------------------------------------------------------------

def target_pairs(targets: Any) -> Pairs:
    how = "pass e.g. [(model.rnn, 'weight_hh_l0')]."
    if not isinstance(targets, Iterable) or isinstance(targets, (str, nn.Module)):
        kind = type(targets).__name__
        raise TypeError(f"targets must be a list of (module, parameter name), got a {kind}; {how}")
    pairs = list(targets)
    for i, pair in enumerate(pairs):
        fits = isinstance(pair, (tuple, list)) and len(pair) == 2
        if not (fits and isinstance(pair[0], nn.Module) and isinstance(pair[1], str)):
            kind = type(pair).__name__
            raise TypeError(f"targets[{i}] must be a pair (module, parameter name), got a {kind}; {how}")
    if not pairs:
        raise ValueError(f"targets must name at least one parameter, got an empty list; {how}")
    return [(module, name) for module, name in pairs]


def prunable(i: int, module: nn.Module, name: str) -> None:
    """(module, name) is a floating-point Parameter whose `<name>_mask` is free or already a mask of ours."""
    kind = type(module).__name__
    if name in names_pruned_by_torch(module):
        raise ValueError(
            f"targets[{i}] must be a plain parameter, got {kind}.{name} pruned by torch.nn.utils.prune; use "
            "MagnitudePruner.from_torch_prune(...)."
        )
    parameter = module._parameters.get(name)
    if parameter is None:
        have = ", ".join(n for n, p in module._parameters.items() if p is not None) or "none"
        raise ValueError(
            f"targets[{i}] must name a parameter the module itself owns, got {name!r} of {kind}; it owns: "
            f"{have}."
        )
    if nn.parameter.is_lazy(parameter):
        raise ValueError(
            f"targets[{i}] must be initialized, got the lazy {kind}.{name}; run one forward pass first."
        )
    floating(i, kind, name, parameter)
    mask = getattr(module, f"{name}_mask", None)
    if mask is not None and not (f"{name}_mask" in module._buffers and is_mask(mask, parameter)):
        raise ValueError(
            f"{name}_mask of targets[{i}] must be a torch.bool buffer {tuple(parameter.shape)}, got "
            f"{described(mask)}: a mask that fits no parameter; delete it from the {kind} or give it that "
            "shape."
        )


def floating(i: int, kind: str, name: str, parameter: Tensor) -> None:
    if not parameter.is_floating_point():
        raise TypeError(
            f"targets[{i}] must be a floating-point weight, got {kind}.{name} with {parameter.dtype}; "
            "integer and complex weights are not pruned, leave it out."
        )


def is_mask(value: Any, tensor: Tensor) -> bool:
    """A bool tensor of the shape of `tensor`."""
    return isinstance(value, Tensor) and value.dtype == torch.bool and value.shape == tensor.shape


def described(value: Any) -> str:
    """What came instead of a mask, for an error."""
    if value is None:
        return "none"
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def names_pruned_by_torch(module: nn.Module) -> list[str]:
    hooks = module._forward_pre_hooks.values()
    return [hook._tensor_name for hook in hooks if isinstance(hook, torch_prune.BasePruningMethod)]


# --- weights ------------------------------------------------------------------------------------------------

class Weight:
    """One pruned Parameter: its key and the (module, name) pairs that own it, several where it is tied."""

    def __init__(self, key: str, module: nn.Module, name: str):
        self.key, self.owners = key, [(module, name)]
        self.sharded = is_sharded(module._parameters.get(name))

    @property
    def parameter(self) -> Tensor:
        module, name = self.owners[0]
        return module._parameters[name]

    @property
    def mask(self) -> Tensor:
        module, name = self.owners[0]
        return module._buffers[f"{name}_mask"]

    def found_mask(self) -> Tensor | None:
        """A mask that one of the owners has already."""
        masks = (module._buffers.get(f"{name}_mask") for module, name in self.owners)
        masks = [mask for mask in masks if mask is not None]
        if any((mask != masks[0]).any() for mask in masks[1:]):
            raise ValueError(
                f"the modules that share {self.key} must have one mask, got masks that differ; delete "
                "all but one."
            )
        return masks[0] if masks else None

    def check_alive(self) -> None:
        """Every owner still has the Parameter and one mask that fits it; owners share the buffer again."""
        again = "make a new MagnitudePruner."
        for module, name in self.owners:
            if live_mask(module, name) is None:
                raise RuntimeError(
                    f"{self.key} has lost its parameter or its bool buffer {name}_mask (made permanent, "
                    f"handed to torch.nn.utils.prune, or deleted); {again}"
                )
            if module._parameters[name] is not self.parameter:
                raise RuntimeError(f"{self.key} was one tied parameter and is several now; {again}")
            module._buffers[f"{name}_mask"] = self.mask  # module.to(device) moved each one by itself
        parameter, mask = self.parameter, self.mask
        if (mask.shape, mask.device) != (parameter.shape, parameter.device):
            raise RuntimeError(
                f"{self.key} and its mask must have one shape and device, got {tuple(parameter.shape)} "
                f"on {parameter.device} and {tuple(mask.shape)} on {mask.device}; move the module with "
                "module.to(...), not the parameter alone."
            )

    def check_writable(self) -> None:
        """Alive, and a sharded Parameter is not, for the moment, a whole copy of itself."""
        self.check_alive()
        check_resharded(self.key, self.parameter, self.sharded)


def grouped(pairs: Pairs) -> list[Weight]:
    """One Weight a Parameter (`<name>_orig` where torch has renamed it), in the order of `pairs`.

    Raises ValueError for tied weights whose masks differ.
    """
    weights: dict[int, Weight] = {}
    for i, (module, name) in enumerate(pairs):
        own = module._parameters
        parameter = own[name] if name in own else own[f"{name}_orig"]
        weight = weights.setdefault(id(parameter), Weight(f"{i}.{name}", module, name))
        if all(m is not module or n != name for m, n in weight.owners):
            weight.owners.append((module, name))
    for weight in weights.values():
        weight.found_mask()
    return list(weights.values())
