"""Where the weights of `regularize` are: found again at each call, in a model that nothing here keeps alive."""
from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import effective_weight, origin, parameters_behind
from . import checks


@dataclass(frozen=True)
class Target:
    """One weight to regularize. `regularize` checks what is given here.

    Args:
        module: the module that owns the weight.
        name: the weight is what the module's forward pass uses under this name: a Parameter, or what
            torch.nn.utils.parametrize, spectral_norm, weight_norm or prune make of one. It is read at each call.
        columns: the columns to regularize, a slice with step 1, such as slice(input_size, None) for a cell on input and
            state side by side. None: all columns.
        blocks: gate blocks that are stacked in rows (LSTM 4, GRU 3).
        recurrent: whether rows and columns are the same neurons, which share one embedding. None: they are for a square
            block whose name begins with weight_hh, or whose `columns` are given.
    """

    module: nn.Module
    name: str
    columns: slice | None = None
    blocks: int = 1
    recurrent: bool | None = None


def weight_of(target: Target) -> Tensor:
    """The columns to regularize of the weight that the module's forward pass uses, differentiable in the Parameters
    behind it.

    Raises:
        ValueError: there is no such weight, or something unknown writes it.
    """
    module, name = target.module, target.name
    if origin(module, name) == "attribute" and _is_computed(module, name):
        weight = getattr(module, name)
    else:
        weight = effective_weight(module, name)
    return weight if target.columns is None else weight[:, target.columns]


def check_weight(target: Target) -> Tensor:
    """`weight_of(target)` without its columns, with errors that say what to name instead.

    Raises:
        ValueError: as `weight_of`.
        TypeError: the module is no nn.Module, or the weight has a wrong layout or dtype.
    """
    checks.target_module(target.module, target.name)
    if origin(target.module, target.name) == "attribute" and not _is_computed(target.module, target.name):
        checks.unknown_origin(target.module, target.name)
    weight = weight_of(Target(target.module, target.name))
    checks.weight_tensor(weight)
    return weight


def _is_computed(module: nn.Module, name: str) -> bool:
    """Whether the class computes the weight each time that it is read, so that it is never out of date."""
    return isinstance(inspect.getattr_static(type(module), name, None), property)


