"""`regularize`: one line that puts the penalty on every recurrent weight of a model."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import checks
from ..distributed import is_sharded
from ..masks import get_mask, original_name, plain_name
from ..reference import compute_dtype
from . import grouped
from .modules import CoefficientRegularizer, ModuliRegularizer

_GATES = {"RNN": 1, "LSTM": 4, "GRU": 3, "RNNCell": 1, "LSTMCell": 4, "GRUCell": 3}


@dataclass(frozen=True)
class Target:
    """One weight to regularize. What is given is checked by `regularize`.

    Args:
        module: the module that owns the weight.
        name: the weight is getattr(module, name), read afresh at each call.
        columns: a slice of the columns with step 1 (a cell on concatenated input and state: slice(input_size, None));
            None takes all.
        blocks: gate blocks stacked in rows (LSTM 4, GRU 3).
        recurrent: rows and columns are the same neurons and share one embedding. None decides: True for a square
            block whose name begins with weight_hh or whose `columns` are given, else False.
    """

    module: nn.Module
    name: str
    columns: slice | None = None
    blocks: int = 1
    recurrent: bool | None = None


class Regularization(nn.Module):
    """What `regularize` returns: the sum of the penalties of its targets. Its parameters are the embeddings only; the
    model's modules are referred to, not held as submodules.

    reg() -> 0-d tensor; reg.losses() -> {name: 0-d}; reg.items() -> (name, regularizer) pairs; reg.shuffled() and
    reg.matched() -> the same with the controls.

    Args:
        regularizers: {name: (target, its regularizer)}; `regularize` makes it.
    """

    def __init__(self, regularizers: dict[str, tuple[Target, nn.Module]]):
        super().__init__()
        self._targets = {name: target for name, (target, _) in regularizers.items()}
        self._key = {name: name.replace(".", "_") for name in regularizers}  # module names may not hold dots
        self.regularizers = nn.ModuleDict({self._key[name]: module for name, (_, module) in regularizers.items()})

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """(name of the weight, its regularizer)."""
        return ((name, self.regularizers[key]) for name, key in self._key.items())

    @property
    def targets(self) -> dict[str, Target]:
        """The regularized weights by name."""
        return dict(self._targets)

    def _penalties(self) -> tuple[Tensor | None, Sequence[Tensor]]:
        """The sum where one launch gives it, else None, and the penalty of each weight."""
        weights = [_read(self._targets[name]) for name in self._key]
        regularizers = cast("list[Any]", list(self.regularizers.values()))
        if not any(map(is_sharded, weights)) and grouped.share_launches(regularizers, weights):
            return grouped.penalties(list(map(grouped.layer_of, regularizers, weights)))  # pyright: ignore[reportReturnType]
        return None, [regularizer(weight) for regularizer, weight in zip(regularizers, weights)]

    def losses(self) -> dict[str, Tensor]:
        """The penalty of each weight, 0-d and differentiable, by the weight's name."""
        return dict(zip(self._key, self._penalties()[1]))

    def forward(self) -> Tensor:
        """The sum of all penalties, 0-d; on the first weight's device."""
        total, each = self._penalties()
        if total is not None:
            return total
        first, *others = each
        for loss in others:
            first = first + loss.to(first.device)
        return first

    def _map(self, make: Callable[[ModuliRegularizer], CoefficientRegularizer]) -> Regularization:
        return Regularization(
            {name: (self._targets[name], make(cast(ModuliRegularizer, r))) for name, r in self.items()})

    def shuffled(self, generator: torch.Generator | None = None) -> Regularization:
        """The control with each weight's coefficients permuted at random.

        Args:
            generator: for reproducible permutations; drawn on its device.
        """
        return self._map(lambda r: r.shuffled(generator))

    def matched(self) -> Regularization:
        """The control with one constant coefficient a weight, of equal mean."""
        return self._map(lambda r: r.matched())


