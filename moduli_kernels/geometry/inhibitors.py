"""Inhibitors a user picks: f(d) >= 0, the cost of a connection between neurons at geodesic distance d.

Frozen dataclasses, callable on distances. Inside the penalty they are used through the SQUARED distance s = d^2:
`from_squared(s)` = f(sqrt s) and `slope(s)` = df/ds, finite everywhere (where df/ds diverges at s = 0 the value
taken there is 0). The compiled kernels hold the same formulas (csrc/inhibitor.h).
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks
from .manifolds import sqrt_of_square


def _floating(d: Tensor | float) -> Tensor:
    d = torch.as_tensor(d)
    return d if d.is_floating_point() else d.to(torch.get_default_dtype())


def _power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent for x >= 0, without pow where the exponent is a small integer or a half."""
    if exponent == 0:
        return torch.ones_like(x)
    if exponent == 1:
        return x
    if exponent == 0.5:
        return torch.sqrt(x)
    return x.square() if exponent == 2 else x.pow(exponent)


class Inhibitor:
    """Base class of the built-in inhibitors."""

    trainable: ClassVar[bool] = True
    """False where f is monotone: a trained embedding then collapses to a point (or, f constant, never moves)."""

    def __call__(self, d: Tensor) -> Tensor:
        """f(d) of distances d >= 0, elementwise; differentiable."""
        return self.from_squared(_floating(d).square())

    def from_squared(self, s: Tensor) -> Tensor:
        """f as a function of s = d^2, elementwise."""
        raise NotImplementedError

    def slope(self, s: Tensor) -> Tensor:
        """df/ds, elementwise."""
        raise NotImplementedError


@dataclass(frozen=True)
class DifferenceOfGaussians(Inhibitor):
    """The experiments' default (paper, App. E, eq. 7).

        f(d) = offset - c (exp(-d^2/sigma2) - exp(-d^2/sigma1))
        df/ds = c (exp(-s/sigma2)/sigma2 - exp(-s/sigma1)/sigma1)

    offset = c in the paper's equation 7; with `zero_min` it is the maximum of the difference, so that the cheapest
    distance, d^2 = ln(sigma2/sigma1) / (1/sigma1 - 1/sigma2), costs 0 (the authors' code).

    Args:
        c: the height, positive; in the unit of f.
        sigma1: of the narrow Gaussian, positive. As the paper's, it divides d^2 and is a squared length.
        sigma2: of the wide Gaussian, likewise; sigma1 < sigma2.
        zero_min: the cheapest distance costs 0; else offset = c.

    Raises:
        ValueError: c, sigma1 or sigma2 is not positive or not finite, or sigma1 >= sigma2.
        TypeError: c, sigma1 or sigma2 is no number.
    """

    c: float = 100.0
    sigma1: float = 0.25
    sigma2: float = 5.0
    zero_min: bool = True

    def __post_init__(self):
        for name in ("c", "sigma1", "sigma2"):
            checks.positive(name, getattr(self, name))
        checks.ordered_sigmas(self.sigma1, self.sigma2)

    @property
    def offset(self) -> float:
        """c, or with `zero_min` the maximum of c (exp(-d^2/sigma2) - exp(-d^2/sigma1)) over d: then min f = 0."""
        if not self.zero_min:
            return self.c
        s = math.log(self.sigma2 / self.sigma1) / (1 / self.sigma1 - 1 / self.sigma2)
        return self.c * (math.exp(-s / self.sigma2) - math.exp(-s / self.sigma1))

    def from_squared(self, s: Tensor) -> Tensor:
        return self.offset - self.c * (torch.exp(-s / self.sigma2) - torch.exp(-s / self.sigma1))

    def slope(self, s: Tensor) -> Tensor:
        wide, narrow = torch.exp(-s / self.sigma2), torch.exp(-s / self.sigma1)
        return (self.c / self.sigma2) * wide - (self.c / self.sigma1) * narrow


@dataclass(frozen=True)
class Diffusion(Inhibitor):
    """A cost that grows with the distance (paper, App. E, eq. 7-8):

        f(d) = c d^exponent,   df/ds = c (exponent/2) s^(exponent/2 - 1),

    the slope taken as 0 at s = 0 where it diverges (exponent < 2). Monotone: not for trained embeddings.

    Args:
        c: the cost at distance 1, positive.
        exponent: positive.

    Raises:
        ValueError: c or exponent is not positive or not finite.
        TypeError: c or exponent is no number.
    """

    c: float = 1.0
    exponent: float = 2.0
    trainable: ClassVar[bool] = False

    def __post_init__(self):
        checks.positive("c", self.c)
        checks.positive("exponent", self.exponent)

    def from_squared(self, s: Tensor) -> Tensor:
        zero = s == 0  # no derivative there for exponent < 2: autograd sees none
        return self.c * torch.where(zero, s, _power(torch.where(zero, torch.ones_like(s), s), self.exponent / 2))

    def slope(self, s: Tensor) -> Tensor:
        zero = (s == 0) & (self.exponent < 2)
        slope = self.c * (self.exponent / 2) * _power(torch.where(zero, torch.ones_like(s), s), self.exponent / 2 - 1)
        return torch.where(zero, torch.zeros_like(s), torch.where(torch.isnan(s), s, slope))


