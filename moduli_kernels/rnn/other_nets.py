"""What a net is made of when another net is made from it: settings, weights and masks, shared or copied."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..masks import effective_weight, get_mask, origin, original_name, parameters_behind
from ..reference.rnn import kept
from . import checks
from .masked_module import mask_of


def settings_of(rnn: nn.RNN) -> dict[str, Any]:
    """The arguments of torch.nn.RNN that make a net like this one, dtype included. The nonlinearity is that of `mode`,
    by which torch.nn.RNN computes, whatever its attribute `nonlinearity` says.
    """
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    weight: Any = rnn._flat_weights[1]
    return {name: getattr(rnn, name) for name in names} | {
        "nonlinearity": checks.NONLINEARITY_OF[checks.mode(rnn.mode)], "dtype": weight.dtype}


def used_weights(rnn: nn.RNN) -> list[Tensor]:
    """The weights and biases that a forward pass uses, 0 where they are masked, without gradients."""
    with torch.no_grad():
        used = [(name, effective_weight(rnn, name)) for name in rnn._flat_weights_names]
        return [kept(weight, mask_of(rnn, name, weight)) for name, weight in used]


def shared_weight(rnn: nn.RNN, name: str) -> tuple[nn.Parameter, Tensor | None]:
    """The Parameter of a weight and its mask for another net; new ones where they can't be shared."""
    parameter, mask = rnn._parameters.get(name), get_mask(rnn, name)
    if parameter is not None and (mask is None or mask.dtype == torch.bool):
        return parameter, mask
    kept_entries = None if mask is None else mask != 0
    if parameter is not None:
        return parameter, kept_entries
    original = rnn._parameters.get(original_name(name)) if origin(rnn, name) == "pruned by torch" else None
    if original is not None and mask is not None and bool(((mask == 0) | (mask == 1)).all()):
        return original, kept_entries
    with torch.no_grad():
        return nn.Parameter(effective_weight(rnn, name).clone(), is_trained(rnn, name)), kept_entries


def is_trained(rnn: nn.RNN, name: str) -> bool:
    return any(parameter.requires_grad for parameter in parameters_behind(rnn, name))
