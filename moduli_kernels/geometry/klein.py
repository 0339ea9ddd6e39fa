"""The Klein bottle."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import positive
from .base import KernelForm, Manifold
from .chart_kinds import Chart, RectangleChart
from .checks import distance_arguments
from .maths import draw, lattice, reduced, remainder, wrap

__all__ = ["KleinBottle"]


@dataclass(frozen=True)
class KleinBottle(Manifold):
    """The rectangle [0, width] x [0, height] with (x, 0) ~ (x, height) and (0, y) ~ (width, height - y).

    Only two images of a pair of points can be nearest. With coordinates reduced modulo (2 width, height) and
    dx = |wrap(xa - xb, 2 width)|,

        s1 = dx^2 + wrap(ya - yb, height)^2,   s2 = (width - dx)^2 + wrap(ya + yb - height, height)^2,
        s = min(s1, s2);

    s1 is taken at a tie. Any real coordinate is valid: the identification is periodic in (2 width, height).

    Args:
        width: the width of the rectangle, positive; its unit is that of all distances.
        height: the height of the rectangle, positive.

    Raises:
        ValueError: width or height is not positive or not finite.
        TypeError: width or height is not a number.
    """

    width: float = 10.0
    height: float = 10.0
    ambient_dim: ClassVar[int] = 2
    kernel_form = KernelForm(code=2, parameters=("width", "height"))

    def __post_init__(self):
        for name in ("width", "height"):
            object.__setattr__(self, name, positive(name, getattr(self, name)))

    def sample(self, n: int, *, generator: torch.Generator | None = None, dtype: torch.dtype | None = None,
               device: torch.device | str | None = None) -> Tensor:
        points = draw(n, 2, "uniform", generator, dtype, device)
        return points * torch.tensor((self.width, self.height), dtype=points.dtype, device=points.device)

    def grid(self, n: int) -> Tensor:
        return lattice(n, (self.width, self.height))

    def _candidates(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """For all pairs (n, m): wrap(xa - xb), the two differences across it, and s1 and s2."""
        xa, xb = (reduced(p[:, 0], 2 * self.width) for p in (x, y))
        ya, yb = (reduced(p[:, 1], self.height) for p in (x, y))
        dx = wrap(xa[:, None] - xb, 2 * self.width)
        straight = wrap(ya[:, None] - yb, self.height)
        flipped = wrap(ya[:, None] + yb - self.height, self.height)
        s1 = dx.square() + straight.square()
        s2 = (self.width - dx.abs()).square() + flipped.square()
        return dx, straight, flipped, s1, s2

    def squared_distance(self, x: Tensor, y: Tensor) -> Tensor:
        distance_arguments(self, x, y)
        *_, s1, s2 = self._candidates(x, y)
        return torch.where(s2 < s1, s2, s1)

    def pull_back(self, x: Tensor, y: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        dx, straight, flipped, s1, s2 = self._candidates(x, y)
        other = s2 < s1
        along = 2 * slope * torch.where(other, torch.sign(dx) * (dx.abs() - self.width), dx)
        x_side = 2 * slope * torch.where(other, flipped, straight)
        y_side = 2 * slope * torch.where(other, flipped, -straight)
        return (torch.stack([along.sum(1), x_side.sum(1)], 1), torch.stack([-along.sum(0), y_side.sum(0)], 1))

    def fundamental(self, points: Tensor) -> Tensor:
        along = remainder(points[:, 0], 2 * self.width)
        second = along >= self.width  # (x + width, y) ~ (x, -y)
        across = remainder(torch.where(second, -points[:, 1], points[:, 1]), self.height)
        return torch.stack([torch.where(second, along - self.width, along), across], 1)

    @property
    def reach(self) -> tuple[float, ...]:
        return (self.width / 2, self.height / 2)

    def chart(self) -> Chart:
        label = f"Klein bottle ({self.width:g} x {self.height:g})"
        return RectangleChart(label, (self.width, self.height), glide=True)
