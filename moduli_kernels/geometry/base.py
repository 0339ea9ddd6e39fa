"""The base classes of manifolds and inhibitors, and their kernel form.

The package works with the SQUARED distance s = d^2. Flat manifolds then need no square root, and s is smooth at d = 0.
A manifold gives s, and it pulls a gradient in s back to the coordinates of the points. An inhibitor gives f and df/ds
as functions of s. These formulas are written three times, and the tests compare the writings: in plain PyTorch here, in
C++ in csrc/manifolds.h and csrc/inhibitors.h, and in Triton in moduli_kernels/triton/.

To add a manifold or an inhibitor, write its class in a file of this folder, give it a `kernel_form`, and name it in
that file's `__all__`. The class then registers itself, and everything else finds it in MANIFOLDS or INHIBITORS.
"""
from __future__ import annotations

import bisect
import math
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .chart_kinds import Chart, PlaneChart
from .maths import floating, sqrt_of_square

__all__ = ["Inhibitor", "Manifold"]


# --- how a class crosses into the kernels ----------------------------------------------------------------------

class KernelForm(NamedTuple):
    """The numbers that stand for a manifold or an inhibitor in the compiled kernels.

    code: the number by which the kernels know the class. Circle, FlatTorus and Euclidean share one, since a flat
        coordinate with its period is all that the kernels need to know about them.
    parameters: the names of the attributes that the kernels take, in the order in which they read them. The value of an
        attribute is a number, or a tuple of floats that are handed over one after another.
    """

    code: int
    parameters: tuple[str, ...]

    def values(self, owner: Manifold | Inhibitor) -> list[float]:
        """The parameters of one manifold or inhibitor."""
        found: list[float] = []
        for name in self.parameters:
            value = getattr(owner, name)
            if isinstance(value, tuple):
                found += value
            else:
                found.append(float(value))
        return found


MANIFOLDS: list[type[Manifold]] = []
"""The manifolds that have a kernel form, in the order of their codes. A class is added when it is defined."""

INHIBITORS: list[type[Inhibitor]] = []
"""The inhibitors that have a kernel form, in the order of their codes. A class is added when it is defined."""


def _register(cls: type[Any], registry: list[type[Any]]) -> None:
    """Adds a class that declares a kernel form. A subclass of it may redefine anything, so it inherits no form."""
    cls.kernel_form = cls.__dict__.get("kernel_form")
    if cls.kernel_form is not None:
        bisect.insort(registry, cls, key=lambda known: known.kernel_form.code)


# --- base classes ----------------------------------------------------------------------------------------------

