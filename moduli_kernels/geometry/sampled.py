"""The largest value that a function with one peak takes over all pairs of points."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .base import Manifold

_TILE = 1 << 18  # pairs in a strip


def largest_over_pairs(g: Callable[[Tensor], Tensor], peak: float, manifold: Manifold, rows: Tensor,
                       cols: Tensor | None) -> Tensor:
    """max over i, j of g(d(rows_i, cols_j)^2), for g that rises up to `peak` and falls beyond it.

    The maximum is at the largest squared distance up to the peak or at the smallest one beyond it, so that g itself is
    computed for two pairs only. It is differentiable in the points of the pair that is found: only this pair has a
    gradient. A pair at a distance that is NaN is passed over. Nothing waits for a GPU, and the temporaries have about
    2^18 entries (under torch.compile, which fuses them, all pairs are taken at once).

    Args:
        g: a function of squared distances, elementwise.
        peak: the squared distance at which g is largest.
        manifold: where the points are.
        rows: (R, k), floating point.
        cols: (C, k). None: the rows' points.

    Returns:
        0-d, in the dtype of the points; 0 where there is no pair.
    """
    y = rows if cols is None else cols
    if not len(rows) or not len(y):
        return rows.new_zeros(())
    with torch.no_grad():
        below, above = (torch.stack(found) for found in zip(*_nearest_to(peak, manifold, rows, y)))
    values = []
    for pairs in (_first(below, smallest=False), _first(above, smallest=True)):
        s, i, j = pairs.unbind()
        index_i, index_j = i.long().view(1), j.long().view(1)
        own = manifold.squared_distance(rows.index_select(0, index_i), y.index_select(0, index_j)).view(())
        values.append(torch.where(s.isfinite(), g(own), -math.inf))
    return torch.maximum(*values).clamp(min=-torch.finfo(rows.dtype).max)


def _nearest_to(peak: float, manifold: Manifold, rows: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each strip of rows: (s, i, j) of the largest squared distance up to the peak, and of the smallest beyond it.

    Each is (3,), float64; s is -inf or inf where the strip has no such pair.
    """
    step = len(rows) if torch.compiler.is_compiling() else max(1, _TILE // len(y))
    for start in range(0, len(rows), step):
        s = manifold.squared_distance(rows[start:start + step], y)
        yield (_at(torch.where(s <= peak, s, -math.inf), start, smallest=False),
               _at(torch.where(s >= peak, s, math.inf), start, smallest=True))


def _at(s: Tensor, start: int, smallest: bool) -> Tensor:
    """(value, row, column) of the extreme entry of a strip whose first row has the number `start`."""
    value, place = (s.amin(), s.argmin()) if smallest else (s.amax(), s.argmax())
    return torch.stack([value.double(), (place // s.shape[1] + start).double(), (place % s.shape[1]).double()])


def _first(found: Tensor, smallest: bool) -> Tensor:
    """The (3,) among (strips, 3) with the extreme first entry."""
    place = found[:, 0].argmin() if smallest else found[:, 0].argmax()
    return found.index_select(0, place.view(1)).view(3)
