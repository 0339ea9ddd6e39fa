"""The masks of a model's copies."""
from __future__ import annotations

from torch import nn

from .averaging import counterparts, give_masks
from .holding import remove_mask, set_mask


def copy_masks(copy: nn.Module, model: nn.Module) -> None:
    """Gives a copy of a model, such as an average, the masks that the model has now, and sets masked weights to 0.

    Modules are found by their paths, without what AveragedModel, DistributedDataParallel and torch.compile add to them.
    A mask that the model leaves out of its state_dict is left out of the copy's as well.
    """
    give_masks(counterparts(copy, model), set_mask, remove_mask)
