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

from .buffers import get_mask, masked_names
from .zeros import zero_masked_


def keep_masks_when_averaging(set_mask: Callable[..., None], remove_mask: Callable[..., None]) -> None:
    """Wraps AveragedModel.update_parameters: the average has the masks of the model, and masked weights are 0.

    Args:
        set_mask, remove_mask: those of holding.py, which imports this file.
    """
    update = AveragedModel.update_parameters

    @functools.wraps(update)
    def update_parameters(self: AveragedModel, model: nn.Module) -> None:
        masked = _counterparts(self.module, model)
        for average, module, names in masked:
            # Pruning may have begun or ended since the average was made, and buffers are averaged in their order.
            for name in set(masked_names(average)).difference(names):
                remove_mask(average, name)
            for name in names:
                if get_mask(average, name) is None:
                    mask = cast(Tensor, get_mask(module, name))
                    set_mask(average, name, mask.to(cast(Tensor, average._parameters[name]).device, copy=True))
        update(self, model)
        with torch.no_grad():
            for average, module, names in masked:
                for name in names:
                    mask = cast(Tensor, get_mask(average, name))
                    mask.copy_(cast(Tensor, get_mask(module, name)))
                    zero_masked_(cast(Tensor, average._parameters[name]), mask)

    AveragedModel.update_parameters = update_parameters


def _counterparts(averaged: nn.Module, model: nn.Module) -> list[tuple[nn.Module, nn.Module, list[str]]]:
    """(module of the average, module of the model, the parameters that the latter masks), where one has masks."""
    theirs = {_plain(path): module for path, module in averaged.named_modules()}
    found = []
    for path, module in model.named_modules():
        average = theirs.get(_plain(path))
        if average is not None and (masked_names(module) or masked_names(average)):
            found.append((average, module, masked_names(module)))
    return found


def _plain(path: str) -> str:
    """The path of a module without what DistributedDataParallel and torch.compile add to it."""
    return ".".join(part for part in path.split(".") if part not in ("module", "_orig_mod"))

