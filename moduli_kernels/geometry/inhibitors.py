"""Inhibitors a user picks: f(d) >= 0, the cost of a connection between neurons at geodesic distance d.

They are frozen dataclasses, callable on distances. The penalty uses them through the SQUARED distance s = d^2:
`from_squared(s)` is f(sqrt s), and `slope(s)` is df/ds. The compiled kernels hold the same formulas, in
csrc/inhibitors.h and moduli_kernels/triton/inhibitors.py.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..checks import positive, positive_int
from .base import Inhibitor, KernelForm, Manifold
from .checks import ordered_sigmas, sampled_offset, table_values, zero_min
from .maths import floating, sqrt_of_square
from .sampled import largest_over_pairs

__all__ = ["Constant", "DifferenceOfGaussians", "Diffusion", "RickerWavelet", "Sinusoid", "TabulatedInhibitor"]


def _power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent for x >= 0. It avoids pow, which is slow, where the exponent is 0, 1/2, 1 or 2."""
    if exponent == 0:
        return torch.ones_like(x)
    if exponent == 1:
        return x
    if exponent == 0.5:
        return torch.sqrt(x)
    return x.square() if exponent == 2 else x.pow(exponent)


@dataclass(frozen=True)
class DifferenceOfGaussians(Inhibitor):
    """A narrow Gaussian less a wide one, the default of the paper's experiments (App. E, eq. 7).

        g(d) = c (exp(-d^2/sigma2) - exp(-d^2/sigma1)),   f(d) = offset - g(d)
        df/ds = c (exp(-s/sigma2)/sigma2 - exp(-s/sigma1)/sigma1)

    In the paper's equation 7, offset = c. There are two ways to let the cheapest connection cost 0:

    - zero_min=True: offset is the maximum of g over all distances. It is at d^2 = ln(sigma2/sigma1) / (1/sigma1 -
      1/sigma2), so that this distance costs 0 on every manifold.
    - zero_min="sampled": offset is the largest g(d(rows_i, cols_j)) over all pairs of points, as in the authors' code,
      so that the cheapest pair there is costs 0. It is for reproducing their numbers. The offset is smaller the fewer
      pairs come near the cheapest distance: with 128 neurons on a 6-torus it is about 60 (40 to 80) rather than 81. It
      is found anew at each call, which measures all distances once more; a mask of the weight makes no difference to
      it. It follows trained points and, as in the authors' code, the gradient flows through it, into the one pair with
      the largest g.

    Args:
        c: the height, positive; in the unit of f.
        sigma1: the width of the narrow Gaussian, positive. As in the paper it divides d^2, so it is a squared length.
        sigma2: the width of the wide Gaussian, in the same unit; sigma1 < sigma2.
        zero_min: whether the cheapest distance costs 0 (True), or the cheapest pair of points ("sampled"); otherwise
            offset = c.

    Raises:
        ValueError: c, sigma1 or sigma2 is not positive or not finite, sigma1 >= sigma2, or zero_min is another text. A
            "sampled" one also where it is called without points; `at_points` gives the function for some points.
        TypeError: c, sigma1 or sigma2 is not a number, or zero_min is neither a bool nor a text.
    """

    c: float = 100.0
    sigma1: float = 0.25
    sigma2: float = 5.0
    zero_min: bool | Literal["sampled"] = True
    sampled_offset: float | None = field(default=None, init=False)
    kernel_form = KernelForm(code=0, parameters=("c", "sigma1", "sigma2", "offset"))

    def __post_init__(self):
        for name in ("c", "sigma1", "sigma2"):
            object.__setattr__(self, name, positive(name, getattr(self, name)))
        ordered_sigmas(self.sigma1, self.sigma2)
        object.__setattr__(self, "zero_min", zero_min(self.zero_min))

    def __repr__(self) -> str:
        at = "" if self.sampled_offset is None else f", offset={self.sampled_offset}"
        return (f"DifferenceOfGaussians(c={self.c}, sigma1={self.sigma1}, sigma2={self.sigma2}, "
                f"zero_min={self.zero_min!r}{at})")

    @classmethod
    def from_kernel(cls, parameters: list[float], table: Tensor | None) -> Inhibitor:
        c, sigma1, sigma2, offset = parameters
        made = cls(c, sigma1, sigma2, zero_min=offset != c)  # the peak of the difference is smaller than c
        return made if made.offset == offset else made.with_offset(offset)

    def with_offset(self, offset: float) -> DifferenceOfGaussians:
        """This function with the offset that some points give it."""
        made = DifferenceOfGaussians(self.c, self.sigma1, self.sigma2, "sampled")
        object.__setattr__(made, "sampled_offset", float(offset))
        return made

    @property
    def needs_points(self) -> bool:
        return self.zero_min == "sampled" and self.sampled_offset is None

    def at_points(self, manifold: Manifold, rows: Tensor, cols: Tensor | None = None) -> Inhibitor:
        if not self.needs_points:
            return self
        return self.with_offset(self.largest_over_pairs(manifold, rows.detach(), cols).item())

    def largest_over_pairs(self, manifold: Manifold, rows: Tensor, cols: Tensor | None = None) -> Tensor:
        """The largest g(d(rows_i, cols_j)), the offset for zero_min="sampled": 0-d, in the dtype of the points.

        It is differentiable in the points of the pair that has it. Arguments are those of `at_points`.
        """
        return largest_over_pairs(self._difference, self._cheapest, manifold, rows, cols)

    @property
    def _cheapest(self) -> float:
        """The squared distance that costs least."""
        return math.log(self.sigma2 / self.sigma1) / (1 / self.sigma1 - 1 / self.sigma2)

    @property
    def offset(self) -> float:
        """The constant in f: c or, with `zero_min`, the maximum of what is subtracted, so that min f = 0."""
        if self.zero_min == "sampled":
            return sampled_offset(self.sampled_offset)
        if not self.zero_min:
            return self.c
        s = self._cheapest
        return self.c * (math.exp(-s / self.sigma2) - math.exp(-s / self.sigma1))

    def _difference(self, s: Tensor) -> Tensor:
        return self.c * (torch.exp(-s / self.sigma2) - torch.exp(-s / self.sigma1))

    def from_squared(self, s: Tensor) -> Tensor:
        return self.offset - self._difference(s)

    def slope(self, s: Tensor) -> Tensor:
        wide, narrow = torch.exp(-s / self.sigma2), torch.exp(-s / self.sigma1)
        return (self.c / self.sigma2) * wide - (self.c / self.sigma1) * narrow