def regularize(model: nn.Module, targets: Iterable[Target | tuple[nn.Module, str]] | None = None,
               **settings: Any) -> Regularization:
    """A module whose call gives the penalty of a model's recurrent weights.

    Args:
        model: searched for RNN, GRU, LSTM (weight_hh_l*, each layer and direction its own embedding) and their cells.
        targets: instead of the search, Targets or (module, name) pairs. A plain pair of a Linear or convolution gets
            row and column points of its own.
        **settings: keyword arguments of ModuliRegularizer, the same for all.

    Weights are read afresh at each call (also `orig * mask` of torch.nn.utils.prune), tied weights once. Points are
    made on the weight's device, in float64 for float64 weights, else float32.

    Raises:
        ValueError: no matching weight, a name that is none, blocks that do not divide the rows, an LSTM with proj_size
            (found by the search), a setting that ModuliRegularizer refuses.
        TypeError: model is no nn.Module, targets are no pairs or Targets, columns no slice with step 1, a weight is
            neither dense nor torch.sparse_csr or not floating point; unknown settings.

    Examples:
        >>> reg = mk.regularize(model.rnn, manifold="torus", strength=0.1)
        >>> loss = criterion(model(x), y) + reg()
    """
    checks.no_module(model)
    found = _search(model) if targets is None else _as_targets(targets)
    if not found:
        checks.no_target(model)
    names = {id(module): name for name, module in model.named_modules()}
    made: dict[str, tuple[Target, nn.Module]] = {}
    seen: set[tuple[object, ...]] = set()
    alive: list[Tensor] = []
    for target in found:
        weight = checks.target_weight(target.module, target.name)
        checks.target_columns(target.name, target.columns)
        # a parametrized weight is a new tensor each time it is read: the same module and name are the same weight too
        parameter = _parameter(target)
        alive.append(parameter)  # that no other gets its id
        same = {(id(parameter), repr(target.columns)), (id(target.module), target.name, repr(target.columns))}
        if same & seen:
            continue
        seen |= same
        path = names.get(id(target.module), type(target.module).__name__)
        name = f"{path}.{target.name}" if path else target.name
        made[_unused(name, made)] = (target, _regularizer(target, weight, settings))
    return Regularization(made)


def _as_targets(targets: Iterable[Target | tuple[nn.Module, str]]) -> list[Target]:
    if not isinstance(targets, Iterable) or isinstance(targets, (str, nn.Module)):
        checks.no_pair(targets)
    found = []
    for target in targets:
        if not isinstance(target, Target):
            if not isinstance(target, (tuple, list)) or len(target) != 2:
                checks.no_pair(target)
            target = Target(*target)
        found.append(target)
    return found


def _search(model: nn.Module) -> list[Target]:
    found = []
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            checks.no_projection(module)
            names = [plain_name(n) for n, _ in module.named_parameters(recurse=False)]
            gates = _GATES["RNN" if module.mode.startswith("RNN") else module.mode]
            found += [Target(module, n, blocks=gates, recurrent=True) for n in names if n.startswith("weight_hh_l")]
        elif isinstance(module, nn.RNNCellBase):
            gates = next(_GATES[c.__name__] for c in type(module).__mro__ if c.__name__ in _GATES)
            found.append(Target(module, "weight_hh", blocks=gates, recurrent=True))
    return found


def _regularizer(target: Target, weight: Tensor, settings: dict[str, Any]) -> ModuliRegularizer:
    blocks = target.blocks
    checks.target_blocks(target.name, weight.shape[0], blocks)
    rows = weight.shape[0] // blocks
    columns = len(range(*(target.columns or slice(None)).indices(weight.shape[1])))
    recurrent = target.recurrent
    if recurrent is None:
        recurrent = rows == columns and (target.columns is not None or target.name.startswith("weight_hh"))
    defaults: dict[str, Any] = {"dtype": compute_dtype(weight), "device": weight.device}
    return ModuliRegularizer(rows, None if recurrent else columns, blocks=blocks, **{**defaults, **settings})


def _unused(name: str, made: dict[str, Any]) -> str:
    candidate, k = name, 1
    while candidate in made or any(candidate.replace(".", "_") == other.replace(".", "_") for other in made):
        k += 1
        candidate = f"{name}#{k}"
    return candidate


def _original(target: Target) -> Tensor | None:
    """The `_orig` parameter that torch.nn.utils.prune keeps a pruned weight in."""
    original = getattr(target.module, original_name(target.name), None)
    return original if isinstance(original, Tensor) else None


def _parameter(target: Target) -> Tensor:
    """The tensor a weight lives in."""
    original = _original(target)
    return getattr(target.module, target.name) if original is None else original


def _read(target: Target) -> Tensor:
    """The weight as it is now; under torch prune orig * mask, which the attribute holds only after a forward."""
    weight = _parameter(target)
    if _original(target) is not None:
        weight = weight * cast(Tensor, get_mask(target.module, target.name)).to(weight.dtype)
    return weight if target.columns is None else weight[:, target.columns]
