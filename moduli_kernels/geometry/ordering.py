"""Manifold order: a permutation that puts neighbours on the manifold near each other.

A mask that is local on the manifold then fills few blocks of the permuted matrix.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Manifold
from .checks import embedding_points, points_with_values
from .presets import manifold as manifold_of

__all__ = ["manifold_order"]

# Cuts fall on multiples of this number while a piece is larger, so that blocks of 16, 32 and 64 stay whole for any n.
_ALIGNMENT = 64


def manifold_order(points: Tensor, manifold: Manifold | str) -> Tensor:
    """The order of points along a balanced bisection curve of the manifold.

    `weight[order][:, order]` is the weight matrix in manifold order.

    All points are cut in two halves across the coordinate in which they reach farthest, then each half again, and so on
    down to single points. The second half of every cut is walked backwards in the other coordinates, so that the curve
    comes back to where it left off. How far a piece reaches is measured along geodesics: at most period / 2 in a
    periodic coordinate, and by arcs rather than chords on a sphere. Halves hold equally many points, rounded to
    multiples of 64 (powers of two below that), so that every aligned run of 16, 32 or 64 points is a compact cell.

    A Hilbert curve has cells of equal volume instead. The two were compared with the closest 5 % of pairs as the mask
    and n = 650 to 2048: the Hilbert curve fills as many 16 x 16 and 32 x 32 blocks within 7 % on circles, 6-tori and
    S^3, 3 to 27 % more on tori, Klein bottles, 2-spheres and R^3, and 1.6 to 2 times as many on sphere x torus.

    Points are moved into the fundamental domain first, so that equivalent coordinates give the same order, and ties are
    broken by index. A user's own Manifold subclass is cut along the columns of its points. The work is O(n log^2 n), on
    the CPU: 0.04 s for 16384 points of a torus.

    Args:
        points: (n, ambient_dim), floating point.
        manifold: a Manifold or a preset's name.

    Returns:
        (n,), int64, a permutation on the points' device.

    Raises:
        TypeError: points are not a floating-point tensor.
        ValueError: points have a wrong shape, are not finite or hold a zero vector on a sphere, or the preset is
            unknown.
    """
    m = manifold_of(manifold)
    is_points = isinstance(points, Tensor) and points.dim() > 0
    embedding_points(points, points.shape[0] if is_points else 0, m)
    points_with_values(points)
    x = m.fundamental(points.detach().to("cpu", torch.float64))
    stretch, reach = (torch.tensor(lengths, dtype=torch.float64, device="cpu") for lengths in (m.stretch, m.reach))
    return _bisect(x * stretch, reach).to(points.device)


def _bisect(x: Tensor, reach: Tensor) -> Tensor:
    """The bisection curve through points, with all pieces of one level cut at the same time.

    x: (n, k), the points.
    reach: (k,), the largest length that two points can be apart in each column.

    Returns the order, (n,). While it is made, the pieces stand in it one after another: piece p begins at starts[p] and
    is walked along column c in the direction sign[p, c].
    """
    n, k = x.shape
    order = torch.arange(n, device=x.device)
    starts = order.new_zeros(min(n, 1))
    sign = x.new_ones(len(starts), k)
    while len(starts) < n:
        sizes = torch.diff(starts, append=starts.new_full((1,), n))
        piece = torch.arange(len(starts), device=x.device)
        owner = piece.repeat_interleave(sizes)  # (n,): the piece that each place of the order belongs to
        index = owner[:, None].expand(n, k)
        here = x[order]
        high = x.new_full((len(starts), k), -math.inf).scatter_reduce(0, index, here, "amax")
        low = x.new_full((len(starts), k), math.inf).scatter_reduce(0, index, here, "amin")
        axis = torch.minimum(high - low, reach).argmax(1)
        key = here.gather(1, axis[owner][:, None]).squeeze(1) * sign[piece, axis][owner]
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
    """The number of points before the cut, for pieces of these sizes; a single point is not cut.

    It is about half, and a multiple of 64 or of the largest power of two below the size.
    """
    power = 2 ** torch.ceil(torch.log2(sizes.double().clamp(min=2)) - 1).long()
    unit = power.clamp(max=_ALIGNMENT)
    return torch.minimum(((sizes + unit) // (2 * unit)).clamp(min=1) * unit, sizes)