class Place:
    """Where one regularized weight is.

    The model and the module are held weakly, so that a module that was taken out of the model is noticed. The
    Parameters are held, and tell a module that took over the place of another with the very same Parameters, as
    SparseRNN.from_rnn does. A copy or a pickle takes the model along: in copy.deepcopy((model, reg)) it is the copied
    model, and in a copy of the regularization alone it is gone as soon as the copy is made.

    Args:
        target: the weight.
        model: the model in which the module is looked for, at `path`. None: only the module counts.
        path: the module's name in the model.
        title: what errors call the weight.
    """

    def __init__(self, target: Target, model: nn.Module | None, path: str | None, title: str):
        self.name, self.columns, self.blocks, self.recurrent = (
            target.name, target.columns, target.blocks, target.recurrent)
        self.title = title
        self.kind = type(target.module).__name__
        self.is_rnn = isinstance(target.module, nn.RNNBase)  # which torch.compile does not look into unasked
        self._module = weakref.ref(target.module)
        self._model = None if model is None or path is None else weakref.ref(model)
        self._path = () if not path else tuple(path.split("."))
        self.parameters = parameters_behind(target.module, target.name)
        self._tied: list[Place] = []
        self._copied = False

    def tie(self, other: Place) -> None:
        """Notes that the weight at the other place is this one, so that it is not penalized for itself. `read` is an
        error once it is made of other Parameters."""
        if self.parameters and _same(self.parameters, other.parameters):
            self._tied.append(other)

    def kept(self) -> dict[str, Any]:
        """What a copy or a pickle takes along, in plain Python: the module and the model are in it themselves."""
        model = None if self._model is None else self._model()
        tied = [each.kept() for each in self._tied]
        return {**self.__dict__, "_module": self._module(), "_model": model, "_tied": tied}

    @classmethod
    def restored(cls, kept: dict[str, Any]) -> Place:
        """The place from what `kept` gave. It refers to module and model weakly again."""
        place = cls.__new__(cls)
        place.__dict__.update(kept)
        place._tied = [cls.restored(each) for each in kept.get("_tied", [])]
        module, model = kept["_module"], kept["_model"]
        place._module = _gone if module is None else weakref.ref(module)
        place._model = None if model is None else weakref.ref(model)
        place._copied = True
        return place

    def target(self) -> Target:
        """The weight where it is now.

        Raises:
            ValueError: the module is not in the model any more, or gone, and no module has its Parameters instead.
        """
        return Target(self._find(), self.name, self.columns, self.blocks, self.recurrent)

    def read(self) -> Tensor:
        """The columns to regularize of the weight as it is now. Errors are those of `target` and `weight_of`, and a
        ValueError where a weight that was tied to it is so no more."""
        target = self.target()
        for other in self._tied if not torch.compiler.is_compiling() else ():
            if not _same(parameters_behind(target.module, self.name), parameters_behind(other._find(), other.name)):
                checks.untied(self.title, other.title)
        return weight_of(target)

    def is_there(self) -> bool:
        """Whether `target` finds the weight."""
        try:
            self._find()
        except ValueError:
            return False
        return True

    def _find(self) -> nn.Module:
        if self._copied and not torch.compiler.is_compiling():
            gc.collect()  # a model that was copied only along with this is gone, unless it refers to itself
            self._copied = False
        module = self._module()
        model = None if self._model is None else self._model()
        if module is None or (model is not None and self._at_path(model) is not module):
            if torch.compiler.is_compiling():
                checks.replaced_in_graph(self.title)
            module = self._find_again(model, module)
        if not torch.compiler.is_compiling():
            self._note_parameters(module)
        return module

    def _at_path(self, model: nn.Module) -> nn.Module | None:
        here: nn.Module | None = model
        for part in self._path:
            here = None if here is None else here._modules.get(part)
        return here

    def _note_parameters(self, module: nn.Module) -> None:
        parameter = module._parameters.get(self.name)
        if parameter is None or len(self.parameters) != 1 or self.parameters[0] is not parameter:
            found = parameters_behind(module, self.name)
            if all(isinstance(each, nn.Parameter) for each in found):  # torch.func.functional_call lends other tensors
                self.parameters = found

    def _find_again(self, model: nn.Module | None, module: nn.Module | None) -> nn.Module:
        """The module at another path of the model, else one that has the same Parameters."""
        parameters = self.parameters if module is None else parameters_behind(module, self.name)
        if model is not None:
            among = dict(model.named_modules())
            for path, other in among.items():
                if other is module:
                    return self._take(other, path)
            for path, other in among.items():
                if self._has(other, parameters):
                    return self._take(other, path)
            checks.replaced(self.title, ".".join(self._path), type(model).__name__)
        owner = next((m for m in _all_modules() if self._has(m, parameters)), None)
        if owner is None:
            checks.model_gone(self.title, self.kind)
        self._model = None
        return self._take(owner, "")

    def _has(self, module: nn.Module, parameters: list[nn.Parameter]) -> bool:
        own = parameters_behind(module, self.name) if "_parameters" in module.__dict__ else []
        return len(own) > 0 and _same(own, parameters)

    def _take(self, module: nn.Module, path: str) -> nn.Module:
        self._module, self._path = weakref.ref(module), tuple(path.split(".")) if path else ()
        return module


def _same(a: list[nn.Parameter], b: list[nn.Parameter]) -> bool:
    return len(a) == len(b) and all(one is other for one, other in zip(a, b))


def _gone() -> None:
    """Stands for a weak reference to a module that is gone."""


def _all_modules() -> Iterable[nn.Module]:
    """Every nn.Module there is in the process."""
    return (each for each in gc.get_objects() if issubclass(type(each), nn.Module))
