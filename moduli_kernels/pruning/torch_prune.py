"""Conversion to and from torch.nn.utils.prune.

There the module holds the Parameter under the name `<param>_orig`, a float mask of zeros and ones under the name
`<param>_mask`, and a forward pre-hook that multiplies the two. The Parameter object stays the same in both directions,
so that optimizers, which hold it, go on working.
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import prune

from ..masks import buffer_name, get_mask, names_pruned_by_torch, original_name, parameters_behind, set_mask
from ..models import name_in
from . import optimizers
from .targets import Pairs, PrunedWeight, check_floating_point, check_prunable, distinct_weights, named_targets


def hand_over(weight: PrunedWeight, mask: Tensor) -> None:
    """Makes torch.nn.utils.prune mask a plain Parameter in all modules that own it. mask: the Parameter's shape."""
    for module, name in weight.owners:
        prune.custom_from_mask(module, name, mask)


def take_over(targets_or_model: nn.Module | Iterable[tuple[nn.Module, str]],
              optimizer: Any) -> tuple[Pairs, list[str]]:
    """Turns parameters that torch.nn.utils.prune has pruned into plain Parameters with bool masks.

    Args:
        targets_or_model: (module, name) pairs, or a model, all of whose pruned parameters are meant.
        optimizer: as MagnitudePruner takes it.

    Returns:
        The (module, name) pairs, the targets or those that the model holds, and a name for each.

    Raises:
        ValueError, TypeError: torch has pruned none of them, or one does not fit; nothing is changed then.
    """
    if isinstance(targets_or_model, nn.Module):
        model = targets_or_model
        pairs = [(m, name) for m in model.modules() for name in names_pruned_by_torch(m)]
        keys = [name_in(model, *pair) for pair in pairs]
    else:
        pairs, keys = named_targets(targets_or_model, None)
    masks: dict[tuple[nn.Module, str], Tensor] = {}
    for i, (module, name) in enumerate(pairs):
        if name not in names_pruned_by_torch(module):
            check_prunable(i, module, name)
            continue
        kind, mask = type(module).__name__, cast(Tensor, get_mask(module, name))
        check_floating_point(i, kind, name, cast(Tensor, module._parameters[original_name(name)]))
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(
                f"{buffer_name(name)} of {kind} must hold only 0 and 1, got other values; make these weights "
                "permanent with torch.nn.utils.prune.remove first."
            )
        masks[module, name] = mask == 1
    if not masks:
        raise ValueError(
            "targets_or_model must hold a parameter pruned by torch.nn.utils.prune, got none; use "
            "MagnitudePruner(targets) for plain parameters."
        )
    distinct_weights(pairs, keys)  # refuses tied weights whose masks differ, before anything is changed
    optimizers.check_has_one_of(optimizer, [p for pair in pairs for p in parameters_behind(*pair)])
    for (module, name), mask in masks.items():
        prune.remove(module, name)
        set_mask(module, name, mask)
    return pairs, keys
