"""Masks that are sparse before training begins: the pairs of neurons that are near each other on a manifold."""
from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..geometry.base import Manifold
from ..geometry.checks import embedding_points, points_with_values
from ..geometry.ordering import manifold_order
from ..geometry.presets import manifold as manifold_of
from .blocks import BlockGrid
from .schedules import fraction


@torch.no_grad()
def geometric_mask(rows: Tensor, cols: Tensor | None = None, *, manifold: Manifold | str, density: float,
                   block: int | tuple[int, int] | None = None, generator: torch.Generator | None = None) -> Tensor:
    """The mask that keeps the weights between neurons that are nearest to each other, for nets sparse from the start.

    Without `block`, the round(density * R * C) pairs of the smallest distances are kept (Python's round: halves to
    even). A neuron's weight to itself is among them where rows and columns are the same neurons.

    With `block`, rows and columns are put in `manifold_order` and divided into blocks, of which those at the far edges
    may be smaller. The round(density * blocks) blocks of the smallest mean distance over their pairs are kept whole.
    They are what MagnitudePruner(block=, order=) leaves of a net with a perfect penalty, and SparseRNN runs them faster
    than single weights. The mask is returned in the neurons' own numbering; `rnn.set_order` tells the net the order.

    PyTorch draws weights for the fan-in of the dense matrix. Divide them by the root of the density once, as below, so
    that a neuron's input starts as large as in a dense net.

    Distances are computed on the CPU in float64, so that every device gives the same mask. They take 8 R C bytes.

    Args:
        rows: (R, ambient_dim), floating point, the points of the rows.
        cols: (C, ambient_dim), the points of the columns. None: rows and columns are the same neurons.
        manifold: a Manifold or a preset's name.
        density: the share of pairs, or of blocks, to keep, in [0, 1].
        block: the side of the blocks, or (rows, columns) of a block. None keeps single weights.
        generator: draws which of the pairs or blocks at the same distance are kept where there is no room for all. None
            takes those that come first, row by row.

    Returns:
        (R, C), bool, True where a weight is kept, on the device of rows.

    Raises:
        ValueError: points have a wrong shape, are not finite or hold a zero vector on a sphere, the preset
            is unknown, density lies outside [0, 1], or a side of a block is below 1.
        TypeError: points are no floating-point tensors, density is no number, or block holds no integers.

    Examples:
        >>> rnn, points = mk.SparseRNN(2, 64), mk.FlatTorus().sample(64)
        >>> mask = mk.geometric_mask(points, manifold="torus", density=0.25, block=8)
        >>> rnn.weight_hh_l0.data /= 0.5  # the root of the density
        >>> rnn.set_mask("weight_hh_l0", mask)
        >>> rnn.set_order("weight_hh_l0", mk.manifold_order(points, "torus"))
        >>> int(mask.sum())
        1024
    """
    m = manifold_of(manifold)
    _check_points("rows", rows, m)
    if cols is not None:
        _check_points("cols", cols, m)
    density = fraction("density", density)
    sides = None if block is None else _sides(block)

    x, y = (points.detach().to("cpu", torch.float64) for points in (rows, rows if cols is None else cols))
    if sides is None:
        mask = _smallest(m.squared_distance(x, y), density, generator)
    else:
        order = manifold_order(x, m)
        grid = BlockGrid(order, order if cols is None else manifold_order(y, m), *sides)
        distance = m.distance(x, y)
        mask = grid.spread(_smallest(grid.sums(distance) / grid.sums(torch.ones_like(distance)), density, generator))
    return mask.to(rows.device)


def _smallest(values: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    """Marks the round(density * number) smallest values; see `geometric_mask` for the generator."""
    flat = values.flatten()
    count = round(density * flat.numel())
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    farthest = flat.kthvalue(count).values
    kept = flat < farthest
    equal = (flat == farthest).nonzero()[:, 0]
    if generator is not None:
        equal = equal[torch.randperm(len(equal), generator=generator, device=generator.device).to(equal.device)]
    kept[equal[:count - int(kept.sum())]] = True
    return kept.view(values.shape)


def _check_points(name: str, points: Tensor, manifold: Manifold) -> None:
    is_points = isinstance(points, Tensor) and points.dim() > 0
    embedding_points(points, points.shape[0] if is_points else 0, manifold, name)
    points_with_values(points, name)


def _sides(block: int | tuple[int, int]) -> tuple[int, int]:
    """Returns (rows, columns) of a block."""
    pair = tuple(block) if isinstance(block, (tuple, list)) else (block, block)
    if len(pair) != 2:
        raise ValueError(f"block must be a side or two (rows, columns), got {len(pair)} numbers; pass e.g. 16.")
    return checks.positive_int("block", pair[0]), checks.positive_int("block", pair[1])
