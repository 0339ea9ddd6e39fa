"""`regularize`: one line that puts the penalty on every recurrent weight of a model."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..distributed import is_sharded
from ..geometry.base import Inhibitor, Manifold
from ..masks import origin, parameters_behind
from ..models import recurrent_weights
from ..reference import compute_dtype
from . import checks, grouped
from .modules import CoefficientRegularizer, ModuliRegularizer, Regularizer
from .places import Place, Target, check_weight


class Regularization(nn.Module):
    """What `regularize` returns: a module whose call gives the sum of the penalties of its targets.

    reg() -> 0-d tensor; reg.losses() -> {name: 0-d tensor}; reg.items() -> (name, regularizer) pairs; reg.strength sets
    and gives the strength of all; reg.suggest(loss) -> a strength; reg.reset_parameters() draws all points again;
    reg.shuffled() and reg.matched() -> the controls of all its regularizers.

    Its parameters are the embeddings only. It refers to the model without holding it:

    - A module of the model that is replaced is noticed at the next call. A new one that has the very same Parameters
      (SparseRNN.from_rnn) is followed, as is a module that has another place in the model; any other is an error.
    - copy.deepcopy((model, reg)) and a pickle of (model, reg) are about the copied model. A copy of the regularization
      alone is about no model: calling it is an error that says so. `regularize` makes one for another model.

    Args:
        regularizers: {name: (place of the weight, its regularizer)}, which `regularize` makes.
    """

    def __init__(self, regularizers: dict[str, tuple[Place, nn.Module]]):
        super().__init__()
        self._places = {name: place for name, (place, _) in regularizers.items()}
        self._key = {name: name.replace(".", "_") for name in regularizers}  # module names may not hold dots
        self.regularizers = nn.ModuleDict({self._key[name]: module for name, (_, module) in regularizers.items()})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_places": {name: place.kept() for name, place in self._places.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        targets = state.pop("_targets", {})  # as 0.1.0 kept the places
        super().__setstate__(state)
        self._places = {name: Place.restored(kept) for name, kept in state.get("_places", {}).items()}
        self._places |= {name: Place(target, None, None, name) for name, target in targets.items()}

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """(name of the weight, its regularizer), for each weight. A name is the path in the model and the weight's own
        name, such as rnn.weight_hh_l0."""
        return ((name, self.regularizers[key]) for name, key in self._key.items())

    @property
    def targets(self) -> dict[str, Target]:
        """The regularized weights by name.

        Raises:
            ValueError: a module was replaced, or the model is gone.
        """
        return {name: place.target() for name, place in self._places.items()}

    @property
    def strength(self) -> float:
        """The strength lambda of all weights, at least 0; setting it sets each regularizer's.

        It may be set at any time: a compiled step is compiled once more at the first change, and serves all values from
        then on. Set it outside of the compiled function, since torch 2.10 would take it over at the function's end
        only. A weight's own strength is that of its regularizer in `items()`. It is part of the state dict.

        Raises:
            ValueError: on reading it, where weights have different strengths; on setting it, a value that is negative
                or not finite.
        """
        found = {name: cast(Regularizer, r).strength for name, r in self.items()}
        if len(set(found.values())) > 1:
            checks.several_strengths(found)
        return next(iter(found.values()))

    @strength.setter
    def strength(self, value: float) -> None:
        value = checks.strength(value)
        for _, regularizer in self.items():
            cast(Regularizer, regularizer).strength = value

    def suggest(self, loss: Tensor, share: float = 0.1) -> float:
        """A strength at which the penalty's gradient is a given share of the loss's, by their norms.

            share * |d loss / d W| / |d penalty / d W|,   the penalty at strength 1,

        with |.| the L2 norm over all regularized weights W together (the Parameters behind them). The result is for
        `reg.strength`, all weights having the same; it is a start, to be tried at half and twice the value. Where in
        training the loss stands matters: its gradient is largest at the start.

        Args:
            loss: 0-d, with a graph to the weights, and without the penalty. Its graph stays, so that loss.backward()
                works afterwards; no `.grad` is touched.
            share: positive. At 0.1 the loss leads and the penalty shapes what the loss leaves open.

        Raises:
            TypeError: loss is no tensor, or share is no number.
            ValueError: loss is not 0-d, has no graph or does not depend on a regularized weight; share is not positive;
                or the penalty has no gradient, as where all weights are 0.
        """
        share = checks.share_and_loss(share, loss)
        parameters = list({id(p): p for place in self._places.values() for p in parameters_behind(
            place.target().module, place.name) if p.requires_grad}.values())
        pulls = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) if parameters else ()
        with torch.enable_grad():
            unit = self._sum([cast(Any, r).penalty(self._places[name].read(), 1.0) for name, r in self.items()])
        own = torch.autograd.grad(unit, parameters, allow_unused=True) if unit.requires_grad and parameters else ()
        return share * checks.norms(_norm(pulls), _norm(own))

    def _penalties(self) -> tuple[Tensor | None, Sequence[Tensor]]:
        """The sum of the penalties, where one launch gives it, else None; and the penalty of each weight."""
        if torch.compiler.is_compiling() and self._holds_rnns() and not torch._dynamo.config.allow_rnn:
            torch._dynamo.graph_break(msg=checks.ALLOW_RNN)
        weights = [place.read() for place in self._places.values()]
        regularizers = cast("list[Any]", list(self.regularizers.values()))
        if not any(map(is_sharded, weights)) and grouped.share_launches(regularizers, weights):
            return grouped.penalties(list(map(grouped.layer_of, regularizers, weights)))  # pyright: ignore[reportReturnType]
        return None, [regularizer(weight) for regularizer, weight in zip(regularizers, weights)]

    def _holds_rnns(self) -> bool:
        return any(place.is_rnn for place in self._places.values())

    def losses(self) -> dict[str, Tensor]:
        """{name of the weight: its penalty}, 0-d and differentiable. Errors are those of a call."""
        return dict(zip(self._key, self._penalties()[1]))

    def forward(self, *unexpected: Any) -> Tensor:
        """The sum of all penalties, 0-d, on the first weight's device.

        Raises:
            TypeError: an argument is given; the weights are those of the model.
            ValueError: a module was replaced, or the model is gone.
        """
        if unexpected:
            checks.no_argument(unexpected[0])
        total, each = self._penalties()
        return self._sum(each) if total is None else total

    @staticmethod
    def _sum(losses: Sequence[Tensor]) -> Tensor:
        first, *others = losses
        for loss in others:
            first = first + loss.to(first.device)
        return first

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the points of all weights again, in place, one weight after the other. See `ModuliRegularizer`.

        Args:
            generator: makes the points reproducible. None: torch's own.

        Raises:
            TypeError: this is a control, whose coefficients are no points.
        """
        for name, regularizer in self.items():
            if not isinstance(regularizer, ModuliRegularizer):
                checks.no_points(name, regularizer)
            regularizer.reset_parameters(generator)

    def _map(self, make: Callable[[ModuliRegularizer], CoefficientRegularizer]) -> Regularization:
        return Regularization(
            {name: (self._places[name], make(cast(ModuliRegularizer, r))) for name, r in self.items()})

    def shuffled(self, generator: torch.Generator | None = None) -> Regularization:
        """The paper's control: the same regularization with each weight's coefficients permuted at random.

        Args:
            generator: makes the permutations reproducible, which are drawn on its device.
        """
        return self._map(lambda r: r.shuffled(generator))

    def matched(self) -> Regularization:
        """The control without geometry: each weight's coefficients are replaced by their mean."""
        return self._map(lambda r: r.matched())

    def extra_repr(self) -> str:
        gone = [name for name, place in self._places.items() if not place.is_there()]
        return f"weights: {', '.join(self._key)}" + (f"; not found any more: {', '.join(gone)}" if gone else "")


