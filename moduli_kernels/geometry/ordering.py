"""Manifold order: a permutation that puts neighbours on the manifold near each other, so that a mask that is
local on the manifold fills few blocks of the permuted matrix.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks
from .manifolds import Circle, FlatTorus, KleinBottle, Manifold, Sphere, manifold as manifold_of

# Cuts fall on multiples of this while a piece is larger, so blocks of 16, 32 and 64 stay whole for any n.
_ALIGNMENT = 64


def manifold_order(points: Tensor, manifold: Manifold | str) -> Tensor:
    """The order of points along a balanced bisection curve of the manifold: `weight[order][:, order]` is the weight
    matrix in manifold order.

    All points are cut in two halves across the coordinate in which they reach farthest, each half again,
    and so on down to single points; the second half of every cut is walked backwards in the other
    coordinates, so that the curve comes back to where it left off. How far a piece reaches is measured
    along geodesics: at most period / 2 on a periodic coordinate, arcs rather than chords on a sphere.
    Halves hold equally many points, rounded to multiples of 64 (powers of two below that), which makes
    every aligned run of 16, 32 or 64 points a compact cell.

    A Hilbert curve, whose cells hold equal volume instead, was measured against it with the closest 5 % of
    pairs as mask and n = 650 to 2048: it fills as many 16 x 16 and 32 x 32 blocks within 7 % on circles,
    6-tori and S^3, 3 to 27 % more on tori, Klein bottles, 2-spheres and R^3, and 1.6 to 2 times as many on
    sphere x torus.

    Points are brought into the fundamental domain first, so equivalent coordinates give the same order.
    Ties are broken by index. A Manifold subclass of one's own is cut along its columns as they are. O(n
    log^2 n), on the CPU: 0.04 s for 16384 points of a torus.

    Args:
        points: (n, ambient_dim), floating point.
        manifold: a Manifold or a preset's name.

    Returns:
        (n,), int64, a permutation on the points' device.

    Raises:
        TypeError: points are no floating-point tensor.
        ValueError: a wrong shape, non-finite points, a zero vector on a sphere or an unknown preset.
    """
    m = manifold_of(manifold)
    is_points = isinstance(points, Tensor) and points.dim() > 0
    checks.embedding_points(points, points.shape[0] if is_points else 0, m)
    stretch, reach = _geodesic_lengths(m)
    return _bisect(fundamental(points, m) * stretch, reach).to(points.device)


def fundamental(points: Tensor, manifold: Manifold) -> Tensor:
    """The representative of each point in the fundamental domain, (n, c) float64 on the CPU: periodic
    columns in [0, period), the Klein bottle in [0, width) x [0, height), spheres normalized to their
    radius."""
    x = points.detach().to("cpu", torch.float64)
    factors = manifold.factors()
    parts = x.split([f.ambient_dim for f in factors], dim=1)
    return torch.cat([_fundamental_factor(p, f) for p, f in zip(parts, factors)], 1)


def _fundamental_factor(x: Tensor, m: Manifold) -> Tensor:
    if isinstance(m, Circle):
        return _remainder(x, 2 * math.pi * m.radius)
    if isinstance(m, FlatTorus):
        return torch.stack([_remainder(x[:, c], p) for c, p in enumerate(m.periods)], 1)
    if isinstance(m, KleinBottle):
        along = _remainder(x[:, 0], 2 * m.width)
        second = along >= m.width  # (x + width, y) ~ (x, -y)
        across = _remainder(torch.where(second, -x[:, 1], x[:, 1]), m.height)
        return torch.stack([torch.where(second, along - m.width, along), across], 1)
    if isinstance(m, Sphere):
        return m.radius * torch.nn.functional.normalize(x, dim=1, eps=0.0)
    return x


def _remainder(x: Tensor, period: float) -> Tensor:
    """x modulo period in [0, period); the exact remainder of a tiny negative x rounds to period, which is
    0."""
    r = torch.remainder(x, period)
    return torch.where(r >= period, torch.zeros_like(r), r)


def _geodesic_lengths(manifold: Manifold) -> tuple[Tensor, Tensor]:
    """For each column of `fundamental`, as float64 (c,): the factor that turns its extent into a geodesic
    length, and the largest such length that two points can be apart (infinite where the extent alone
    decides)."""
    stretch: list[float] = []
    reach: list[float] = []
    for f in manifold.factors():
        k = f.ambient_dim
        sphere = isinstance(f, Sphere)
        stretch += [math.pi / 2 if sphere else 1.0] * k  # the diameter 2 r of a sphere is an arc of pi r
        if isinstance(f, Circle):
            reach += [math.pi * f.radius]
        elif isinstance(f, FlatTorus):
            reach += [p / 2 for p in f.periods]
        elif isinstance(f, KleinBottle):
            reach += [f.width / 2, f.height / 2]
        else:
            reach += [math.inf] * k
    return torch.tensor(stretch, dtype=torch.float64), torch.tensor(reach, dtype=torch.float64)


def _bisect(x: Tensor, reach: Tensor) -> Tensor:
    """The bisection curve through x (n, k), all pieces of one level cut at once; `order` (n,) holds the
    pieces one after another, piece p starting at starts[p] and walked along column c in direction sign[p,
    c]."""
    n, k = x.shape
    order = torch.arange(n)
    starts = torch.zeros(min(n, 1), dtype=torch.int64)
    sign = torch.ones(len(starts), k, dtype=x.dtype)
    while len(starts) < n:
        sizes = torch.diff(starts, append=torch.tensor([n]))
        piece = torch.arange(len(starts))
        owner = piece.repeat_interleave(sizes)  # (n,): which piece each place of the order lies in
        index = owner[:, None].expand(n, k)
        here = x[order]
        high = torch.full((len(starts), k), -math.inf, dtype=x.dtype).scatter_reduce(0, index, here, "amax")
        low = torch.full((len(starts), k), math.inf, dtype=x.dtype).scatter_reduce(0, index, here, "amin")
        axis = torch.minimum(high - low, reach).argmax(1)
        key = here[torch.arange(n), axis[owner]] * sign[piece, axis][owner]
        by_key = torch.argsort(key, stable=True)
        order = order[by_key[torch.argsort(owner[by_key], stable=True)]]

        first = _first_half(sizes)
        cut = first < sizes
        second_sign = -sign
        second_sign[piece, axis] *= -1
        starts, place = torch.cat([starts, (starts + first)[cut]]).sort()
        sign = torch.cat([sign, second_sign[cut]])[place]
    return order


def _first_half(sizes: Tensor) -> Tensor:
    """How many points come before the cut: about half, a multiple of 64 or of the largest power of two
    below the size; a single point is not cut."""
    power = 2 ** torch.ceil(torch.log2(sizes.double().clamp(min=2)) - 1).long()
    unit = power.clamp(max=_ALIGNMENT)
    return torch.minimum(((sizes + unit) // (2 * unit)).clamp(min=1) * unit, sizes)
