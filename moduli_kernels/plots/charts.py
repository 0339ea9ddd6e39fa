"""How each kind of chart is drawn in the plane: where points go, and how the shortest paths between them run.

A manifold says which chart it has, and what the picture shows (`Manifold.chart`, `Manifold.section`). `chart` and
`section` return the picture that draws it: of one factor, `part`, from its columns `columns` of the points. Coordinates
come from `Manifold.fundamental`, as float64 NumPy arrays. A picture has

    place(x)      moves points (n, c) to positions (n, 2).
    links(a, b)   joins pairs of points, each (l, c), by polylines [(m, 2)], cut where a path crosses the border.
    mesh(size)    gives a grid of cells, or None where there is no such grid.
    frame(ax)     draws the border, and sets limits and axis labels.
    shrink        is the height of the picture as a part of its width, for a colour bar beside it.
"""
from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..geometry.base import Manifold
from ..geometry.chart_kinds import Chart, GlobeChart, PlaneChart, RectangleChart, RingChart

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ARC = np.linspace(0, 1, 33)  # the parameters of the points that make a curved link


def chart(manifold: Manifold) -> Ring | Rectangle | Globe | Plane:
    """The picture of a manifold, in which points lie; a product shows its first factor."""
    return _picture(manifold.factors()[0], manifold.chart())


def section(manifold: Manifold) -> Ring | Rectangle | Globe | Plane:
    """The picture of a part of a manifold, in which distances are those of the manifold."""
    return _picture(*manifold.section())


def _picture(part: Manifold, data: Chart) -> Ring | Rectangle | Globe | Plane:
    if isinstance(data, RingChart):
        return Ring(part, data)
    if isinstance(data, RectangleChart):
        return Rectangle(part, data)
    return Globe(part, data) if isinstance(data, GlobeChart) else Plane(part, data)


class Mesh(NamedTuple):
    """A grid of cells over a picture, as matplotlib's pcolormesh takes it, and points of the manifold in the cells.

    x: (rows + 1, columns + 1), where the corners of the cells are in the picture.
    y: the same.
    points: (rows * columns, c), the points at the middles of the cells, row by row.
    reference: (1, c), the point from which distances are measured.
    """

    x: np.ndarray
    y: np.ndarray
    points: np.ndarray
    reference: np.ndarray


class _Picture:
    shrink = 1.0

    def __init__(self, part: Manifold, data: Chart):
        self.part, self.label = part, data.label
        self.columns = slice(0, part.ambient_dim)