@dataclass(frozen=True)
class Diffusion(Inhibitor):
    """A cost that grows with the distance (paper, App. E, eq. 7-8).

        f(d) = c d^exponent,   df/ds = c (exponent/2) s^(exponent/2 - 1)

    The slope is taken to be 0 at s = 0 where it diverges (exponent < 2). f is monotone, so it does not suit trained
    points: they would collapse to one.

    Args:
        c: the cost at distance 1, positive.
        exponent: positive.

    Raises:
        ValueError: c or exponent is not positive or not finite.
        TypeError: c or exponent is not a number.
    """

    c: float = 1.0
    exponent: float = 2.0
    trainable: ClassVar[bool] = False
    kernel_form = KernelForm(code=1, parameters=("c", "exponent"))

    def __post_init__(self):
        object.__setattr__(self, "c", positive("c", self.c))
        object.__setattr__(self, "exponent", positive("exponent", self.exponent))

    def from_squared(self, s: Tensor) -> Tensor:
        zero = s == 0  # for exponent < 2 there is no derivative at 0, so autograd must not meet one
        return self.c * torch.where(zero, s, _power(torch.where(zero, torch.ones_like(s), s), self.exponent / 2))

    def slope(self, s: Tensor) -> Tensor:
        zero = (s == 0) & (self.exponent < 2)
        slope = self.c * (self.exponent / 2) * _power(torch.where(zero, torch.ones_like(s), s), self.exponent / 2 - 1)
        return torch.where(zero, torch.zeros_like(s), torch.where(torch.isnan(s), s, slope))


@dataclass(frozen=True)
class Sinusoid(Inhibitor):
    """A cost that is periodic in the distance (paper, App. E, eq. 7-8).

        f(d) = c + c cos(mu d),   df/ds = -(c mu^2/2) sin(mu d)/(mu d)

    The slope at d = 0 is -c mu^2/2.

    Args:
        c: half of the largest cost, positive.
        mu: the angular frequency in radians for each unit of distance, positive.

    Raises:
        ValueError: c or mu is not positive or not finite.
        TypeError: c or mu is not a number.
    """

    c: float = 10.0
    mu: float = 2.0
    kernel_form = KernelForm(code=2, parameters=("c", "mu"))

    def __post_init__(self):
        object.__setattr__(self, "c", positive("c", self.c))
        object.__setattr__(self, "mu", positive("mu", self.mu))

    def from_squared(self, s: Tensor) -> Tensor:
        return self.c + self.c * torch.cos(self.mu * sqrt_of_square(s))

    def slope(self, s: Tensor) -> Tensor:
        return (-self.c * self.mu**2 / 2) * torch.sinc(self.mu / math.pi * sqrt_of_square(s))


