"""torch.optim.swa_utils.AveragedModel, and what builds on it, takes masks as they are and not as numbers.

With use_buffers=True it averages all buffers, and the average of masks would keep whatever one of them has kept.
AveragedModel has no hook for this, so its method update_parameters is wrapped, once the first mask is set.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .buffers import buffer_name, get_mask, is_left_out, leave_out, masked_names
from .zeros import zero_masked_


def keep_masks_when_averaging(set_mask: Callable[..., None], remove_mask: Callable[..., None]) -> None:
    """Wraps AveragedModel.update_parameters: the average has the masks of the model, and masked weights are 0.

    While it averages, neither side has masks, because it goes through the buffers of both in order, and pruning may
    have begun or ended since the average was made.

    Args:
        set_mask, remove_mask: those of holding.py, which imports this file.
    """
    update = AveragedModel.update_parameters

    @functools.wraps(update)
    def update_parameters(self: AveragedModel, model: nn.Module) -> None:
        masked = counterparts(self.module, model)
        ours = [_take_masks(module) for _, module in masked]
        theirs = [_take_masks(average) for average, _ in masked]
        try:
            update(self, model)
        finally:
            for (average, module), mine, its in zip(masked, ours, theirs, strict=True):
                module._buffers.update(mine)
                average._buffers.update(its)
        give_masks(masked, set_mask, remove_mask)

    AveragedModel.update_parameters = update_parameters


def give_masks(masked: list[tuple[nn.Module, nn.Module]], set_mask: Callable[..., None],
               remove_mask: Callable[..., None]) -> None:
    """Gives the first module of each pair the masks of the second, and sets masked weights to 0."""
    for average, module in masked:
        for name in set(masked_names(average)).difference(masked_names(module)):
            remove_mask(average, name)
        for name in masked_names(module):
            _copy_mask(average, module, name, set_mask)


def _take_masks(module: nn.Module) -> dict[str, Tensor | None]:
    """Takes the buffers of its masks out of a module, and returns them by key."""
    return {key: module._buffers.pop(key) for key in map(buffer_name, masked_names(module))}


@torch.no_grad()
def _copy_mask(average: nn.Module, module: nn.Module, name: str, set_mask: Callable[..., None]) -> None:
    """Gives the average's parameter the mask of the model's, and sets it to 0 where it is masked."""
    parameter, mask = cast(Tensor, average._parameters[name]), cast(Tensor, get_mask(module, name))
    if get_mask(average, name) is None:
        set_mask(average, name, mask.to(parameter.device, copy=True))
        if is_left_out(module, name):
            leave_out(average, name)
    its = cast(Tensor, get_mask(average, name))
    its.copy_(mask)
    zero_masked_(parameter, its)


def counterparts(averaged: nn.Module, model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(module of the average, module of the model) for each module of which one of the two has masks."""
    theirs = {_plain(path): module for path, module in averaged.named_modules()}
    pairs = [(theirs.get(_plain(path)), module) for path, module in model.named_modules()]
    return [(average, module) for average, module in pairs
            if average is not None and (masked_names(module) or masked_names(average))]


def _plain(path: str) -> str:
    """The path of a module without what DistributedDataParallel and torch.compile add to it."""
    return ".".join(part for part in path.split(".") if part not in ("module", "_orig_mod"))

