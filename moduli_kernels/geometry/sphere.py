"""Spheres of any dimension."""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import positive, positive_int
from .base import KernelForm, Manifold
from .chart_kinds import Chart, GlobeChart, PlaneChart, RingChart
from .checks import distance_arguments, zero_vectors
from .flat import Circle
from .maths import draw, sqrt_of_square, total

__all__ = ["Sphere"]


@dataclass(frozen=True)
class Sphere(Manifold):
    """The sphere S^dim of the given radius in R^(dim+1). A point is any non-zero vector x; its direction
    x^ = x / |x| is what counts.

        d(x, y) = radius * theta,   theta = 2 atan2(|x^ - y^|, |x^ + y^|).

    Its absolute error is a few eps at every angle (2e-7 rad in float32, 4e-16 in float64), where acos of a rounded
    inner product loses half the digits at 0 and pi (Kahan). The relative error near 0 grows as eps / theta, since
    normalization rounds the points: in float32 it is about 1e-4 at theta = 1e-3 and 1e-2 at 1e-5. With s = d^2 and
    theta / sin(theta) = 2 theta / (|x^ - y^| |x^ + y^|),

        ds/dx = -2 radius^2 theta / sin(theta) (y^ - cos(theta) x^) / |x|;

    the factor is 2 radius^2 at theta = 0, and it diverges at pi, where 0 is returned.

    Args:
        dim: the dimension of the sphere, at least 1; points have dim + 1 coordinates.
        radius: positive; its unit is that of all distances.

    Raises:
        ValueError: dim < 1, or radius is not positive or not finite.
        TypeError: dim is not an integer, or radius is not a number.
    """

    dim: int = 2
    radius: float = 5.0
    kernel_form = KernelForm(code=1, parameters=("radius",))

    def __post_init__(self):
        object.__setattr__(self, "dim", int(positive_int("dim", self.dim)))
        object.__setattr__(self, "radius", positive("radius", self.radius))

    @classmethod
    def from_kernel(cls, columns: int, parameters: Iterator[float]) -> tuple[Manifold, ...]:
        return (cls(columns - 1, next(parameters)),)

    @property
    def ambient_dim(self) -> int:
        return self.dim + 1

    def sample(self, n: int, *, generator: torch.Generator | None = None, dtype: torch.dtype | None = None,
               device: torch.device | str | None = None) -> Tensor:
        points = draw(n, self.ambient_dim, "normal", generator, dtype, device)
        return self.radius * points / points.norm(dim=1, keepdim=True)

    @staticmethod
    def _chords(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """|x^ - y^| and |x^ + y^| of unit vectors (n, c) and (m, c), each (n, m).

        The sums run column by column, so that nothing of size n x m x c is made.
        """
        minus = total((x[:, c, None] - y[None, :, c]).square() for c in range(x.shape[1]))
        plus = total((x[:, c, None] + y[None, :, c]).square() for c in range(x.shape[1]))
        return sqrt_of_square(minus), sqrt_of_square(plus)

    def squared_distance(self, x: Tensor, y: Tensor) -> Tensor:
        distance_arguments(self, x, y)
        x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
        return (2 * self.radius * torch.atan2(*self._chords(x, y))).square()

    def pull_back(self, x: Tensor, y: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        x_norm, y_norm = x.norm(dim=1, keepdim=True), y.norm(dim=1, keepdim=True)
        x, y = x / x_norm, y / y_norm
        minus, plus = self._chords(x, y)
        # theta / sin(theta): it is 1 at coincidence, and 0 is taken at antipodes, where it diverges.
        ratio = 4 * torch.atan2(minus, plus) / (minus * plus)
        ratio = torch.where(plus == 0, torch.zeros_like(ratio), ratio)
        ratio = torch.where(minus == 0, torch.ones_like(ratio), ratio)
        slope = -2 * self.radius**2 * slope * ratio
        # y^ - cos(theta) x^ is the part of y^ - x^ that is tangent at x^. The differences are summed first, so that
        # each point is projected once rather than each pair.
        gx = torch.stack([(slope * (y[None, :, c] - x[:, c, None])).sum(1) for c in range(x.shape[1])], 1)
        gy = torch.stack([(slope * (x[:, c, None] - y[None, :, c])).sum(0) for c in range(x.shape[1])], 1)
        gx = (gx - (gx * x).sum(1, keepdim=True) * x) / x_norm
        gy = (gy - (gy * y).sum(1, keepdim=True) * y) / y_norm
        return gx, gy

    def check_points(self, points: Tensor) -> None:
        zero_vectors(points, self)

    def grid(self, n: int) -> Tensor:
        if self.dim != 2:
            return super().grid(n)
        # The Fibonacci lattice: equal steps in height, and turns by the golden angle.
        index = torch.arange(n, dtype=torch.float64, device="cpu")
        z = 1 - (2 * index + 1) / max(n, 1)
        angle = index * (math.pi * (3 - math.sqrt(5)))
        ring = torch.sqrt(1 - z * z)
        return self.radius * torch.stack([ring * torch.cos(angle), ring * torch.sin(angle), z], 1)

    def fundamental(self, points: Tensor) -> Tensor:
        return self.radius * torch.nn.functional.normalize(points, dim=1, eps=0.0)

    @property
    def stretch(self) -> tuple[float, ...]:
        return (math.pi / 2,) * self.ambient_dim  # the diameter, 2 radius long, spans an arc of pi radius

    def chart(self) -> Chart:
        if self.dim == 2:
            return GlobeChart(f"sphere of radius {self.radius:g}, equal-area map")
        return PlaneChart(f"{self._name}, first two coordinates", great_circles=True)

    def section(self) -> tuple[Manifold, Chart]:
        if self.dim == 1:
            return Circle(self.radius), RingChart(self._name, self.radius)
        if self.dim == 2:
            return self, self.chart()
        return Sphere(2, self.radius), GlobeChart(f"great 2-sphere of the {self._name}, equal-area map")

    @property
    def _name(self) -> str:
        return f"{self.dim}-sphere of radius {self.radius:g}"