@dataclass(frozen=True)
class RickerWavelet(Inhibitor):
    """The Ricker wavelet psi, upside down (paper, App. E, eq. 7-8).

        psi(d) = A (1 - u) exp(-u/2),   u = d^2/sigma^2,   A = 2/sqrt(3 sigma sqrt(pi)),
        f(d) = c (psi(0) - psi(d)),   df/ds = c A (3 - u) exp(-u/2) / (2 sigma^2)

    Distance 0 costs nothing, and d = sqrt(3) sigma costs most.

    Args:
        sigma: the width, positive; a length in the manifold's unit.
        c: the factor before the wavelet, positive.

    Raises:
        ValueError: sigma or c is not positive or not finite.
        TypeError: sigma or c is not a number.
    """

    sigma: float = 1.0
    c: float = 1.0
    kernel_form = KernelForm(code=3, parameters=("sigma", "c"))

    def __post_init__(self):
        object.__setattr__(self, "sigma", positive("sigma", self.sigma))
        object.__setattr__(self, "c", positive("c", self.c))

    @property
    def peak(self) -> float:
        """The height of the wavelet, A = psi(0)."""
        return 2 / math.sqrt(3 * self.sigma * math.sqrt(math.pi))

    def from_squared(self, s: Tensor) -> Tensor:
        u = s / self.sigma**2
        return self.c * self.peak * (1 - (1 - u) * torch.exp(-u / 2))

    def slope(self, s: Tensor) -> Tensor:
        u = s / self.sigma**2
        return (self.c * self.peak / (2 * self.sigma**2)) * (3 - u) * torch.exp(-u / 2)


@dataclass(frozen=True)
class Constant(Inhibitor):
    """The same cost at every distance, f(d) = c: the penalty is then plain L_l. A non-finite point still makes it NaN.

    Args:
        c: the cost, positive.

    Raises:
        ValueError: c is not positive or not finite.
        TypeError: c is not a number.
    """

    c: float = 1.0
    trainable: ClassVar[bool] = False
    kernel_form = KernelForm(code=4, parameters=("c",))

    def __post_init__(self):
        object.__setattr__(self, "c", positive("c", self.c))

    def from_squared(self, s: Tensor) -> Tensor:
        return torch.where(torch.isnan(s), s, torch.full_like(s, self.c))

    def slope(self, s: Tensor) -> Tensor:
        return torch.where(torch.isnan(s), s, torch.zeros_like(s))


