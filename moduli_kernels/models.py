"""Which weights of a model are recurrent, and the names that they have in it."""
from __future__ import annotations

from typing import NamedTuple

from torch import nn

# The gate blocks that the hidden weight of each of torch's recurrent modules stacks in rows.
_GATES = {"RNN": 1, "LSTM": 4, "GRU": 3, "RNNCell": 1, "LSTMCell": 4, "GRUCell": 3}


class RecurrentWeight(NamedTuple):
    """A hidden weight of a recurrent module.

    module: the RNN, GRU, LSTM or cell.
    name: the weight is getattr(module, name).
    blocks: gate blocks that are stacked in its rows (LSTM 4, GRU 3).
    """

    module: nn.Module
    name: str
    blocks: int


def recurrent_weights(model: nn.Module) -> list[RecurrentWeight]:
    """The hidden weights of torch's RNN, GRU and LSTM (each layer and direction) and of their cells in a model.

    Subclasses count. Names are those that the module's forward pass reads, so that another Parameter whose name begins
    alike is not taken for a weight. They need not be Parameters: a parametrization may compute them.
    """
    found = []
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            blocks = _GATES["RNN" if module.mode.startswith("RNN") else module.mode]
            found += [RecurrentWeight(module, names[1], blocks) for names in module._all_weights]
        elif isinstance(module, nn.RNNCellBase):
            blocks = next(_GATES[c.__name__] for c in type(module).__mro__ if c.__name__ in _GATES)
            found.append(RecurrentWeight(module, "weight_hh", blocks))
    return found


def weight_called(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module in the model and its weight's own name that a name such as "rnn.weight_hh_l0" means.

    Raises:
        AttributeError: the model has no such module.
    """
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own


def name_in(model: nn.Module, module: nn.Module, name: str) -> str:
    """The name of a module's weight in the model, such as "rnn.weight_hh_l0", as named_parameters() writes it.

    A module that is not in the model is called by its class.
    """
    path = next((path for path, each in model.named_modules() if each is module), type(module).__name__)
    return f"{path}.{name}" if path else name