@dataclass(frozen=True)
class Sinusoid(Inhibitor):
    """A cost that is periodic in the distance (paper, App. E, eq. 7-8):

        f(d) = c + c cos(mu d),   df/ds = -(c mu^2/2) sin(mu d)/(mu d),

    the slope -c mu^2/2 at d = 0.

    Args:
        c: half of the largest cost, positive.
        mu: radians a unit of distance, positive.

    Raises:
        ValueError: c or mu is not positive or not finite.
        TypeError: c or mu is no number.
    """

    c: float = 10.0
    mu: float = 2.0

    def __post_init__(self):
        checks.positive("c", self.c)
        checks.positive("mu", self.mu)

    def from_squared(self, s: Tensor) -> Tensor:
        return self.c + self.c * torch.cos(self.mu * sqrt_of_square(s))

    def slope(self, s: Tensor) -> Tensor:
        return (-self.c * self.mu**2 / 2) * torch.sinc(self.mu / math.pi * sqrt_of_square(s))


@dataclass(frozen=True)
class RickerWavelet(Inhibitor):
    """The Ricker wavelet, upside down (paper, App. E, eq. 7-8):

        psi(d) = A (1 - u) exp(-u/2),   u = d^2/sigma^2,   A = 2/sqrt(3 sigma sqrt(pi)),
        f(d) = c (psi(0) - psi(d)),   df/ds = c A (3 - u) exp(-u/2) / (2 sigma^2).

    Distance 0 costs nothing, d = sqrt(3) sigma costs most.

    Args:
        sigma: the width, positive; a length, in the manifold's unit.
        c: a factor, positive.

    Raises:
        ValueError: sigma or c is not positive or not finite.
        TypeError: sigma or c is no number.
    """

    sigma: float = 1.0
    c: float = 1.0

    def __post_init__(self):
        checks.positive("sigma", self.sigma)
        checks.positive("c", self.c)

    @property
    def peak(self) -> float:
        """A = psi(0)."""
        return 2 / math.sqrt(3 * self.sigma * math.sqrt(math.pi))

    def from_squared(self, s: Tensor) -> Tensor:
        u = s / self.sigma**2
        return self.c * self.peak * (1 - (1 - u) * torch.exp(-u / 2))

    def slope(self, s: Tensor) -> Tensor:
        u = s / self.sigma**2
        return (self.c * self.peak / (2 * self.sigma**2)) * (3 - u) * torch.exp(-u / 2)


@dataclass(frozen=True)
class Constant(Inhibitor):
    """f(d) = c: the penalty is plain L_l. A non-finite point still makes it NaN.

    Args:
        c: the cost at every distance, positive.

    Raises:
        ValueError: c is not positive or not finite.
        TypeError: c is no number.
    """

    c: float = 1.0
    trainable: ClassVar[bool] = False

    def __post_init__(self):
        checks.positive("c", self.c)

    def from_squared(self, s: Tensor) -> Tensor:
        return torch.where(torch.isnan(s), s, torch.full_like(s, self.c))

    def slope(self, s: Tensor) -> Tensor:
        return torch.where(torch.isnan(s), s, torch.zeros_like(s))


