"""Loads a checkpoint of a pruned model into a model that has no masks yet."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import (
    buffer_name,
    described,
    live_mask,
    names_pruned_by_torch,
    original_name,
    remove_mask,
    set_mask,
)


def load_pruned_(model: nn.Module, state_dict: Mapping[str, Any], *, strict: bool = True) -> Any:
    """Loads the state_dict of a pruned model, with its masks, into a model that has none yet.

    `model.load_state_dict` finds no buffers for the masks of torch's own modules in a model that was just made, and
    calls them unexpected keys. This function makes the masks, as MagnitudePruner does, and holds them: masked weights
    stay 0. A MagnitudePruner made afterwards takes them over. The masks may be MagnitudePruner's (`<weight>_mask`,
    bool) or torch.nn.utils.prune's (`<weight>_orig` and `<weight>_mask`, 0 and 1), which become ours.

    Args:
        model: a model as the one that was saved.
        state_dict: what its `state_dict()` gave. Keys must be those of the model: where DistributedDataParallel has put
            `module.` before them, torch.nn.modules.utils.consume_prefix_in_state_dict_if_present takes it away.
        strict: as of `load_state_dict`. With False, a mask whose weight is missing masks the weight that is there.

    Returns:
        What `model.load_state_dict` returns: missing_keys and unexpected_keys.

    Raises:
        ValueError: a mask does not fit its weight, or holds anything but 0 and 1; nothing is changed then.
        RuntimeError: as by `load_state_dict`; nothing is changed then either.
    """
    state, masked = dict(state_dict), []
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in list(module._parameters.items()):
            prefix = f"{path}." if path else ""
            mask = state.get(prefix + buffer_name(name))
            if parameter is None or mask is None:
                continue
            state[prefix + buffer_name(name)] = kept = _bool_mask(prefix + buffer_name(name), mask, parameter)
            original = state.pop(prefix + original_name(name), None)
            if original is not None and name not in names_pruned_by_torch(module):
                state[prefix + name] = torch.where(kept, original, 0)
            if live_mask(module, name) is None:
                masked.append((module, name, parameter))
    with restored_on_error(model):
        for module, name, parameter in masked:
            set_mask(module, name, torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device))
        try:
            return model.load_state_dict(state, strict=strict)
        except BaseException:
            for module, name, _ in masked:
                remove_mask(module, name)
            raise


@contextlib.contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Gives parameters and buffers their earlier values back where the body of the `with` statement raises."""
    before = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, old in before:
                tensor.copy_(old)
        raise


def _bool_mask(key: str, mask: Any, parameter: Tensor) -> Tensor:
    fits = isinstance(mask, Tensor) and mask.shape == parameter.shape
    if not fits or not bool(((mask == 0) | (mask == 1)).all()):
        what = described(mask) if not fits else "other values"
        raise ValueError(
            f"state_dict[{key!r}] must be a mask {tuple(parameter.shape)} of 0 and 1, got {what}; load the state_dict "
            "of a model of the same sizes."
        )
    return mask != 0
