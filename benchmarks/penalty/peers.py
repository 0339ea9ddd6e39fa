"""The contestants: ours, the copy that is the floor, and every form of the formula that a user could run instead.

Each contestant leaves the gradients in `.grad` of its own leaf tensors, where a training loop finds them. The leaves of
all contestants share their storage. Under torch.compile (dynamic=False, one graph or an error) run

    per coordinate      the formula of reference.penalty_formula; forward and backward are compiled apart
    stacked             the same through the (n, n, k) tensor of differences
    joint graph         value and gradients in one graph, by torch.func
    hand-derived        value and gradients written out, so that the compiler may fuse all of it
    symmetric           hand-derived, using that rows and columns share their points: the column sums of dE are row sums
                        of the transpose, dE_i = sum_j (t_ij + t_ji) ds_ij/dx_i. It is one pass that reads W twice
    (acos)              on spheres, the angle as acos of the inner product: fast, but half of the digits are lost near 0
                        and pi
    cached              for frozen points, the (n, n) coefficients are computed once and then multiplied
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moduli_kernels import Constant, Manifold, Product, Sphere, moduli_penalty, reference

from .cases import Case
from .distances import AcosSphere, stacked_squared_distance

# Without CUDA graphs, which return the same memory at every call: .grad must not share it.
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"
Formula = Callable[[Tensor, Tensor], Tensor]
Gradients = tuple[Tensor, ...]
"""The value, dW and, where points are trained, dE."""


@dataclass
class Contestant:
    """After step(), `value`, `weight.grad` and `points.grad` hold what it computed. A floor leaves `value` None."""

    name: str
    kind: str  # "ours", "floor", "compiled", "cached" or "eager"
    weight: Tensor
    points: Tensor
    run: Callable[[Contestant], Tensor | None]
    value: Tensor | None = None
    keeps_grad: bool = False  # whether it adds to a weight.grad that is there already

    def step(self) -> None:
        """Computes once."""
        self.value = self.run(self)

    def release(self) -> None:
        """Drops what the last step computed."""
        self.value = self.points.grad = None
        if not self.keeps_grad:
            self.weight.grad = None


class Peers:
    """Makes the contestants of a case. Compiling happens at their first step."""

    def __init__(self, case: Case, weight: Tensor, points: Tensor):
        self.case, self.weight, self.points = case, weight, points
        self.scale, self.inhibitor = case.scale, case.formula
        self.made: list[Contestant] = []

    def all(self) -> list[Contestant]:
        """Returns ours first, then the floors, then the peers."""
        self._ours()
        self._floors()
        if self.case.peers == "none":
            return self.made
        if self.case.peers == "formula":
            self._autograd("per coordinate", "compiled", compiled(self._formula(self.case.manifold)))
        elif not self.case.gradients:
            self._values()
        elif not self.case.trained:
            self._frozen()
        elif isinstance(self.inhibitor, Constant):
            self._plain_l1()
        else:
            self._trained()
        return self.made

    # --- ours and the floors -----------------------------------------------------------------------------------

    def _ours(self) -> None:
        case = self.case

        def penalty(weight: Tensor, points: Tensor) -> Tensor:
            return moduli_penalty(weight, points, manifold=case.manifold, inhibitor=case.inhibitor)

        self._autograd("ours", "ours", penalty)

    def _floors(self) -> None:
        buffer = torch.empty_like(self.weight)

        def copy(me: Contestant) -> None:
            buffer.copy_(me.weight.detach())

        def clone(me: Contestant) -> None:  # allocates, as a gradient does
            me.weight.grad = me.weight.detach().clone()

        def read(me: Contestant) -> None:
            me.weight.detach().sum()

        self.add("copy into a buffer", "floor", copy)
        if self.case.gradients:
            self.add("clone", "floor", clone)
        else:
            self.add("sum (reads W once)", "floor", read)

    # --- peers -------------------------------------------------------------------------------------------------

    def _trained(self) -> None:
        case = self.case
        self._by_hand("hand-derived, symmetric", "compiled", compiled(self._derived(case.manifold, symmetric=True)))
        if case.peers == "fast":
            return
        self._by_hand("hand-derived", "compiled", compiled(self._derived(case.manifold)))
        self._by_hand("joint graph", "compiled", compiled(self._joint(case.manifold)))
        self._autograd("per coordinate", "compiled", compiled(self._formula(case.manifold)))
        if any(isinstance(factor, Sphere) for factor in case.manifold.factors()):
            acos = _with_acos(case.manifold)
            self._by_hand("hand-derived (acos)", "compiled", compiled(self._derived(acos)))
            self._by_hand("hand-derived, symmetric (acos)", "compiled", compiled(self._derived(acos, symmetric=True)))
        if case.stacked:
            self._autograd("stacked", "compiled", compiled(self._formula(case.manifold, stacked=True)))
        if case.headline:
            tuned = compiled(self._derived(case.manifold, symmetric=True), mode=MAX_AUTOTUNE)
            self._by_hand("hand-derived, symmetric (max-autotune)", "compiled", tuned)
            self._autograd("eager formula", "eager", self._formula(case.manifold))
            # The authors' scripts hold all differences, the distances, f and f |W| as tensors in memory.
            self._autograd("authors' procedure", "eager", self._formula(case.manifold, stacked=True))

    def _plain_l1(self) -> None:
        """Adds the peers for a constant f, which needs no distance and gives the points no gradient."""
        scale = self.scale * self.inhibitor.c * self.case.grad_output
        nothing = torch.zeros_like(self.points)

        def l1(weight: Tensor, points: Tensor) -> Tensor:
            return scale * weight.abs().sum() + (0 * points).sum()

        def derived(weight: Tensor, points: Tensor) -> Gradients:
            return scale * weight.abs().sum(), scale * torch.sign(weight), nothing

        self._autograd("plain L1", "compiled", compiled(l1))
        self._by_hand("plain L1, hand-derived", "compiled", compiled(derived))
        self._autograd("plain L1, eager", "eager", l1)

    def _frozen(self) -> None:
        case, scale = self.case, self.scale * self.case.grad_output
        coefficients = self.inhibitor.from_squared(case.manifold.squared_distance(self.points, self.points))

        def cached(weight: Tensor, points: Tensor) -> Tensor:
            return self.scale * (coefficients * weight.abs()).sum()

        def derived(weight: Tensor, points: Tensor) -> Gradients:
            return scale * (coefficients * weight.abs()).sum(), scale * coefficients * torch.sign(weight)

        self._autograd("cached", "cached", compiled(cached))
        self._by_hand("cached, hand-derived", "cached", compiled(derived))
        if case.headline:
            self._by_hand("cached, hand-derived (max-autotune)", "cached", compiled(derived, mode=MAX_AUTOTUNE))
            self._autograd("cached, eager", "eager", cached)
            self._autograd("per coordinate", "compiled", compiled(self._formula(case.manifold)))
            self._by_hand("hand-derived", "compiled", compiled(self._derived(case.manifold)))

    def _values(self) -> None:
        manifold = self.case.manifold
        self._autograd("per coordinate", "compiled", compiled(self._formula(manifold)))
        self._autograd("stacked", "compiled", compiled(self._formula(manifold, stacked=True)))

    # --- forms of the formula ----------------------------------------------------------------------------------

    def _formula(self, manifold: Manifold, stacked: bool = False) -> Formula:
        what = reference.Penalty(manifold, self.inhibitor, 1.0, 1, self.scale)
        if not stacked:
            return lambda weight, points: reference.penalty_formula(weight, points, None, None, what)

        def formula(weight: Tensor, points: Tensor) -> Tensor:
            f = self.inhibitor.from_squared(stacked_squared_distance(manifold, points, points))
            return self.scale * (f * weight.abs()).sum()

        return formula

    def _joint(self, manifold: Manifold) -> Callable[[Tensor, Tensor], Gradients]:
        formula, grad_output = self._formula(manifold), self.case.grad_output
        differentiated = torch.func.grad_and_value(lambda w, p: grad_output * formula(w, p), argnums=(0, 1))

        def joint(weight: Tensor, points: Tensor) -> Gradients:
            grads, value = differentiated(weight, points)
            return value, *grads

        return joint

    def _derived(self, manifold: Manifold, symmetric: bool = False) -> Callable[[Tensor, Tensor], Gradients]:
        inhibitor, trained, scale = self.inhibitor, self.case.trained, self.scale * self.case.grad_output

        def derived(weight: Tensor, points: Tensor) -> Gradients:
            s = manifold.squared_distance(points, points)
            f, a = inhibitor.from_squared(s), weight.abs()
            value, dweight = scale * (f * a).sum(), scale * f * torch.sign(weight)
            if not trained:
                return value, dweight
            slope = scale * inhibitor.slope(s)
            if symmetric:
                return value, dweight, manifold.pull_back(points, points, slope * (a + a.T))[0]
            rows, cols = manifold.pull_back(points, points, slope * a)
            return value, dweight, rows + cols

        return derived

    # --- how a form becomes a contestant -----------------------------------------------------------------------

    def add(self, name: str, kind: str, run: Callable[[Contestant], Tensor | None]) -> None:
        """Adds a contestant with leaves of its own."""
        need = self.case.gradients
        weight = self.weight.detach().requires_grad_(need)
        points = self.points.detach().requires_grad_(need and self.case.trained)
        self.made.append(Contestant(name, kind, weight, points, run))

    def _autograd(self, name: str, kind: str, formula: Formula) -> None:
        grad = None if self.case.grad_output == 1.0 else torch.tensor(self.case.grad_output, device=self.weight.device)

        def run(me: Contestant) -> Tensor:
            value = formula(me.weight, me.points)
            if me.weight.requires_grad:
                value.backward(grad)
            return value.detach()

        self.add(name, kind, run)

    def _by_hand(self, name: str, kind: str, derived: Callable[[Tensor, Tensor], Gradients]) -> None:
        """Adds a form that returns gradients with the value, without autograd. All of it carries grad_output."""
        points, grad_output = self.points, self.case.grad_output

        def run(me: Contestant) -> Tensor:
            value, *grads = derived(me.weight.detach(), points)
            for leaf, grad in zip((me.weight, me.points), grads):
                leaf.grad = grad
            return value if grad_output == 1.0 else value / grad_output

        self.add(name, kind, run)


def compiled(function: Callable, mode: str = "default") -> Callable:
    """Compiles a form, as one graph for these shapes."""
    return torch.compile(function, dynamic=False, fullgraph=True, mode=mode)


def _with_acos(manifold: Manifold) -> Manifold:
    """Returns the manifold with its spheres replaced by AcosSphere."""
    factors = [AcosSphere(f.dim, f.radius) if isinstance(f, Sphere) else f for f in manifold.factors()]
    return factors[0] if len(factors) == 1 else Product(*factors)
