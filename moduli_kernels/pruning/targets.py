"""The weights that a pruner prunes: checks of the targets that a user names, and one record for each Parameter.

Two targets may name one Parameter (tied weights), which then must count once and have one mask.
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from ..distributed import check_resharded, is_sharded
from ..masks import (
    buffer_name,
    described,
    get_mask,
    is_mask,
    live_mask,
    names_pruned_by_torch,
    origin,
    original_name,
    replace_mask,
)
from ..models import name_in, recurrent_weights, weight_called

Pairs = list[tuple[nn.Module, str]]  # (module, parameter name), as a user gives them


# --- checks -------------------------------------------------------------------------------------------------

def target_pairs(targets: Any) -> Pairs:
    """Returns the targets as a list of (module, name) pairs; raises where they are none.

    This looks at types only: check_prunable says whether a module has a parameter of that name.
    """
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


def named_targets(model: Any, targets: Any) -> tuple[Pairs, list[str]]:
    """The (module, name) pairs that a pruner's first two arguments mean, and a name for each.

    Args:
        model: a model, or the pairs themselves.
        targets: pairs, or names such as "rnn.weight_hh_l0", in the model. None: its recurrent weights.

    Returns:
        The pairs, with names as in the model; without one they are "<position>.<parameter>".
    """
    if not isinstance(model, nn.Module):
        if model is not None and targets is not None:
            raise TypeError(f"model must be an nn.Module where targets are given beside it, got a "
                            f"{type(model).__name__}; pass MagnitudePruner(model, targets).")
        pairs = target_pairs(targets if model is None else model)
        return pairs, [f"{i}.{name}" for i, (_, name) in enumerate(pairs)]
    if targets is None:
        pairs = [(weight.module, weight.name) for weight in recurrent_weights(model)]
        if not pairs:
            raise ValueError(
                f"model must hold a recurrent weight (weight_hh_l* of RNN, GRU, LSTM or weight_hh of a cell), found "
                f'none in {type(model).__name__}; name the weights: MagnitudePruner(model, ["fc.weight"]).')
    else:
        given = targets if isinstance(targets, Iterable) and not isinstance(targets, (str, nn.Module)) else [targets]
        pairs = target_pairs([_pair_of(model, each) if isinstance(each, str) else each for each in given])
    return pairs, [name_in(model, *pair) for pair in pairs]


def _pair_of(model: nn.Module, target: str) -> tuple[nn.Module, str]:
    """The module and the parameter that a name such as "rnn.weight_hh_l0" means in a model."""
    try:
        return weight_called(model, target)
    except AttributeError as error:
        raise ValueError(f"targets must name weights of the model, got {target!r}: {error}; pass names such as those "
                         "of model.named_parameters().") from error


def check_prunable(i: int, module: nn.Module, name: str) -> None:
    """Raises unless target i names a floating-point Parameter that has no mask yet or one that fits it."""
    kind = type(module).__name__
    if name in names_pruned_by_torch(module):
        raise ValueError(
            f"targets[{i}] must be a plain parameter, got {kind}.{name} pruned by torch.nn.utils.prune; use "
            "MagnitudePruner.from_torch_prune(...)."
        )
    parameter = module._parameters.get(name)
    source = {"parametrization": "a parametrization", "hook": "a hook"}.get(origin(module, name) or "")
    if source is not None:
        raise ValueError(
            f"targets[{i}] must be a plain parameter, got {kind}.{name}, which {source} computes from others, so that "
            "no mask would hold; make it permanent first (torch.nn.utils.parametrize.remove_parametrizations, or "
            "remove_spectral_norm / remove_weight_norm), or mask it in a SparseRNN by set_mask."
        )
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
    check_floating_point(i, kind, name, parameter)
    found = getattr(module, buffer_name(name), None)  # any attribute may stand under the buffer's name
    if found is not None and not (get_mask(module, name) is not None and is_mask(found, parameter)):
        raise ValueError(
            f"{buffer_name(name)} of targets[{i}] must be a torch.bool buffer {tuple(parameter.shape)}, got "
            f"{described(found)}: a mask that fits no parameter; delete it from the {kind} or give it that "
            "shape."
        )


def check_floating_point(i: int, kind: str, name: str, parameter: Tensor) -> None:
    """Raises where the parameter `name` of target i, a module of class `kind`, has an integer or complex dtype."""
    if not parameter.is_floating_point():
        raise TypeError(
            f"targets[{i}] must be a floating-point weight, got {kind}.{name} with {parameter.dtype}; "
            "integer and complex weights are not pruned, leave it out."
        )


# --- weights ------------------------------------------------------------------------------------------------

class PrunedWeight:
    """A Parameter that a pruner prunes, which may have several names where it is tied.

    The Parameter and its mask are looked up in the first owner at each access, because moving or loading a module may
    replace both.

    Args:
        key: the name of the weight in `MagnitudePruner.masks`.
        owners: the (module, name) pairs under which it is found, at least one.
        sharded: whether it was a DTensor when the pruner was made.
    """

    def __init__(self, key: str, owners: Pairs, sharded: bool):
        self.key, self.owners, self.sharded = key, owners, sharded

    @property
    def parameter(self) -> Tensor:
        module, name = self.owners[0]
        return cast(Tensor, module._parameters[name])

    @property
    def mask(self) -> Tensor:
        return cast(Tensor, get_mask(*self.owners[0]))

    def found_mask(self) -> Tensor | None:
        """The mask that owners have already, None where no owner has one.

        Raises:
            ValueError: two owners have masks that differ.
        """
        masks = [mask for mask in (get_mask(*owner) for owner in self.owners) if mask is not None]
        if any((mask != masks[0]).any() for mask in masks[1:]):
            raise ValueError(
                f"the modules that share {self.key} must have one mask, got masks that differ; delete "
                "all but one."
            )
        return masks[0] if masks else None

    def check_alive(self) -> None:
        """Raises unless every owner still has the Parameter and a mask that fits it; makes owners share one mask again.

        module.to(device) moves each owner's buffer separately, which leaves tied weights with equal copies of it.
        """
        again = "make a new MagnitudePruner."
        for module, name in self.owners:
            if live_mask(module, name) is None:
                raise RuntimeError(
                    f"{self.key} has lost its parameter or its bool buffer {buffer_name(name)} (made permanent, "
                    f"handed to torch.nn.utils.prune, or deleted); {again}"
                )
            if module._parameters[name] is not self.parameter:
                raise RuntimeError(f"{self.key} was one tied parameter and is several now; {again}")
            replace_mask(module, name, self.mask)
        parameter, mask = self.parameter, self.mask
        if (mask.shape, mask.device) != (parameter.shape, parameter.device):
            raise RuntimeError(
                f"{self.key} and its mask must have one shape and device, got {tuple(parameter.shape)} "
                f"on {parameter.device} and {tuple(mask.shape)} on {mask.device}; move the module with "
                "module.to(...), not the parameter alone."
            )

    def check_writable(self) -> None:
        """Raises unless the weight is alive and sharded, or not, as it was when the pruner was made.

        While FSDP has gathered a sharded Parameter, what the module holds is a copy, and a write to it would be lost.
        """
        self.check_alive()
        check_resharded(self.key, self.parameter, self.sharded)


def distinct_weights(pairs: Pairs, keys: list[str]) -> list[PrunedWeight]:
    """Returns one PrunedWeight for each Parameter, in the order of `pairs`, with the first of its keys.

    A Parameter that torch.nn.utils.prune has renamed is found under its new name.

    Raises:
        ValueError: modules that share a Parameter have masks that differ.
    """
    weights: dict[int, PrunedWeight] = {}
    for (module, name), key in zip(pairs, keys, strict=True):
        own = module._parameters
        parameter = own[name] if name in own else own[original_name(name)]
        first = PrunedWeight(key, [], is_sharded(own.get(name)))
        owners = weights.setdefault(id(parameter), first).owners
        if all(m is not module or n != name for m, n in owners):
            owners.append((module, name))
    for weight in weights.values():
        weight.found_mask()
    return list(weights.values())
