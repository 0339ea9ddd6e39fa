"""Manifolds a user picks: points, sampling, geodesic distances, in plain PyTorch.

Everything works with the SQUARED distance s = d^2: flat manifolds then need no square root and s is smooth at
d = 0. A manifold gives s and, for the hand-written gradients of `reference.py`, the pull-back of a gradient in s
to the coordinates. The compiled kernels hold the same formulas (csrc/distance.h).
"""
from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks


def reduced(x: Tensor, period: float) -> Tensor:
    """x modulo `period`, in [0, period]."""
    return x - period * torch.floor(x / period)


def wrap(d: Tensor, period: float | Tensor) -> Tensor:
    """The nearest to 0 of d, d - period and d + period, for a difference d of reduced coordinates; d itself at a tie.
    So wrap(-d) = -wrap(d) everywhere: two points pull at each other with opposite gradients on the cut locus too."""
    return torch.where(d.abs() > period / 2, d - period * torch.sign(d), d)


def sqrt_of_square(s: Tensor) -> Tensor:
    """sqrt(s) with derivative 0, not infinity, at s = 0; NaN stays NaN."""
    zero = s == 0
    return torch.where(zero, torch.zeros_like(s), torch.sqrt(torch.where(zero, torch.ones_like(s), s)))


class Manifold:
    """Base class. A subclass gives `ambient_dim`, `sample` and `squared_distance` and then works everywhere,
    through the tiled PyTorch path (slower than the compiled kernels; a warning says so once)."""

    ambient_dim: int
    _warned: ClassVar[set[str]] = set()

    def sample(self, n: int, *, generator: torch.Generator | None = None, dtype: torch.dtype | None = None,
               device: torch.device | str | None = None) -> Tensor:
        """n points, uniform on the manifold where that exists: (n, ambient_dim).

        Args:
            n: number of points, at least 0.
            generator: for reproducible points; drawn on its device.
            dtype: None = torch's default.
            device: None = the generator's, else the CPU.

        Raises:
            ValueError: n < 0.
            TypeError: n is no integer.
        """
        raise NotImplementedError

    def squared_distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Squared geodesic distances of all pairs, (n, c), (m, c) -> (n, m); differentiable.

        Raises:
            TypeError: x or y is no floating-point tensor.
            ValueError: another shape, or two devices.
        """
        raise NotImplementedError

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Geodesic distances of all pairs, (n, c), (m, c) -> (n, m); gradient 0 where d = 0. Errors are those of
        `squared_distance`."""
        return sqrt_of_square(self.squared_distance(x, y))

    def pull_back(self, x: Tensor, y: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """sum_j slope_ij ds_ij/dx_i and sum_i slope_ij ds_ij/dy_j, for slope (n, m): (n, c) and (m, c).
        Here by autograd through `squared_distance`; the built-in manifolds write it out."""
        with torch.enable_grad():
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            dx, dy = torch.autograd.grad(self.squared_distance(x, y), (x, y), slope)
            return dx, dy

    def check_points(self, points: Tensor) -> None:
        """Refuses finite coordinates (n, ambient_dim) that are no point of the manifold.

        Raises:
            ValueError: there are any.
        """

    def grid(self, n: int) -> Tensor:
        """n points spread regularly, (n, ambient_dim), float64.

        Raises:
            ValueError: this manifold has no regular points (spheres but the 2-sphere, products).
        """
        raise ValueError(
            f"layout must be 'uniform' for {self}, got 'grid' (only flat manifolds and the 2-sphere have one); "
            "use 'uniform' or pass points="
        )

    def factors(self) -> tuple[Manifold, ...]:
        """The manifolds this is a product of, itself otherwise."""
        return (self,)

    @classmethod
    def warn_tiled(cls, name: str, what: str) -> None:
        """Once a process and name: no compiled kernel for this; results are the same, slower."""
        if name not in Manifold._warned:
            Manifold._warned.add(name)
            warnings.warn(f"{what} {name} has no compiled kernel: the penalty runs through the tiled PyTorch path, "
                          "with the same result and slower.", stacklevel=4)


def _sum(parts: Iterable[Tensor]) -> Tensor:
    """Of at least one tensor."""
    return sum(parts)  # pyright: ignore[reportReturnType]  # 0 where there is none


def _draw(n: int, columns: int, kind: str, generator: torch.Generator | None, dtype: torch.dtype | None,
          device: torch.device | str | None) -> Tensor:
    """(n, columns) uniform in [0, 1) or standard normal; drawn on the generator's device, then moved."""
    checks.positive_int("n", n, minimum=0)
    source = generator.device if generator is not None else device
    draw = torch.rand if kind == "uniform" else torch.randn
    return draw(n, columns, generator=generator, dtype=dtype, device=source).to(device or source or "cpu")


def _lattice(n: int, sides: tuple[float, ...]) -> Tensor:
    """n of the nodes of a near-cubic lattice with cells of equal side in the box `sides`, evenly picked."""
    cell = (math.prod(sides) / max(n, 1)) ** (1 / len(sides))
    counts = [max(1, math.ceil(side / cell - 1e-9)) for side in sides]
    index = torch.arange(n) * math.prod(counts) // max(n, 1)
    columns = []
    for side, count in zip(reversed(sides), reversed(counts)):
        columns.append((index % count).double() * (side / count))
        index = index // count
    return torch.stack(columns[::-1], 1)


class _Flat(Manifold):
    """R^k with column c taken modulo `_periods[c]` (0 = not periodic). With delta_c = wrap(x_c - y_c, p_c) of
    coordinates reduced into [0, p_c]:

        s = sum_c delta_c^2,   ds/dx_c = 2 delta_c = -ds/dy_c.
    """

    _periods: tuple[float, ...]

    def _difference(self, x: Tensor, y: Tensor, c: int) -> Tensor:
        x, y, period = x[:, c], y[:, c], self._periods[c]
        if not period:
            return x[:, None] - y
        return wrap(reduced(x, period)[:, None] - reduced(y, period), period)

    def squared_distance(self, x: Tensor, y: Tensor) -> Tensor:
        checks.distance_arguments(self, x, y)
        return _sum(self._difference(x, y, c).square() for c in range(self.ambient_dim))

    def pull_back(self, x: Tensor, y: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        parts = [2 * slope * self._difference(x, y, c) for c in range(self.ambient_dim)]
        return torch.stack([p.sum(1) for p in parts], 1), torch.stack([-p.sum(0) for p in parts], 1)

    def grid(self, n: int) -> Tensor:
        return _lattice(n, self._sides)

    def sample(self, n: int, *, generator: torch.Generator | None = None, dtype: torch.dtype | None = None,
               device: torch.device | str | None = None) -> Tensor:
        points = _draw(n, self.ambient_dim, "uniform", generator, dtype, device)
        return points * torch.tensor(self._sides, dtype=points.dtype, device=points.device)

    @property
    def ambient_dim(self) -> int:
        return len(self._periods)

    @property
    def _sides(self) -> tuple[float, ...]:
        return self._periods


@dataclass(frozen=True)
class Circle(_Flat):
    """The circle of the given radius. A point is its arc length, taken modulo 2 pi radius:

        d(x, y) = |wrap(x - y, 2 pi radius)|  =  radius * angle.

    wrap(d, p) is the nearest to 0 of d, d - p and d + p.

    Args:
        radius: positive; its unit is that of all distances.

    Raises:
        ValueError: radius is not positive or not finite.
        TypeError: radius is no number.
    """

    radius: float = 5.0

    def __post_init__(self):
        checks.positive("radius", self.radius)

    @property
    def _periods(self) -> tuple[float, ...]:
        return (2 * math.pi * self.radius,)


@dataclass(frozen=True)
class FlatTorus(_Flat):
    """R^k modulo a rectangular lattice; any real coordinate is valid.

        d(x, y)^2 = sum_c wrap(x_c - y_c, periods_c)^2.

    wrap(d, p) is the nearest to 0 of d, d - p and d + p.

    Args:
        periods: k of them, one a coordinate, positive; their unit is that of all distances.

    Raises:
        ValueError: periods are none, or one is not positive or not finite.
        TypeError: periods are no sequence of numbers.
    """

    periods: tuple[float, ...] = (10.0, 10.0)

    def __post_init__(self):
        try:
            periods = tuple(self.periods)
        except TypeError:
            raise TypeError(f"periods must be a tuple of positive numbers, got {self.periods!r}; pass for "
                            "example (10.0, 10.0).") from None
        if not periods:
            raise ValueError("periods must hold at least one positive number, got (); pass for example (10.0, 10.0).")
        for c, period in enumerate(periods):
            checks.positive(f"periods[{c}]", period)
        object.__setattr__(self, "periods", tuple(float(p) for p in periods))

    @property
    def _periods(self) -> tuple[float, ...]:
        return self.periods


@dataclass(frozen=True)
class Euclidean(_Flat):
    """R^dim, d(x, y) = |x - y|. Not compact: points are drawn uniformly from the cube [0, side]^dim.

    Args:
        dim: at least 1.
        side: of the cube, positive; its unit is that of all distances.

    Raises:
        ValueError: dim < 1, or side is not positive or not finite.
        TypeError: dim is no integer, side no number.
    """

    dim: int = 3
    side: float = 10.0

    def __post_init__(self):
        checks.positive_int("dim", self.dim)
        checks.positive("side", self.side)

    @property
    def _periods(self) -> tuple[float, ...]:
        return (0.0,) * self.dim

    @property
    def _sides(self) -> tuple[float, ...]:
        return (self.side,) * self.dim


@dataclass(frozen=True)
class Sphere(Manifold):
    """The sphere S^dim of the given radius in R^(dim+1). A point is any non-zero vector x; it is normalized on
    use, x^ = x / |x|.

        d(x, y) = radius * theta,   theta = 2 atan2(|x^ - y^|, |x^ + y^|),

    which keeps full relative precision at 0 and pi, where acos of a rounded inner product loses half the digits
    (Kahan). With s = d^2 and theta / sin(theta) = 2 theta / (|x^ - y^| |x^ + y^|),

        ds/dx = -2 radius^2 theta / sin(theta) (y^ - cos(theta) x^) / |x|;

    the factor is 2 radius^2 at theta = 0 and diverges at pi, where 0 is returned.

    Args:
        dim: of the sphere, at least 1; points have dim + 1 coordinates.
        radius: positive; its unit is that of all distances.

    Raises:
        ValueError: dim < 1, or radius is not positive or not finite.
        TypeError: dim is no integer, radius no number.
    """

    dim: int = 2
    radius: float = 5.0

    def __post_init__(self):
        checks.positive_int("dim", self.dim)
        checks.positive("radius", self.radius)

    @property
    def ambient_dim(self) -> int:
        return self.dim + 1

    def sample(self, n: int, *, generator: torch.Generator | None = None, dtype: torch.dtype | None = None,
               device: torch.device | str | None = None) -> Tensor:
        points = _draw(n, self.ambient_dim, "normal", generator, dtype, device)
        return self.radius * points / points.norm(dim=1, keepdim=True)

    @staticmethod
    def _chords(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """|x^ - y^| and |x^ + y^| of unit vectors, column by column: nothing n x m x c is made."""
        minus = _sum((x[:, c, None] - y[None, :, c]).square() for c in range(x.shape[1]))
        plus = _sum((x[:, c, None] + y[None, :, c]).square() for c in range(x.shape[1]))
        return sqrt_of_square(minus), sqrt_of_square(plus)

    def squared_distance(self, x: Tensor, y: Tensor) -> Tensor:
        checks.distance_arguments(self, x, y)
        x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
        return (2 * self.radius * torch.atan2(*self._chords(x, y))).square()

    def pull_back(self, x: Tensor, y: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        x_norm, y_norm = x.norm(dim=1, keepdim=True), y.norm(dim=1, keepdim=True)
        x, y = x / x_norm, y / y_norm
        minus, plus = self._chords(x, y)
        # theta / sin(theta); 1 at coincidence, 0 (by convention) at antipodes
        ratio = 4 * torch.atan2(minus, plus) / (minus * plus)
        ratio = torch.where(plus == 0, torch.zeros_like(ratio), ratio)
        ratio = torch.where(minus == 0, torch.ones_like(ratio), ratio)
        slope = -2 * self.radius**2 * slope * ratio
        # y^ - cos x^ is the part of (y^ - x^) tangent at x^: sum the differences, project once a point
        gx = torch.stack([(slope * (y[None, :, c] - x[:, c, None])).sum(1) for c in range(x.shape[1])], 1)
        gy = torch.stack([(slope * (x[:, c, None] - y[None, :, c])).sum(0) for c in range(x.shape[1])], 1)
        gx = (gx - (gx * x).sum(1, keepdim=True) * x) / x_norm
        gy = (gy - (gy * y).sum(1, keepdim=True) * y) / y_norm
        return gx, gy

    def check_points(self, points: Tensor) -> None:
        checks.zero_vectors(points, self)

    def grid(self, n: int) -> Tensor:
        if self.dim != 2:
            return super().grid(n)
        index = torch.arange(n, dtype=torch.float64)  # Fibonacci lattice
        z = 1 - (2 * index + 1) / max(n, 1)
        angle = index * (math.pi * (3 - math.sqrt(5)))
        ring = torch.sqrt(1 - z * z)
        return self.radius * torch.stack([ring * torch.cos(angle), ring * torch.sin(angle), z], 1)


@dataclass(frozen=True)
class KleinBottle(Manifold):
    """[0, width] x [0, height] with (x, 0) ~ (x, height) and (0, y) ~ (width, height - y). Of all images of a pair
    two can be nearest; with coordinates reduced modulo (2 width, height) and dx = |wrap(xa - xb, 2 width)|,

        s1 = dx^2 + wrap(ya - yb, height)^2,   s2 = (width - dx)^2 + wrap(ya + yb - height, height)^2,
        s = min(s1, s2);

    s1 is taken at a tie. Any real coordinate is valid (the identity is periodic in (2 width, height)).

    Args:
        width: of the rectangle, positive; its unit is that of all distances.
        height: of the rectangle, positive.

    Raises:
        ValueError: width or height is not positive or not finite.
        TypeError: width or height is no number.
    """

    width: float = 10.0
    height: float = 10.0
    ambient_dim: ClassVar[int] = 2

    def __post_init__(self):
        checks.positive("width", self.width)
        checks.positive("height", self.height)

    def sample(self, n: int, *, generator: torch.Generator | None = None, dtype: torch.dtype | None = None,
               device: torch.device | str | None = None) -> Tensor:
        points = _draw(n, 2, "uniform", generator, dtype, device)
        return points * torch.tensor((self.width, self.height), dtype=points.dtype, device=points.device)

    def grid(self, n: int) -> Tensor:
        return _lattice(n, (self.width, self.height))

    def _candidates(self, x: Tensor, y: Tensor):
        xa, xb = (reduced(p[:, 0], 2 * self.width) for p in (x, y))
        ya, yb = (reduced(p[:, 1], self.height) for p in (x, y))
        dx = wrap(xa[:, None] - xb, 2 * self.width)
        straight = wrap(ya[:, None] - yb, self.height)
        flipped = wrap(ya[:, None] + yb - self.height, self.height)
        s1 = dx.square() + straight.square()
        s2 = (self.width - dx.abs()).square() + flipped.square()
        return dx, straight, flipped, s1, s2

    def squared_distance(self, x: Tensor, y: Tensor) -> Tensor:
        checks.distance_arguments(self, x, y)
        *_, s1, s2 = self._candidates(x, y)
        return torch.where(s2 < s1, s2, s1)

    def pull_back(self, x: Tensor, y: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        dx, straight, flipped, s1, s2 = self._candidates(x, y)
        other = s2 < s1
        along = 2 * slope * torch.where(other, torch.sign(dx) * (dx.abs() - self.width), dx)
        x_side = 2 * slope * torch.where(other, flipped, straight)
        y_side = 2 * slope * torch.where(other, flipped, -straight)
        return (torch.stack([along.sum(1), x_side.sum(1)], 1), torch.stack([-along.sum(0), y_side.sum(0)], 1))


@dataclass(frozen=True, init=False, repr=False)
class Product(Manifold):
    """The Riemannian product: columns concatenated in the order given, s = sum_i s_i.

    Args:
        *manifolds: at least one; products among them are taken apart.

    Raises:
        ValueError: there is none.
        TypeError: one is no Manifold.
    """

    manifolds: tuple[Manifold, ...]

    def __init__(self, *manifolds: Manifold):
        if not manifolds:
            raise ValueError(
                "manifolds must hold at least one manifold, got none; pass for example Sphere(), FlatTorus().")
        for i, m in enumerate(manifolds):
            if not isinstance(m, Manifold):
                raise TypeError(
                    f"manifolds[{i}] must be a Manifold, got {type(m).__name__}; pass for example Sphere().")
        object.__setattr__(self, "manifolds", tuple(f for m in manifolds for f in m.factors()))

    def __repr__(self) -> str:
        return f"Product({', '.join(map(repr, self.manifolds))})"

    @property
    def ambient_dim(self) -> int:
        return sum(m.ambient_dim for m in self.manifolds)

    def factors(self) -> tuple[Manifold, ...]:
        return self.manifolds

    def split(self, points: Tensor) -> list[Tensor]:
        """The columns of each factor."""
        return list(points.split([m.ambient_dim for m in self.manifolds], dim=1))

    def sample(self, n: int, *, generator: torch.Generator | None = None, dtype: torch.dtype | None = None,
               device: torch.device | str | None = None) -> Tensor:
        return torch.cat([m.sample(n, generator=generator, dtype=dtype, device=device) for m in self.manifolds], 1)

    def squared_distance(self, x: Tensor, y: Tensor) -> Tensor:
        checks.distance_arguments(self, x, y)
        return _sum(m.squared_distance(a, b) for m, a, b in zip(self.manifolds, self.split(x), self.split(y)))

    def pull_back(self, x: Tensor, y: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        parts = [m.pull_back(a, b, slope) for m, a, b in zip(self.manifolds, self.split(x), self.split(y))]
        return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)

    def check_points(self, points: Tensor) -> None:
        for m, part in zip(self.manifolds, self.split(points)):
            m.check_points(part)


PRESETS: dict[str, Manifold] = {
    "torus": FlatTorus(),
    "torus6": FlatTorus((10.0,) * 6),
    "circle": Circle(),
    "sphere": Sphere(),
    "s3": Sphere(dim=3),
    "klein": KleinBottle(),
    "r3": Euclidean(),
    "mixed": Product(Sphere(), FlatTorus()),
}


def manifold(name: str | Manifold) -> Manifold:
    """The paper's preset of that name; a Manifold is handed back as it is.

    Args:
        name: "torus" (FlatTorus of periods 10 and 10), "torus6" (six periods of 10), "circle" (radius 5), "sphere" (the
            2-sphere of radius 5), "s3" (the 3-sphere of radius 5), "klein" (KleinBottle, 10 by 10), "r3" (Euclidean,
            points in a cube of side 10), "mixed" (Product of "sphere" and "torus"); or a Manifold.

    Raises:
        ValueError: name is neither.
    """
    if isinstance(name, Manifold):
        return name
    if not isinstance(name, str) or name not in PRESETS:
        choices = ", ".join(repr(p) for p in PRESETS)
        raise ValueError(f"manifold must be a Manifold or one of {choices}, got {name!r}; pick one of them.")
    return PRESETS[name]