@dataclass(frozen=True)
class TabulatedInhibitor(Inhibitor):
    """Any smooth f at full speed on every backend: the cubic Hermite interpolant of f, sampled at `samples`
    equidistant distances in [0, max_distance], with slopes by sixth-order finite differences; constant beyond
    max_distance. With x = d (samples - 1)/max_distance, i = floor(x), t = x - i and node values v and slopes m

        f(d) = v_i h00(t) + m_i h10(t) + v_i+1 h01(t) + m_i+1 h11(t),   df/ds = f'(d) / (2 d), taken as 0 at d = 0.

    Two tables are equal when max_distance and samples are, and the values of f there.

    Args:
        f: callable on a float64 tensor of distances, elementwise; only its samples are kept.
        max_distance: positive, best at least the manifold's diameter.
        samples: how many distances f is asked for, at least 8.

    Raises:
        ValueError: max_distance is not positive or not finite, samples < 8, f is not finite on [0, max_distance].
        TypeError: max_distance is no number, samples no integer.
    """

    f: InitVar[Callable[[Tensor], Tensor]]
    max_distance: float
    samples: int = 4096
    values: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self, f: Callable[[Tensor], Tensor]):
        checks.positive("max_distance", self.max_distance)
        checks.positive_int("samples", self.samples, minimum=8)
        d = torch.linspace(0, self.max_distance, self.samples, dtype=torch.float64)
        values = torch.as_tensor(f(d), dtype=torch.float64).detach().expand(self.samples)
        checks.table_values(values)
        object.__setattr__(self, "values", tuple(values.tolist()))
        steps = values.diff()
        object.__setattr__(self, "trainable", not bool((steps >= 0).all() or (steps <= 0).all()))

    @classmethod
    def from_values(cls, values: list[float], max_distance: float) -> TabulatedInhibitor:
        """The table whose samples at equidistant distances in [0, max_distance] are `values`, at least 8."""
        return cls(lambda d: torch.tensor(values, dtype=torch.float64), max_distance, len(values))

    def table(self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
        """(samples, 4): the cubic v + t (m + t (c2 + t c3)) from each node on, constant from the last; made in float64,
        once a dtype and device. Coefficients rather than nodes: in float32 their differences would lose the slope."""
        made = self.__dict__.setdefault("_tables", {})
        key = (dtype, str(device))
        if key in made:
            return made[key]
        with torch.inference_mode(False):  # else a table first made there could not be saved for backward later
            v = torch.tensor(self.values, dtype=torch.float64)
            m, rise = _node_slopes(v), v.diff()
            cubics = torch.stack([v[:-1], m[:-1], 3 * rise - 2 * m[:-1] - m[1:], m[:-1] + m[1:] - 2 * rise], 1)
            end = torch.tensor([[self.values[-1], 0, 0, 0]], dtype=torch.float64)
            made[key] = torch.cat([cubics, end]).to(device, dtype)
        return made[key]

    def _interpolate(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f(d), f'(d) per table step and d, from s = d^2."""
        table = self.table(s.dtype, s.device)
        last = self.samples - 1
        d = sqrt_of_square(s)
        x = d * (last / self.max_distance)
        inside = x < last
        i = torch.where(inside, x.detach(), torch.full_like(x, last)).long()
        v, m, c2, c3 = table[i].unbind(-1)
        t = torch.where(inside, x - i, torch.where(torch.isnan(x), x, torch.zeros_like(x)))
        return v + t * (m + t * (c2 + t * c3)), m + t * (2 * c2 + t * (3 * c3)), d

    def from_squared(self, s: Tensor) -> Tensor:
        return self._interpolate(s)[0]

    def slope(self, s: Tensor) -> Tensor:
        _, slope, d = self._interpolate(s)
        zero = d == 0
        per_distance = slope * ((self.samples - 1) / self.max_distance)
        return torch.where(zero, torch.zeros_like(s), per_distance / torch.where(zero, torch.ones_like(d), 2 * d))


def _node_slopes(v: Tensor) -> Tensor:
    """df/dx at equidistant nodes with unit step, sixth order: central inside, one-sided at the ends."""
    n = len(v)
    offsets = torch.arange(7, dtype=torch.float64)
    slopes = torch.empty_like(v)
    slopes[3:n - 3] = (45 * (v[4:n - 2] - v[2:n - 4]) - 9 * (v[5:n - 1] - v[1:n - 5]) + (v[6:] - v[:n - 6])) / 60
    for edge in range(3):
        # weights w with sum_k w_k k^p = p edge^(p-1), p = 0..6: exact for polynomials of degree 6 on 7 nodes
        powers = torch.arange(7, dtype=torch.float64)
        moments = offsets[None, :] ** powers[:, None]
        target = torch.tensor([p * float(edge) ** (p - 1) if p else 0.0 for p in range(7)], dtype=torch.float64)
        weights = torch.linalg.solve(moments, target)
        slopes[edge] = weights @ v[:7]
        slopes[n - 1 - edge] = -(weights @ v.flip(0)[:7])
    return slopes


class CallableInhibitor(Inhibitor):
    """A bare callable d -> f(d), elementwise and differentiable by autograd: tiled PyTorch path only."""

    def __init__(self, f: Callable[[Tensor], Tensor]):
        self.f = f

    def __repr__(self) -> str:
        return f"CallableInhibitor({getattr(self.f, '__qualname__', repr(self.f))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CallableInhibitor) and other.f == self.f

    def __hash__(self) -> int:
        return hash((CallableInhibitor, self.f))

    def __call__(self, d: Tensor) -> Tensor:
        return self.f(_floating(d))

    def from_squared(self, s: Tensor) -> Tensor:
        return self.f(sqrt_of_square(s))

    def slope(self, s: Tensor) -> Tensor:
        with torch.enable_grad():
            s = s.detach().requires_grad_()
            value = self.from_squared(s)
            if not value.requires_grad:  # f does not depend on d
                return torch.zeros_like(s)
            return torch.autograd.grad(value.sum(), s)[0]


DEFAULT = DifferenceOfGaussians()  # made once: its checks cost as much as a small penalty


def inhibitor(f: Inhibitor | Callable[[Tensor], Tensor] | None) -> Inhibitor:
    """None = DifferenceOfGaussians(); a bare callable is wrapped; an Inhibitor is handed back as it is."""
    if f is None:
        return DEFAULT
    if isinstance(f, Inhibitor):
        return f
    if callable(f):
        return CallableInhibitor(f)
    raise TypeError(
        f"inhibitor must be an Inhibitor, a callable d -> f(d) or None, got {f!r}; pass for example "
        "DifferenceOfGaussians()."
    )