def _norm(gradients: Sequence[Tensor | None]) -> float:
    """The L2 norm over all gradients together."""
    squares = [g.detach().double().square().sum().item() for g in gradients if g is not None]
    return sum(squares) ** 0.5


def regularize(
    model: nn.Module, targets: Iterable[Target | tuple[nn.Module, str]] | None = None, *,
    manifold: Manifold | str = "torus", inhibitor: Inhibitor | Callable[[Tensor], Tensor] | None = None,
    power: float = 1.0, reduction: str = "mean", strength: float = 0.1, trainable: bool = False,
    generator: torch.Generator | None = None, dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Regularization:
    """Puts the penalty on a model's recurrent weights, and returns a module whose call gives their sum (paper, eq. 6).

    Args:
        model: is searched for torch's RNN, GRU and LSTM (weight_hh_l*, each layer and direction with its own embedding)
            and their cells (weight_hh), subclasses included. It is not kept alive.
        targets: Targets or (module, name) pairs, in place of the search. The weight of a Linear or a convolution gets
            points for its rows and points for its columns.
        manifold: a Manifold or a preset's name.
        inhibitor: f. None: DifferenceOfGaussians(). A bare callable d -> f(d) works as well.
        power: l, at least 1.
        reduction: "mean" over entries, or "sum" (eq. 6), which is as many times stronger as a weight has entries.
        strength: lambda, at least 0 and finite. The default is the paper's for navigation and the language model; 0.001
            to 0.1 is usual with "mean". `reg.strength` changes it, and `reg.suggest(loss)` computes one.
        trainable: whether the points are trained; give reg.parameters() to the optimizer then, without weight decay.
        generator: makes the points reproducible.
        dtype: the dtype of the points. None: float64 for float64 weights, else float32.
        device: the device of the points. None: each weight's own.

    Weights are read at each call as the module's forward pass uses them: behind torch.nn.utils.parametrize and the
    older spectral_norm and weight_norm, pruned by torch.nn.utils.prune, masked. Weights that are one tensor count once,
    and it is an error of a later call where they are one Parameter no more.

    Returns:
        Regularization: reg() is 0-d and differentiable.

    Raises:
        ValueError: there is no matching weight, a name is none of the module's, something unknown writes the weight,
            blocks do not divide the rows, the search finds an LSTM with proj_size, or ModuliRegularizer refuses a
            setting.
        TypeError: model is no nn.Module, targets are neither pairs nor Targets, columns are no slice with step 1, a
            weight is neither dense nor torch.sparse_csr or not floating point, or a setting is unknown.

    Examples:
        >>> reg = mk.regularize(model, manifold="torus", strength=0.1)
        >>> loss = criterion(model(x), y) + reg()
    """
    checks.model_to_search(model)
    found = _search(model) if targets is None else _as_targets(targets)
    if not found:
        checks.no_target(model)
    settings = {"manifold": manifold, "inhibitor": inhibitor, "power": power, "reduction": reduction,
                "strength": strength, "trainable": trainable, "generator": generator}
    names = {id(module): name for name, module in model.named_modules()}
    made: dict[str, tuple[Place, nn.Module]] = {}
    seen: list[tuple[_Seen, Place]] = []
    for target in found:
        weight = check_weight(target)
        checks.target_columns(target.name, target.columns)
        here = _Seen(target, weight)
        path = names.get(id(target.module))
        title = type(target.module).__name__ if path is None else path
        name = f"{title}.{target.name}" if title else target.name
        first = next((place for other, place in seen if here.is_tied_to(other)), None)
        if first is not None:
            first.tie(Place(target, model, path, name))
            continue
        name = _unused(name, made)
        place = Place(target, model, path, name)
        seen.append((here, place))
        points = {"dtype": dtype or compute_dtype(weight), "device": weight.device if device is None else device}
        made[name] = (place, _regularizer(target, weight, {**settings, **points}))
    return Regularization(made)


class _Seen:
    """A weight that `regularize` has come across, which another may be tied to.

    The weight is held, so that no other tensor gets its memory while more are looked at.
    """

    def __init__(self, target: Target, weight: Tensor):
        module, name = target.module, target.name
        self.weight, self.module, self.name = weight, module, name
        self.columns = range(weight.shape[1])[target.columns or slice(None)]
        self.behind = [id(p) for p in parameters_behind(module, name)]
        self.origin = origin(module, name)

    def is_tied_to(self, other: _Seen) -> bool:
        """Whether both are the same columns of one weight: of one module, Parameter or tensor in memory, or computed in
        the same way from the same Parameters."""
        if self.columns != other.columns or self.weight.shape != other.weight.shape:
            return False
        if self.module is other.module and self.name == other.name or _same_memory(self.weight, other.weight):
            return True
        if not self.behind or self.behind != other.behind:
            return False
        stored = ("parameter", "pruned by torch")
        if self.origin in stored and other.origin in stored:
            return True
        return self.origin == other.origin and (self.weight.is_meta or torch.equal(self.weight, other.weight))


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, or have all their entries at the same places of the memory."""
    if a is b:
        return True
    if a.layout != torch.strided or b.layout != torch.strided or a.is_meta or b.is_meta or not a.numel():
        return False
    if is_sharded(a) or is_sharded(b):
        return False
    return (a.device, a.data_ptr(), a.stride(), a.dtype) == (b.device, b.data_ptr(), b.stride(), b.dtype)


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
    found = recurrent_weights(model)
    for weight in found:
        checks.no_projection(weight.module)
    return [Target(weight.module, weight.name, blocks=weight.blocks, recurrent=True) for weight in found]


def _regularizer(target: Target, weight: Tensor, settings: dict[str, Any]) -> ModuliRegularizer:
    """A regularizer of the size of the target's weight, with new points."""
    blocks = target.blocks
    checks.target_blocks(target.name, weight.shape[0], blocks)
    rows = weight.shape[0] // blocks
    columns = len(range(weight.shape[1])[target.columns or slice(None)])
    recurrent = target.recurrent
    if recurrent is None:
        recurrent = rows == columns and (target.columns is not None or target.name.startswith("weight_hh"))
    return ModuliRegularizer(rows, None if recurrent else columns, blocks=blocks, **settings)


def _unused(name: str, made: dict[str, Any]) -> str:
    """The name, with #2, #3, ... behind it where it is taken, also once dots count as underscores."""
    candidate, k = name, 1
    while candidate in made or any(candidate.replace(".", "_") == other.replace(".", "_") for other in made):
        k += 1
        candidate = f"{name}#{k}"
    return candidate
