"""Products of manifolds."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Manifold
from .chart_kinds import Chart
from .checks import distance_arguments
from .maths import total

__all__ = ["Product"]


@dataclass(frozen=True, init=False, repr=False)
class Product(Manifold):
    """The Riemannian product: a point's coordinates are those of the factors, one after another, and s = sum_i s_i.

    Args:
        *manifolds: the factors, at least one; a product among them is taken apart into its own factors.

    Raises:
        ValueError: there is no factor.
        TypeError: a factor is not a Manifold.
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
        """Points (n, ambient_dim) taken apart: the coordinates of each factor, (n, its ambient_dim)."""
        return list(points.split([m.ambient_dim for m in self.manifolds], dim=1))

    def sample(self, n: int, *, generator: torch.Generator | None = None, dtype: torch.dtype | None = None,
               device: torch.device | str | None = None) -> Tensor:
        return torch.cat([m.sample(n, generator=generator, dtype=dtype, device=device) for m in self.manifolds], 1)

    def squared_distance(self, x: Tensor, y: Tensor) -> Tensor:
        distance_arguments(self, x, y)
        return total(m.squared_distance(a, b) for m, a, b in zip(self.manifolds, self.split(x), self.split(y)))

    def pull_back(self, x: Tensor, y: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        parts = [m.pull_back(a, b, slope) for m, a, b in zip(self.manifolds, self.split(x), self.split(y))]
        return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)

    def check_points(self, points: Tensor) -> None:
        for m, part in zip(self.manifolds, self.split(points)):
            m.check_points(part)

    def fundamental(self, points: Tensor) -> Tensor:
        return torch.cat([m.fundamental(part) for m, part in zip(self.manifolds, self.split(points))], 1)

    @property
    def stretch(self) -> tuple[float, ...]:
        return tuple(column for m in self.manifolds for column in m.stretch)

    @property
    def reach(self) -> tuple[float, ...]:
        return tuple(column for m in self.manifolds for column in m.reach)

    def chart(self) -> Chart:
        """The chart of the first factor."""
        return self._first_of_several(self.manifolds[0].chart())

    def section(self) -> tuple[Manifold, Chart]:
        """A section of the first factor."""
        part, chart = self.manifolds[0].section()
        return part, self._first_of_several(chart)

    def _first_of_several(self, chart: Chart) -> Chart:
        count = len(self.manifolds)
        return chart._replace(label=f"{chart.label}, first of {count} factors") if count > 1 else chart