class Ring(_Picture):
    """A circle of the given radius. Links bow inwards, deeper where their ends are farther apart."""

    def __init__(self, part: Manifold, data: RingChart):
        super().__init__(part, data)
        self.radius = data.radius

    def _at(self, arc: np.ndarray, radius: float | np.ndarray) -> np.ndarray:
        angle = arc / self.radius
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)

    def place(self, x: np.ndarray) -> np.ndarray:
        return self._at(x[:, 0], self.radius)

    def links(self, a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
        delta = _wrap(b - a, 2 * math.pi * self.radius)  # (l, 1)
        pull = self.radius * (0.88 - 0.83 * np.abs(delta) / (math.pi * self.radius))
        begin, end = self._at(a, self.radius), self._at(b, self.radius)
        control = self._at(a + delta / 2, pull)
        t = _ARC[:, None]
        return list((1 - t) ** 2 * begin + 2 * t * (1 - t) * control + t**2 * end)  # quadratic Bezier curves

    def mesh(self, size: int) -> Mesh:
        edges = np.linspace(0, 2 * math.pi * self.radius, 4 * size + 1)
        corners = np.stack([self._at(edges, 0.8 * self.radius), self._at(edges, 1.2 * self.radius)])
        return Mesh(corners[..., 0], corners[..., 1], _middles(edges)[:, None], np.zeros((1, 1)))

    def frame(self, ax: Axes) -> None:
        around = self._at(np.linspace(0, 2 * math.pi * self.radius, 361), self.radius)
        ax.plot(*around.T, color="0.8", linewidth=1, zorder=0)
        _equal(ax, 1.25 * self.radius, 1.25 * self.radius)
        ax.set(xlabel="x (manifold units)", ylabel="y (manifold units)")


class Rectangle(_Picture):
    """The first two coordinates of a flat torus, or the Klein bottle (`glide`), in the fundamental rectangle."""

    def __init__(self, part: Manifold, data: RectangleChart):
        super().__init__(part, data)
        self.sides = np.array(data.sides)
        self.glide = data.glide

    def place(self, x: np.ndarray) -> np.ndarray:
        return x[:, :2]

    def links(self, a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
        a, b = a[:, :2], b[:, :2]
        delta = _wrap(b - a, self.sides)
        if self.glide:
            # The images of b are (x + 2 i width, y + j height) and (x + (2 i + 1) width, -y + j height).
            width, height = self.sides
            delta[:, 0] = _wrap(b[:, 0] - a[:, 0], 2 * width)
            along, across = _wrap(b[:, 0] + width - a[:, 0], 2 * width), _wrap(-b[:, 1] - a[:, 1], height)
            flipped = np.stack([along, across], 1)
            nearer = (flipped**2).sum(1) < (delta**2).sum(1)
            delta = np.where(nearer[:, None], flipped, delta)
        return self._cut(a, delta)

    def _cut(self, a: np.ndarray, delta: np.ndarray) -> list[np.ndarray]:
        """The straight lines a + t delta of the plane, cut at the rectangle's border, each piece moved back into it.

        No component of delta is longer than a side, so each border is crossed at most once.
        """
        end = a + delta
        border = np.where(end < 0, 0.0, self.sides)
        crosses = (end < 0) | (end > self.sides)
        at = np.where(crosses, (border - a) / np.where(delta == 0, 1.0, delta), 1.0)
        t = np.sort(np.concatenate([np.zeros_like(at[:, :1]), at, np.ones_like(at[:, :1])], 1), 1)  # (l, 4)
        corners = a[:, None] + t[..., None] * delta[:, None]
        pieces = np.stack([corners[:, :-1], corners[:, 1:]], 2).reshape(-1, 2, 2)
        pieces = pieces[(np.ptp(pieces, axis=1) > 1e-12 * self.sides).any(1)]
        turns = np.floor(pieces.mean(1, keepdims=True)[..., :1] / self.sides[0])
        pieces[..., :1] -= turns * self.sides[0]
        if self.glide:
            pieces[..., 1:] *= np.where(turns % 2 == 1, -1, 1)
        pieces[..., 1:] -= np.floor(pieces.mean(1, keepdims=True)[..., 1:] / self.sides[1]) * self.sides[1]
        return list(pieces)

    def mesh(self, size: int) -> Mesh:
        x, y = (np.linspace(0, side, size + 1) for side in self.sides)
        points = np.zeros((size * size, self.part.ambient_dim))
        points[:, :2] = np.stack(np.meshgrid(_middles(x), _middles(y)), -1).reshape(-1, 2)
        reference = np.zeros((1, self.part.ambient_dim))
        reference[0, :2] = 0.3 * self.sides  # a point in the middle would not show how the borders are glued
        corners_x, corners_y = np.meshgrid(x, y)
        return Mesh(corners_x, corners_y, points, reference)

    def frame(self, ax: Axes) -> None:
        ax.set(xlim=(0, self.sides[0]), ylim=(0, self.sides[1]), aspect="equal", xlabel="x (manifold units)",
               ylabel="y (manifold units)")


class Globe(_Picture):
    """The 2-sphere on the Hammer projection, which keeps areas; longitudes run from -180 to 180 degrees."""

    shrink = 0.5

    def place(self, x: np.ndarray) -> np.ndarray:
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        longitude = np.arctan2(x[..., 1] + 0.0, x[..., 0])  # y = -0.0 is on the side of the date line where y >= 0
        return self._project(longitude, np.arcsin(np.clip(x[..., 2], -1, 1)))

    @staticmethod
    def _project(longitude: np.ndarray, latitude: np.ndarray) -> np.ndarray:
        z = np.sqrt(1 + np.cos(latitude) * np.cos(longitude / 2))
        x = 2 * math.sqrt(2) * np.cos(latitude) * np.sin(longitude / 2)
        return np.stack([x, math.sqrt(2) * np.sin(latitude)], -1) / z[..., None]

    def links(self, a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
        return [piece for arc in great_circles(a, b) for piece in self._cut(arc)]

    def _cut(self, arc: np.ndarray) -> list[np.ndarray]:
        """One arc (m, 3) on the map, in pieces that end at the border where the arc crosses the date line.

        The date line is the half circle with y = 0 and x < 0.
        """
        pieces, line = [], self.place(arc)
        side = arc[:, 1] >= 0
        begin = line[:0]
        start = 0
        for i in np.nonzero(side[1:] != side[:-1])[0]:
            p, q = arc[i], arc[i + 1]
            x, _, z = p + (q - p) * p[1] / (p[1] - q[1])
            if x < 0:
                edges = self._project(np.array([1, -1]) * math.pi, np.full(2, math.atan2(z, -x)))
                leave, enter = edges if side[i] else edges[::-1]
                pieces.append(np.concatenate([begin, line[start:i + 1], leave[None]]))
                begin, start = enter[None], i + 1
        return [*pieces, np.concatenate([begin, line[start:]])]

    def mesh(self, size: int) -> Mesh:
        longitude = np.linspace(-math.pi, math.pi, 2 * size + 1)
        latitude = np.linspace(-math.pi / 2, math.pi / 2, size + 1)
        corners = self._project(*np.meshgrid(longitude, latitude))
        lon, lat = np.meshgrid(_middles(longitude), _middles(latitude))
        points = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], -1)
        return Mesh(corners[..., 0], corners[..., 1], points.reshape(-1, 3), np.array([[1.0, 0.0, 0.0]]))

    def frame(self, ax: Axes) -> None:
        latitude = np.linspace(-math.pi / 2, math.pi / 2, 91)
        for longitude in np.radians((-180, -120, -60, 0, 60, 120, 180)):
            edge = abs(longitude) > 3
            ax.plot(*self._project(np.full(91, longitude), latitude).T, color="0.5" if edge else "0.85",
                    linewidth=1 if edge else 0.5, zorder=0)
        for parallel in np.radians((-60, -30, 0, 30, 60)):
            along = np.linspace(-math.pi, math.pi, 91)
            ax.plot(*self._project(along, np.full(91, parallel)).T, color="0.85", linewidth=0.5, zorder=0)
        _equal(ax, 1.02 * 2 * math.sqrt(2), 1.02 * math.sqrt(2))
        ax.set(xticks=[], yticks=[], xlabel="longitude (meridian every 60°)",
               ylabel="latitude (parallel every 30°)")
        ax.spines[:].set_visible(False)


class Plane(_Picture):
    """The first two coordinates of any other manifold; a single coordinate is drawn on a line."""

    def __init__(self, part: Manifold, data: PlaneChart):
        super().__init__(part, data)
        self.box, self.great_circles = data.box, data.great_circles

    def place(self, x: np.ndarray) -> np.ndarray:
        return np.pad(x, ((0, 0), (0, max(0, 2 - x.shape[1]))))[:, :2]

    def links(self, a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
        if self.great_circles:
            return [self.place(arc) for arc in great_circles(a, b)]
        return list(np.stack([self.place(a), self.place(b)], 1))

    def mesh(self, size: int) -> Mesh | None:
        if self.box is None:
            return None
        x, y = (np.linspace(0, side, size + 1) for side in self.box[:2])
        middle = np.array([self.box]) / 2
        points = np.repeat(middle, size * size, 0)
        points[:, :2] = np.stack(np.meshgrid(_middles(x), _middles(y)), -1).reshape(-1, 2)
        corners_x, corners_y = np.meshgrid(x, y)
        return Mesh(corners_x, corners_y, points, middle)

    def frame(self, ax: Axes) -> None:
        ax.set_aspect("equal", adjustable="datalim")
        ax.set(xlabel="coordinate 1 (manifold units)", ylabel="coordinate 2 (manifold units)")


def _wrap(d: np.ndarray, period: float | np.ndarray) -> np.ndarray:
    return d - period * np.floor(d / period + 0.5)


def _middles(edges: np.ndarray) -> np.ndarray:
    return (edges[1:] + edges[:-1]) / 2


def _equal(ax: Axes, x: float, y: float) -> None:
    ax.set(xlim=(-x, x), ylim=(-y, y), aspect="equal")


def great_circles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Equally spaced points along the shortest arcs from a to b, each (l, c): (l, 33, c).

    Antipodes have no single shortest arc, so any one is taken.
    """
    radius = np.linalg.norm(a, axis=1, keepdims=True)
    u, v = a / radius, b / np.linalg.norm(b, axis=1, keepdims=True)
    angle = 2 * np.arctan2(np.linalg.norm(u - v, axis=1), np.linalg.norm(u + v, axis=1))[:, None]
    tangent = v - (u * v).sum(1, keepdims=True) * u
    length = np.linalg.norm(tangent, axis=1, keepdims=True)
    spare = np.eye(a.shape[1])[np.abs(u).argmin(1)]
    spare -= (u * spare).sum(1, keepdims=True) * u
    tangent = np.where(length > 1e-12, tangent, spare)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    t = _ARC[:, None] * angle[:, None]  # (l, 33, 1)
    return radius[:, None] * (np.cos(t) * u[:, None] + np.sin(t) * tangent[:, None])
