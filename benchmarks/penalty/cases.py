"""The cases of the penalty on the CPU, and the goals they are to reach."""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from moduli_kernels import (
    Constant,
    DifferenceOfGaussians,
    Diffusion,
    Inhibitor,
    Manifold,
    RickerWavelet,
    Sinusoid,
    TabulatedInhibitor,
    manifold as preset,
)
from moduli_kernels.geometry.maths import sqrt_of_square


@dataclass(frozen=True)
class DampedCosine(Inhibitor):
    """The function of the tabulated case, f(d) = c (1 - cos(mu d) exp(-s/sigma)) with s = d^2.

    It is no built-in inhibitor. The peers compute the formula; ours reads a table of it.
    """

    c: float = 50.0
    mu: float = 2.0
    sigma: float = 8.0

    def from_squared(self, s: Tensor) -> Tensor:
        return self.c * (1 - torch.cos(self.mu * sqrt_of_square(s)) * torch.exp(-s / self.sigma))

    def slope(self, s: Tensor) -> Tensor:
        d = sqrt_of_square(s)
        per_phase = self.mu**2 / 2 * torch.sinc(self.mu / torch.pi * d)  # -d cos(mu d)/ds
        return self.c * (per_phase + torch.cos(self.mu * d) / self.sigma) * torch.exp(-s / self.sigma)


INHIBITORS: dict[str, Inhibitor] = {
    "dog": DifferenceOfGaussians(),
    "diffusion": Diffusion(),
    "sinusoid": Sinusoid(),
    "ricker": RickerWavelet(),
    "constant": Constant(),
    "tabulated": TabulatedInhibitor(DampedCosine(), max_distance=8.0),  # the torus reaches 7.07
}


