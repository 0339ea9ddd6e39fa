"""The kinds of charts in which manifolds are drawn, as data.

A manifold names its chart in `Manifold.chart`. moduli_kernels/plots/charts.py draws each kind; it is a file of its own
because matplotlib is optional.
"""
from __future__ import annotations

from typing import NamedTuple


class RingChart(NamedTuple):
    """A circle, drawn as one.

    label: what the picture shows, for its title.
    radius: the circumference is 2 pi radius; the only coordinate of a point is its arc length.
    """

    label: str
    radius: float


class RectangleChart(NamedTuple):
    """The first two coordinates, in a rectangle whose opposite sides are glued.

    label: what the picture shows, for its title.
    sides: width and height.
    glide: the left side is glued to the right one upside down, (0, y) ~ (width, height - y), as in the Klein bottle.
    """

    label: str
    sides: tuple[float, float]
    glide: bool = False


class GlobeChart(NamedTuple):
    """The 2-sphere, drawn on an equal-area map.

    label: what the picture shows, for its title.
    """

    label: str


class PlaneChart(NamedTuple):
    """The first two coordinates, in the plane. This fits every manifold; a single coordinate is drawn on a line.

    label: what the picture shows, for its title.
    box: the sides of the box, one a coordinate, over which an inhibitor is drawn as an image. With None it is drawn at
        sampled points.
    great_circles: shortest paths are arcs of great circles; otherwise they are straight.
    """

    label: str
    box: tuple[float, ...] | None = None
    great_circles: bool = False


Chart = RingChart | RectangleChart | GlobeChart | PlaneChart