@dataclass(frozen=True)
class TabulatedInhibitor(Inhibitor):
    """Any smooth f at full speed on every backend, from a table of its values.

    f is sampled at `samples` equidistant distances in [0, max_distance] and interpolated by cubic Hermite polynomials,
    whose slopes at the nodes are sixth-order finite differences; beyond max_distance it is constant. With
    x = d (samples - 1)/max_distance, i = floor(x), t = x - i, and values v and slopes m at the nodes,

        f(d) = v_i h00(t) + m_i h10(t) + v_i+1 h01(t) + m_i+1 h11(t),   df/ds = f'(d) / (2 d), taken to be 0 at d = 0.

    Two tables are equal if max_distance, samples and the values of f at the nodes are.

    Args:
        f: a function of a float64 tensor of distances, elementwise; only its samples are kept.
        max_distance: positive; choose at least the manifold's diameter.
        samples: the number of distances at which f is sampled, at least 8.

    Raises:
        ValueError: max_distance is not positive or not finite, samples < 8, or f is not finite on [0, max_distance].
        TypeError: max_distance is not a number, or samples is not an integer.
    """

    f: InitVar[Callable[[Tensor], Tensor]]
    max_distance: float
    samples: int = 4096
    values: tuple[float, ...] = field(init=False, repr=False)
    kernel_form = KernelForm(code=5, parameters=("max_distance",))

    def __post_init__(self, f: Callable[[Tensor], Tensor]):
        object.__setattr__(self, "max_distance", positive("max_distance", self.max_distance))
        object.__setattr__(self, "samples", int(positive_int("samples", self.samples, minimum=8)))
        with torch.device("cpu"):  # also what f itself makes
            d = torch.linspace(0, self.max_distance, self.samples, dtype=torch.float64)
            values = torch.as_tensor(f(d), dtype=torch.float64).detach().expand(self.samples)
        table_values(values)
        object.__setattr__(self, "values", tuple(values.tolist()))
        steps = values.diff()
        object.__setattr__(self, "trainable", not bool((steps >= 0).all() or (steps <= 0).all()))

    @classmethod
    def from_values(cls, values: list[float], max_distance: float) -> TabulatedInhibitor:
        """The inhibitor whose samples at equidistant distances in [0, max_distance] are `values`, at least 8."""
        return cls(lambda d: torch.tensor(values, dtype=d.dtype, device=d.device), max_distance, len(values))

    @classmethod
    def from_kernel(cls, parameters: list[float], table: Tensor | None) -> Inhibitor:
        assert table is not None
        return cls.from_values(table[:, 0].double().tolist(), parameters[0])

    def table(self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
        """The cubics that the kernels evaluate: v + t (m + t (c2 + t c3)) from each node on, constant from the last.

        The table holds coefficients rather than values at the nodes, because in float32 the differences of values would
        lose the slope. It is made in float64, once for each dtype and device.

        Returns:
            (samples, 4): v, m, c2 and c3 of each node.
        """
        if not hasattr(self, "_tables"):  # torch.compile of torch 2.10 cannot trace __dict__.setdefault
            object.__setattr__(self, "_tables", {})
        made = self._tables  # pyright: ignore[reportAttributeAccessIssue]
        key = (dtype, str(device))
        if key in made:
            return made[key]
        # A table that is first asked for in inference mode must still be of use to a later backward pass.
        with torch.inference_mode(False):
            v = torch.tensor(self.values, dtype=torch.float64, device="cpu")
            m, rise = _node_slopes(v), v.diff()
            cubics = torch.stack([v[:-1], m[:-1], 3 * rise - 2 * m[:-1] - m[1:], m[:-1] + m[1:] - 2 * rise], 1)
            end = v.new_tensor([[self.values[-1], 0, 0, 0]])
            made[key] = torch.cat([cubics, end]).to(device, dtype)
        return made[key]

    def _interpolate(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f(d), its slope for each step of the table, and d, all in the shape of s = d^2."""
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
    """df/dx at equidistant nodes with unit step, to sixth order, from the values v (n,).

    Differences are central inside and one-sided at the three nodes of either end.
    """
    n = len(v)
    offsets = torch.arange(7, dtype=v.dtype, device=v.device)
    slopes = torch.empty_like(v)
    slopes[3:n - 3] = (45 * (v[4:n - 2] - v[2:n - 4]) - 9 * (v[5:n - 1] - v[1:n - 5]) + (v[6:] - v[:n - 6])) / 60
    for edge in range(3):
        # The weights w solve sum_k w_k k^p = p edge^(p-1) for p = 0..6: exact for polynomials of degree 6 on 7 nodes.
        moments = offsets[None, :] ** offsets[:, None]
        target = v.new_tensor([p * float(edge) ** (p - 1) if p else 0.0 for p in range(7)])
        weights = torch.linalg.solve(moments, target)
        slopes[edge] = weights @ v[:7]
        slopes[n - 1 - edge] = -(weights @ v.flip(0)[:7])
    return slopes


class CallableInhibitor(Inhibitor):
    """A bare callable d -> f(d), elementwise and differentiable by autograd. Only the tiled PyTorch path takes it."""

    def __init__(self, f: Callable[[Tensor], Tensor]):
        self.f = f

    def __repr__(self) -> str:
        return f"CallableInhibitor({getattr(self.f, '__qualname__', repr(self.f))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CallableInhibitor) and other.f == self.f

    def __hash__(self) -> int:
        return hash((CallableInhibitor, self.f))

    def __call__(self, d: Tensor) -> Tensor:
        return self.f(floating(d))

    def from_squared(self, s: Tensor) -> Tensor:
        return self.f(sqrt_of_square(s))

    def slope(self, s: Tensor) -> Tensor:
        with torch.enable_grad():
            s = s.detach().requires_grad_()
            value = self.from_squared(s)
            if not value.requires_grad:  # f does not depend on d
                return torch.zeros_like(s)
            return torch.autograd.grad(value.sum(), s)[0]


DEFAULT = DifferenceOfGaussians()  # made once, since its checks take as long as a small penalty


def inhibitor(f: Inhibitor | Callable[[Tensor], Tensor] | None) -> Inhibitor:
    """The Inhibitor that a user means: None is DifferenceOfGaussians(), a bare callable is wrapped.

    Raises:
        TypeError: f is not callable.
    """
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
