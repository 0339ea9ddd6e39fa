"""Flat manifolds: each coordinate is a length, periodic or not."""
from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import positive, positive_int
from .base import KernelForm, Manifold
from .chart_kinds import Chart, PlaneChart, RectangleChart, RingChart
from .checks import distance_arguments, torus_periods
from .maths import draw, lattice, reduced, remainder, total, wrap

__all__ = ["Circle", "Euclidean", "FlatTorus"]

# Circles, tori and Euclidean spaces are one thing to the kernels: coordinates, each with a period, 0 if it has none.
_FLAT = KernelForm(code=0, parameters=("column_periods",))


class _Flat(Manifold):
    """R^k, with coordinate c taken modulo `column_periods[c]` (0 means that it is not periodic).

    With delta_c = wrap(x_c - y_c, p_c) of coordinates that are reduced into [0, p_c],

        s = sum_c delta_c^2,   ds/dx_c = 2 delta_c = -ds/dy_c.
    """

    column_periods: tuple[float, ...]

    @classmethod
    def from_kernel(cls, columns: int, parameters: Iterator[float]) -> tuple[Manifold, ...]:
        """A circle or a line for each coordinate: the distances of their product are those of the original."""
        periods = itertools.islice(parameters, columns)
        return tuple(FlatTorus((period,)) if period else Euclidean(1) for period in periods)

    def _difference(self, x: Tensor, y: Tensor, c: int) -> Tensor:
        x, y, period = x[:, c], y[:, c], self.column_periods[c]
        if not period:
            return x[:, None] - y
        return wrap(reduced(x, period)[:, None] - reduced(y, period), period)

    def squared_distance(self, x: Tensor, y: Tensor) -> Tensor:
        distance_arguments(self, x, y)
        return total(self._difference(x, y, c).square() for c in range(self.ambient_dim))

    def pull_back(self, x: Tensor, y: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        parts = [2 * slope * self._difference(x, y, c) for c in range(self.ambient_dim)]
        return torch.stack([p.sum(1) for p in parts], 1), torch.stack([-p.sum(0) for p in parts], 1)

    def grid(self, n: int) -> Tensor:
        return lattice(n, self._sides)

    def sample(self, n: int, *, generator: torch.Generator | None = None, dtype: torch.dtype | None = None,
               device: torch.device | str | None = None) -> Tensor:
        points = draw(n, self.ambient_dim, "uniform", generator, dtype, device)
        return points * torch.tensor(self._sides, dtype=points.dtype, device=points.device)

    def fundamental(self, points: Tensor) -> Tensor:
        columns = zip(points.unbind(1), self.column_periods)
        return torch.stack([remainder(x, period) if period else x for x, period in columns], 1)

    @property
    def reach(self) -> tuple[float, ...]:
        return tuple(period / 2 if period else math.inf for period in self.column_periods)

    def section(self) -> tuple[Manifold, Chart]:
        chart = self.chart()
        return self, chart._replace(label=chart.label + ", others held") if self.ambient_dim > 2 else chart

    @property
    def ambient_dim(self) -> int:
        return len(self.column_periods)

    @property
    def _sides(self) -> tuple[float, ...]:
        """The sides of the box from which points are drawn."""
        return self.column_periods


@dataclass(frozen=True)
class Circle(_Flat):
    """The circle of the given radius. A point is its arc length, taken modulo 2 pi radius:

        d(x, y) = |wrap(x - y, 2 pi radius)|  =  radius * angle.

    wrap(d, p) is the nearest to 0 of d, d - p and d + p.

    Args:
        radius: positive; its unit is that of all distances.

    Raises:
        ValueError: radius is not positive or not finite.
        TypeError: radius is not a number.
    """

    radius: float = 5.0
    kernel_form = _FLAT

    def __post_init__(self):
        object.__setattr__(self, "radius", positive("radius", self.radius))

    @property
    def column_periods(self) -> tuple[float, ...]:
        return (2 * math.pi * self.radius,)

    def chart(self) -> Chart:
        return RingChart(f"circle of radius {self.radius:g}", self.radius)


@dataclass(frozen=True, init=False)
class FlatTorus(_Flat):
    """R^k modulo a rectangular lattice; any real coordinate is valid.

        d(x, y)^2 = sum_c wrap(x_c - y_c, periods_c)^2.

    wrap(d, p) is the nearest to 0 of d, d - p and d + p.

    Args:
        periods: k positive numbers, one for each coordinate; their unit is that of all distances.

    Raises:
        ValueError: periods are empty, or one is not positive or not finite.
        TypeError: periods are not a sequence of numbers.
    """

    periods: tuple[float, ...] = (10.0, 10.0)
    kernel_form = _FLAT

    def __init__(self, periods: Iterable[float] = (10.0, 10.0), *more: float):
        given = torus_periods(periods, more)
        object.__setattr__(self, "periods", tuple(positive(f"periods[{c}]", p) for c, p in enumerate(given)))

    @property
    def column_periods(self) -> tuple[float, ...]:
        return self.periods

    def chart(self) -> Chart:
        if self.ambient_dim == 1:
            return RingChart(f"circle of length {self.periods[0]:g}", self.periods[0] / (2 * math.pi))
        width, height = self.periods[:2]
        shown = "flat torus" if self.ambient_dim == 2 else f"{self.ambient_dim}-torus, first two coordinates"
        return RectangleChart(f"{shown} ({width:g} x {height:g})", (width, height))


@dataclass(frozen=True)
class Euclidean(_Flat):
    """R^dim with d(x, y) = |x - y|. It is not compact: points are drawn uniformly from the cube [0, side]^dim.

    Args:
        dim: the number of coordinates, at least 1.
        side: the side of the cube, positive; its unit is that of all distances.

    Raises:
        ValueError: dim < 1, or side is not positive or not finite.
        TypeError: dim is not an integer, or side is not a number.
    """

    dim: int = 3
    side: float = 10.0
    kernel_form = _FLAT

    def __post_init__(self):
        object.__setattr__(self, "dim", int(positive_int("dim", self.dim)))
        object.__setattr__(self, "side", positive("side", self.side))

    @property
    def column_periods(self) -> tuple[float, ...]:
        return (0.0,) * self.dim

    @property
    def _sides(self) -> tuple[float, ...]:
        return (self.side,) * self.dim

    def chart(self) -> Chart:
        some = ", first two coordinates" if self.dim > 2 else ""
        return PlaneChart(f"R^{self.dim}{some}", box=self._sides if self.dim > 1 else None)
