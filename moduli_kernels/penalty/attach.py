"""`regularize`: one line that puts the penalty on every recurrent weight of a model."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..distributed import is_sharded
from ..masks import get_mask, original_name, plain_name
from ..reference import compute_dtype
from . import checks, grouped
from .modules import CoefficientRegularizer, ModuliRegularizer

# The gate blocks that the hidden weight of each of torch's recurrent modules stacks in rows.
_GATES = {"RNN": 1, "LSTM": 4, "GRU": 3, "RNNCell": 1, "LSTMCell": 4, "GRUCell": 3}


@dataclass(frozen=True)
class Target:
    """One weight to regularize. `regularize` checks what is given here.

    Args:
        module: the module that owns the weight.
        name: the weight is getattr(module, name), which is read at each call.
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


class Regularization(nn.Module):
    """What `regularize` returns: a module whose call gives the sum of the penalties of its targets.

    Its parameters are the embeddings only: it refers to the model's modules without holding them as submodules.

    reg() -> 0-d tensor; reg.losses() -> {name: 0-d tensor}; reg.items() -> (name, regularizer) pairs; reg.shuffled()
    and reg.matched() -> the controls of all its regularizers.

    Args:
        regularizers: {name: (target, its regularizer)}, which `regularize` makes.
    """

    def __init__(self, regularizers: dict[str, tuple[Target, nn.Module]]):
        super().__init__()
        self._targets = {name: target for name, (target, _) in regularizers.items()}
        self._key = {name: name.replace(".", "_") for name in regularizers}  # module names may not hold dots
        self.regularizers = nn.ModuleDict({self._key[name]: module for name, (_, module) in regularizers.items()})

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """(name of the weight, its regularizer), for each weight."""
        return ((name, self.regularizers[key]) for name, key in self._key.items())

    @property
    def targets(self) -> dict[str, Target]:
        """The regularized weights by name."""
        return dict(self._targets)

    def _penalties(self) -> tuple[Tensor | None, Sequence[Tensor]]:
        """The sum of the penalties, where one launch gives it, else None; and the penalty of each weight."""
        weights = [_read(self._targets[name]) for name in self._key]
        regularizers = cast("list[Any]", list(self.regularizers.values()))
        if not any(map(is_sharded, weights)) and grouped.share_launches(regularizers, weights):
            return grouped.penalties(list(map(grouped.layer_of, regularizers, weights)))  # pyright: ignore[reportReturnType]
        return None, [regularizer(weight) for regularizer, weight in zip(regularizers, weights)]

    def losses(self) -> dict[str, Tensor]:
        """{name of the weight: its penalty}, 0-d and differentiable."""
        return dict(zip(self._key, self._penalties()[1]))

    def forward(self) -> Tensor:
        """The sum of all penalties, 0-d, on the first weight's device."""
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
        """The paper's control: the same regularization with each weight's coefficients permuted at random.

        Args:
            generator: makes the permutations reproducible, which are drawn on its device.
        """
        return self._map(lambda r: r.shuffled(generator))

    def matched(self) -> Regularization:
        """The control without geometry: each weight's coefficients are replaced by their mean."""
        return self._map(lambda r: r.matched())


def regularize(model: nn.Module, targets: Iterable[Target | tuple[nn.Module, str]] | None = None,
               **settings: Any) -> Regularization:
    """Puts the penalty on a model's recurrent weights, and returns a module whose call gives their sum (paper, eq. 6).

    Args:
        model: is searched for torch's RNN, GRU and LSTM (weight_hh_l*, each layer and direction with its own embedding)
            and their cells (weight_hh), subclasses included.
        targets: Targets or (module, name) pairs, in place of the search. The weight of a Linear or a convolution gets
            points for its rows and points for its columns.
        **settings: keyword arguments of ModuliRegularizer, which hold for all weights.

    Weights are read at each call, those that torch.nn.utils.prune has pruned as original times mask. Tied weights count
    once. Points are made on the weight's device, in float64 for float64 weights, else in float32.

    Returns:
        Regularization: reg() is 0-d and differentiable.

    Raises:
        ValueError: there is no matching weight, a name is none of the module's, blocks do not divide the rows, the
            search finds an LSTM with proj_size, or ModuliRegularizer refuses a setting.
        TypeError: model is no nn.Module, targets are neither pairs nor Targets, columns are no slice with step 1, a
            weight is neither dense nor torch.sparse_csr or not floating point, or a setting is unknown.

    Examples:
        >>> reg = mk.regularize(model.rnn, manifold="torus", strength=0.1)
        >>> loss = criterion(model(x), y) + reg()
    """
    checks.model_to_search(model)
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
        # A parametrized weight is a new tensor each time it is read, so module and name tell it as well.
        parameter = parameter_of(target)
        alive.append(parameter)  # so that no other tensor gets its id
        same = {(id(parameter), repr(target.columns)), (id(target.module), target.name, repr(target.columns))}
        if same & seen:
            continue
        seen |= same
        path = names.get(id(target.module), type(target.module).__name__)
        name = f"{path}.{target.name}" if path else target.name
        made[_unused(name, made)] = (target, _regularizer(target, weight, settings))
    return Regularization(made)


def _as_targets(targets: Iterable[Target | tuple[nn.Module, str]]) -> list[Target]:
    """The targets as Targets, made of pairs where pairs are given."""
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
    """The hidden weights of a model's recurrent modules."""
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
    """A regularizer of the size of the target's weight, with new points."""
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
    """The name, with #2, #3, ... behind it where it is taken, also once dots count as underscores."""
    candidate, k = name, 1
    while candidate in made or any(candidate.replace(".", "_") == other.replace(".", "_") for other in made):
        k += 1
        candidate = f"{name}#{k}"
    return candidate


def _original(target: Target) -> Tensor | None:
    """The `_orig` parameter that torch.nn.utils.prune keeps a pruned weight in."""
    original = getattr(target.module, original_name(target.name), None)
    return original if isinstance(original, Tensor) else None


def parameter_of(target: Target) -> Tensor:
    """The tensor that the weight is stored in: torch.nn.utils.prune's `_orig` parameter, else the weight itself."""
    original = _original(target)
    return getattr(target.module, target.name) if original is None else original


def _read(target: Target) -> Tensor:
    """The columns to regularize of the weight as it is now.

    Under torch.nn.utils.prune the attribute is out of date until the module's next forward, so original and mask are
    multiplied here.
    """
    weight = parameter_of(target)
    if _original(target) is not None:
        weight = weight * cast(Tensor, get_mask(target.module, target.name)).to(weight.dtype)
    return weight if target.columns is None else weight[:, target.columns]