class Manifold:
    """Base class of all manifolds.

    A subclass defines `ambient_dim`, `sample` and `squared_distance`. It then works everywhere, through the tiled
    PyTorch path: this is slower than the compiled kernels, and a warning says so once.
    """

    kernel_form: ClassVar[KernelForm | None] = None
    """How the compiled kernels know this class; None if they do not."""

    ambient_dim: int
    """The number of coordinates of a point."""

    warned: ClassVar[set[str]] = set()
    """The names that `warn_tiled` has warned about."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        _register(cls, MANIFOLDS)

    @classmethod
    def from_kernel(cls, columns: int, parameters: Iterator[float]) -> tuple[Manifold, ...]:
        """The way back from the kernel form: the manifolds whose product one factor of a kernel is.

        columns: the number of coordinates of the factor.
        parameters: those of this factor come next; as many are taken as the class has.
        """
        assert cls.kernel_form is not None
        return (cls(**{name: next(parameters) for name in cls.kernel_form.parameters}),)

    def sample(self, n: int, *, generator: torch.Generator | None = None, dtype: torch.dtype | None = None,
               device: torch.device | str | None = None) -> Tensor:
        """Draws n points, uniformly on the manifold where that is possible: (n, ambient_dim).

        Args:
            n: the number of points, at least 0.
            generator: makes the points reproducible; they are drawn on its device.
            dtype: the dtype of the points; None means torch's default.
            device: the device of the points; None means the generator's, or else the CPU.

        Raises:
            ValueError: n < 0.
            TypeError: n is not an integer.
        """
        raise NotImplementedError

    def squared_distance(self, x: Tensor, y: Tensor) -> Tensor:
        """The squared geodesic distances of all pairs of points, differentiable.

        Args:
            x: (n, ambient_dim), floating point.
            y: (m, ambient_dim), floating point.

        Returns:
            (n, m), in the square of the manifold's unit of length.

        Raises:
            TypeError: x or y is not a floating-point tensor.
            ValueError: x or y has another shape, or they are on two devices.
        """
        raise NotImplementedError

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """The geodesic distances of all pairs of points, differentiable; the gradient is 0 where d = 0.

        Args:
            x: (n, ambient_dim), floating point.
            y: (m, ambient_dim), floating point.

        Returns:
            (n, m), in the manifold's unit of length.

        Raises:
            TypeError: x or y is not a floating-point tensor.
            ValueError: x or y has another shape, or they are on two devices.
        """
        return sqrt_of_square(self.squared_distance(x, y))

    def pull_back(self, x: Tensor, y: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Turns a gradient in s into gradients in the points: sum_j slope_ij ds_ij/dx_i and sum_i slope_ij ds_ij/dy_j.

        The base class differentiates `squared_distance` by autograd; the built-in manifolds write the formula out.

        Args:
            x: (n, ambient_dim).
            y: (m, ambient_dim).
            slope: (n, m), the gradient in s.

        Returns:
            The gradients in x and in y, (n, ambient_dim) and (m, ambient_dim).
        """
        with torch.enable_grad():
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            dx, dy = torch.autograd.grad(self.squared_distance(x, y), (x, y), slope)
            return dx, dy

    def check_points(self, points: Tensor) -> None:
        """Raises an error if finite coordinates (n, ambient_dim) are not points of the manifold.

        Raises:
            ValueError: a row is not a point, such as a zero vector on a sphere.
        """

    def grid(self, n: int) -> Tensor:
        """n points that are spread regularly: (n, ambient_dim), float64.

        Raises:
            ValueError: the manifold has no regular points. Flat manifolds and the 2-sphere have them.
        """
        raise ValueError(
            f"layout must be 'uniform' for {self}, got 'grid' (only flat manifolds and the 2-sphere have one); "
            "use 'uniform' or pass points="
        )

    def factors(self) -> tuple[Manifold, ...]:
        """The manifolds that this one is a product of; a manifold that is no product is its own only factor."""
        return (self,)

    def fundamental(self, points: Tensor) -> Tensor:
        """Moves points into the fundamental domain, so that equivalent coordinates become equal.

        Periodic coordinates come into [0, period), points of the Klein bottle into [0, width) x [0, height), and points
        of a sphere to length radius. The base class changes nothing.

        Args:
            points: (n, ambient_dim), finite.

        Returns:
            (n, ambient_dim), in the dtype of the points.
        """
        return points

    @property
    def stretch(self) -> tuple[float, ...]:
        """For each coordinate: the factor that turns its extent into a geodesic length, 1 if it is one already."""
        return (1.0,) * self.ambient_dim

    @property
    def reach(self) -> tuple[float, ...]:
        """For each coordinate: the largest geodesic length that two points can be apart in it, perhaps infinite."""
        return (math.inf,) * self.ambient_dim

    def chart(self) -> Chart:
        """How points and the shortest paths between them are drawn in the plane."""
        some = ", first two coordinates" if self.ambient_dim > 2 else ""
        return PlaneChart(type(self).__name__ + some)

    def section(self) -> tuple[Manifold, Chart]:
        """A part of this manifold that can be drawn with true distances, and its chart.

        The part is totally geodesic: the distance of two of its points within it is their distance in this manifold.
        """
        return self, self.chart()

    @classmethod
    def warn_tiled(cls, name: str, what: str) -> None:
        """Warns that `what` (the manifold or the inhibitor) of this name has no compiled kernel, once for each name."""
        if name not in Manifold.warned:
            Manifold.warned.add(name)
            warnings.warn(f"{what} {name} has no compiled kernel: the penalty runs through the tiled PyTorch path, "
                          "with the same result and slower.", stacklevel=4)


class Inhibitor:
    """Base class of the built-in inhibitors f(d) >= 0: the cost of a connection between neurons at distance d.

    A subclass defines `from_squared` and `slope`.
    """

    kernel_form: ClassVar[KernelForm | None] = None
    """How the compiled kernels know this class; None if they do not."""

    trainable: ClassVar[bool] = True
    """False where f is monotone. Trained points then collapse to one point or, where f is constant, never move."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        _register(cls, INHIBITORS)

    @classmethod
    def from_kernel(cls, parameters: list[float], table: Tensor | None) -> Inhibitor:
        """The way back from the kernel form.

        parameters: those that `kernel_form` names.
        table: (samples, 4), the cubics of a TabulatedInhibitor, which the kernels take beside its parameters.
        """
        assert cls.kernel_form is not None
        return cls(**dict(zip(cls.kernel_form.parameters, parameters)))

    @property
    def needs_points(self) -> bool:
        """Whether f is known only once there are points (`at_points`). So it is for zero_min="sampled" alone."""
        return False

    def at_points(self, manifold: Manifold, rows: Tensor, cols: Tensor | None = None) -> Inhibitor:
        """The inhibitor for these points: itself, unless it `needs_points`. That waits for a GPU.

        Args:
            manifold: where the points are.
            rows: (R, ambient_dim), the points of the rows.
            cols: (C, ambient_dim), the points of the columns. None: the rows' points.
        """
        return self

    def __call__(self, d: Tensor) -> Tensor:
        """f(d), elementwise and differentiable.

        Args:
            d: distances, at least 0, of any shape; integers and numbers are accepted too.

        Returns:
            The costs, in the shape of d.
        """
        return self.from_squared(floating(d).square())

    def from_squared(self, s: Tensor) -> Tensor:
        """f as a function of the squared distance s = d^2, elementwise."""
        raise NotImplementedError

    def slope(self, s: Tensor) -> Tensor:
        """df/ds, elementwise and finite; where df/ds diverges at s = 0, it is taken to be 0 there."""
        raise NotImplementedError
