"""Kept connections by the distance of their two neurons: counted, and as histograms in TensorBoard."""
from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import checks
from .geometry.manifolds import Manifold, manifold as manifold_of
from .penalty.attach import Regularization, Target, parameter_of
from .penalty.modules import ModuliRegularizer
from .pruning.pruner import MagnitudePruner

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_TILE = 256  # rows looked at together: nothing n x n is made


class KeptByDistance(NamedTuple):
    """edges (bins + 1,): of the bins, float64, in the manifold's units. fraction (bins,): kept share of the connections
    in each bin, float64, NaN where a bin has none. counts (bins,): all connections in each bin, int64."""

    edges: Tensor
    fraction: Tensor
    counts: Tensor


def kept_by_distance(mask: Tensor, points: Tensor, manifold: Manifold | str, *, cols: Tensor | None = None,
                     bins: int = 30, blocks: int = 1) -> KeptByDistance:
    """The share of connections kept, by the geodesic distance of their two neurons.

    Args:
        mask: (blocks*R, C) or (R, C, *kernel): bool, True = kept, or weights, non-zero = kept; a kernel is kept where
            any of it is.
        points: (R, ambient_dim), of the rows.
        manifold: a Manifold or a preset's name.
        cols: (C, ambient_dim), of the columns, None = points.
        bins: how many of equal width, from 0 to the largest distance.
        blocks: gate blocks stacked in rows that share the points.

    Returns:
        KeptByDistance, on the CPU. Looks at 256 rows at a time, in float64, twice: first for the largest distance.

    Raises:
        ValueError, TypeError: mask or points do not fit, an unknown preset, bins < 1.
    """
    m = manifold_of(manifold)
    checks.positive_int("bins", bins)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor (rows, columns), got a {type(mask).__name__}; pass "
                        "torch.as_tensor(mask).")
    if mask.layout != torch.strided:
        raise TypeError(f"mask must be dense, got {mask.layout}; pass mask.to_dense().")
    blocks = checks.positive_int("blocks", blocks)
    if mask.dim() < 2 or not mask.numel() or mask.shape[0] % blocks:
        raise ValueError(f"mask must have shape (blocks*R, C) with blocks={blocks} and R, C at least 1, got "
                         f"{tuple(mask.shape)}; of a vector there are no connections.")
    rows = mask.shape[0] // blocks
    checks.embedding_points(points, rows, m)
    if cols is not None:
        checks.embedding_points(cols, mask.shape[1], m)
    elif mask.shape[1] != rows:
        raise ValueError(f"cols must be the points of the {mask.shape[1]} columns, got None, which means that rows and "
                         f"columns are the same neurons, beside {rows} rows; pass cols.")
    x = points.detach().to("cpu", torch.float64)
    y = x if cols is None else cols.detach().to("cpu", torch.float64)
    tiles = range(0, rows, _TILE)
    largest = max(float(m.distance(x[t:t + _TILE], y).max()) for t in tiles) or 1.0
    pairs, kept = np.zeros(bins, np.int64), np.zeros(bins, np.int64)
    for t in tiles:
        d = m.distance(x[t:t + _TILE], y)
        pairs += blocks * np.histogram(d.numpy(), bins, (0, largest))[0]
        for first in range(t, mask.shape[0], rows):
            there = mask[first:first + len(d)].detach().cpu().ne(0)
            there = there.flatten(2).any(2) if there.dim() > 2 else there
            kept += np.histogram(d[there].numpy(), bins, (0, largest))[0]
    fraction = np.divide(kept, pairs, out=np.full(bins, np.nan), where=pairs > 0)
    edges = torch.from_numpy(np.linspace(0, largest, bins + 1))
    return KeptByDistance(edges, torch.from_numpy(fraction), torch.from_numpy(pairs))


def add_histograms(writer: SummaryWriter, reg: Regularization, step: int, *, pruner: MagnitudePruner | None = None,
                   bins: int = 30) -> None:
    """Writes, for each weight that reg penalizes, two histograms over the distance of the two neurons: "kept
    connections by distance/<weight>", their number, and "kept share by distance/<weight>", which a local net has high
    at the left whatever the manifold's shape. With pruner also the scalar "sparsity".

    Args:
        writer: torch.utils.tensorboard.SummaryWriter.
        reg: of mk.regularize; a control (shuffled, matched) has no points: pass the regularization it was made from.
        step: the epoch, say.
        pruner: whose sparsity to write, None = none.
        bins: as `kept_by_distance`.

    Kept is what the weight's mask (`<name>_mask`) keeps; without a mask, what is not 0. A histogram's min, max and sums
    are those of the bins' middles.

    Raises:
        TypeError: reg holds a regularizer without points.
    """
    for name, regularizer in reg.items():
        if not isinstance(regularizer, ModuliRegularizer):
            raise TypeError(
                f"reg must hold ModuliRegularizers, which have points, got a {type(regularizer).__name__} for {name}; "
                "pass the regularization that the control was made from.")
        cols = None if regularizer.cols is regularizer.rows else regularizer.cols.points
        counted = kept_by_distance(_kept(reg.targets[name]), regularizer.rows.points, regularizer.manifold, cols=cols,
                                   bins=bins, blocks=regularizer.blocks)
        share = counted.fraction.nan_to_num(0)
        _add(writer, f"kept connections by distance/{name}", counted.edges, (share * counted.counts).round(), step)
        _add(writer, f"kept share by distance/{name}", counted.edges, share, step)
    if pruner is not None:
        writer.add_scalar("sparsity", pruner.sparsity, step)


def _kept(target: Target) -> Tensor:
    """The mask of a weight, else the weight, cut to its columns."""
    mask = target.module._buffers.get(f"{target.name}_mask")
    mask = parameter_of(target) if mask is None else mask
    return mask if target.columns is None else mask[:, target.columns]


def _add(writer: SummaryWriter, tag: str, edges: Tensor, heights: Tensor, step: int) -> None:
    """TensorBoard's own binning would need one number a connection."""
    middles = (edges[1:] + edges[:-1]) / 2
    writer.add_histogram_raw(
        tag, min=float(edges[0]), max=float(edges[-1]), num=float(heights.sum()), sum=float((heights * middles).sum()),
        sum_squares=float((heights * middles**2).sum()), bucket_limits=edges[1:].tolist(),
        bucket_counts=heights.tolist(), global_step=step)
