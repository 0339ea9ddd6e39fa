"""To and from torch.nn.utils.prune, which keeps `<param>_orig`, a 0/1 `<param>_mask` and a forward pre-hook.

The Parameter object stays the same both ways, so optimizers go on working.
"""
from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from .targets import Pairs, Weight, floating, grouped, names_pruned_by_torch, prunable, target_pairs


def hand_over(weight: Weight, mask: Tensor) -> None:
    """Has torch prune a plain Parameter in every module that owns it."""
    for module, name in weight.owners:
        torch_prune.custom_from_mask(module, name, mask)


def take_over(targets_or_model: nn.Module | Iterable[tuple[nn.Module, str]]) -> Pairs:
    """Makes what torch has pruned plain Parameters with bool masks; the targets, or all that a model holds.

    Raises ValueError / TypeError where torch has pruned none of them, or where one does not fit; then nothing
    was changed.
    """
    if isinstance(targets_or_model, nn.Module):
        pairs = [(m, name) for m in targets_or_model.modules() for name in names_pruned_by_torch(m)]
    else:
        pairs = target_pairs(targets_or_model)
    masks = {}
    for i, (module, name) in enumerate(pairs):
        if name not in names_pruned_by_torch(module):
            prunable(i, module, name)
            continue
        kind, mask = type(module).__name__, module._buffers[f"{name}_mask"]
        floating(i, kind, name, module._parameters[f"{name}_orig"])
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(
                f"{name}_mask of {kind} must hold only 0 and 1, got other values; make these weights "
                "permanent with torch.nn.utils.prune.remove first."
            )
        masks[module, name] = mask == 1
    if not masks:
        raise ValueError(
            "targets_or_model must hold a parameter pruned by torch.nn.utils.prune, got none; use "
            "MagnitudePruner(targets) for plain parameters."
        )
    grouped(pairs)  # tied weights with masks that differ are refused before anything is changed
    for (module, name), mask in masks.items():
        torch_prune.remove(module, name)
        module.register_buffer(f"{name}_mask", mask)
    return pairs