@dataclass(frozen=True)
class Case:
    """One contest. The weight is (n, n) float32; rows and columns share their points.

    Attributes:
        peers: which forms take part. "all"; "fast", those that come near being fastest, for the sweep and variants;
            "formula", the formula under torch.compile alone; or "none".
        gradients: whether gradients are computed, or the value alone.
        release: whether the previous gradient is dropped inside the timed region, as optimizer.zero_grad() does.
        allocators: the settings of malloc under which the case is run (see conftest.py).
        seed: of weight and points. With 0, two of 2048 points on the torus are exactly half a period apart, where
            forms that are equally right give different gradients.
    """

    name: str
    manifold_name: str
    inhibitor_name: str
    n: int
    trained: bool
    peers: str = "all"
    gradients: bool = True
    grad_output: float = 1.0
    release: bool = False
    allocators: tuple[str, ...] = ("retained",)
    seed: int = 1

    @property
    def manifold(self) -> Manifold:
        return preset(self.manifold_name)

    @property
    def inhibitor(self) -> Inhibitor:
        """The inhibitor that our op is given."""
        return INHIBITORS[self.inhibitor_name]

    @property
    def formula(self) -> Inhibitor:
        """The inhibitor that the peers compute."""
        return DampedCosine() if self.inhibitor_name == "tabulated" else self.inhibitor

    @property
    def headline(self) -> bool:
        """Whether the slowest forms and max-autotune are measured too."""
        return (self.manifold_name, self.inhibitor_name, self.peers) == ("torus", "dog", "all")

    @property
    def stacked(self) -> bool:
        """Whether the form with (n, n, k) differences is measured, the slowest to compile on a CPU."""
        return self.headline

    @property
    def accuracy(self) -> dict[str, float]:
        """The largest relative errors with which ours is timed, gradients in norm."""
        return ACCURACY_GOALS

    @property
    def scale(self) -> float:
        """The factor before the sum: a mean over entries with strength 1."""
        return 1.0 / self.n**2

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Draws weight (n, n) and points (n, k)."""
        generator = torch.Generator().manual_seed(self.seed)
        weight = torch.randn(self.n, self.n, generator=generator) / self.n**0.5
        return weight, self.manifold.sample(self.n, generator=generator)

    def rounds(self, quick: bool) -> int:
        """Returns how many rounds the case takes."""
        return 3 if quick else 300 if self.n <= 512 else 150 if self.n <= 1024 else 21 if self.n <= 4096 else 15

    def smaller(self) -> Case:
        """Returns the same case at a size that shows in seconds whether everything works."""
        return dataclasses.replace(self, n=max(65, self.n // 16))


BOTH = ("retained", "default")
MANIFOLDS = ("sphere", "klein", "torus6", "circle", "r3", "s3", "mixed")
SWEEP = (128, 256, 512, 1024, 2048, 8192)  # 4096 is measured with all peers


def _torus(n: int, trained: bool, suffix: str = "", **options) -> Case:
    name = f"torus-dog-{n}-{'trained' if trained else 'frozen'}{suffix}"
    return Case(name, "torus", "dog", n, trained, **options)


CASES: tuple[Case, ...] = (
    _torus(4096, True, allocators=BOTH),
    _torus(4096, False, allocators=BOTH),
    _torus(650, True, allocators=BOTH),
    _torus(650, False, allocators=BOTH),
    _torus(4096, True, "-zero_grad", peers="fast", release=True, allocators=BOTH),
    _torus(4096, False, "-zero_grad", peers="fast", release=True, allocators=BOTH),
    _torus(4096, True, "-scaled", peers="fast", grad_output=0.5),
    _torus(4096, True, "-value", peers="fast", gradients=False),
    *(Case(f"{m}-dog-2048-trained", m, "dog", 2048, True) for m in MANIFOLDS),
    *(Case(f"torus-{f}-2048-trained", "torus", f, 2048, True) for f in INHIBITORS if f != "dog"),
    Case("circle-diffusion-2048-trained", "circle", "diffusion", 2048, True),
    *(_torus(n, trained, peers="fast") for n in SWEEP for trained in (True, False)),
)


@dataclass(frozen=True)
class Goal:
    """The ratio that a case is to reach.

    Ours is to be `ratio` times faster than the fastest of `against`. Where that is the copy, ours is to take at most
    `ratio` times its time.
    """

    case: str
    label: str
    against: str
    ratio: float

    def opponents(self, contestants: list[dict]) -> list[dict]:
        """Returns the contestants of a record that ours is compared with."""
        if self.against == "fastest compiled form":
            return [one for one in contestants if one["kind"] == "compiled"]
        return [one for one in contestants if one["name"] == self.against]

    @property
    def at_most(self) -> bool:
        """Whether the ratio is an upper bound on our time."""
        return self.against == "copy into a buffer"


def _goals() -> tuple[Goal, ...]:
    fastest = "fastest compiled form"
    goals = []
    for n, trained, frozen in ((4096, 12.0, 3.0), (650, 6.0, 1.0)):
        case, label = f"torus-dog-{n}-", f"n = {n}, torus + DoG, "
        goals.append(Goal(case + "trained", label + "trained points", fastest, trained))
        if n == 4096:
            goals.append(Goal(case + "trained", label + "trained points", "copy into a buffer", 2.0))
        # The second opponent is stricter than a user's code: it has no autograd and reads W once.
        goals += [Goal(case + "frozen", label + "frozen points", against, frozen)
                  for against in ("cached", "cached, hand-derived")]
    eased = {("circle", "diffusion"): 3.0, ("torus", "constant"): 1.5}
    for case in CASES:
        if case.n == 2048 and case.peers == "all":
            pair = (case.manifold_name, case.inhibitor_name)
            label = f"n = 2048, {pair[0]} + {pair[1]}, trained points"
            goals.append(Goal(case.name, label, fastest, eased.get(pair, 10.0)))
    return tuple(goals)


GOALS = _goals()
MEMORY_GOAL = 0.01  # memory beyond W and its gradients, as a share of W, for each column of a point
ACCURACY_GOALS = {"value": 1e-6, "weight": 1e-5, "points": 1e-5}  # relative errors in float32; gradients in norm
