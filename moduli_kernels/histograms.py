"""Counts the kept connections by the distance of their two neurons, and writes histograms of them to TensorBoard."""
from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checks import positive_int
from .geometry.base import Manifold
from .geometry.checks import embedding_points
from .geometry.presets import manifold as manifold_of
from .masks import get_mask
from .penalty.attach import Regularization
from .penalty.modules import ModuliRegularizer
from .penalty.places import Target, weight_of
from .pruning.pruner import MagnitudePruner

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_TILE = 256  # as many rows are read at a time, so that nothing of size n x n is made


class KeptByDistance(NamedTuple):
    """What `kept_by_distance` counts.

    edges: (bins + 1,), float64, the edges of the bins in the manifold's unit of length.
    fraction: (bins,), float64, the share of the connections in each bin that is kept; NaN where a bin has none.
    counts: (bins,), int64, the number of all connections in each bin.
    """

    edges: Tensor
    fraction: Tensor
    counts: Tensor


def kept_by_distance(mask: Tensor, points: Tensor, manifold: Manifold | str, *, cols: Tensor | None = None,
                     bins: int = 30, blocks: int = 1) -> KeptByDistance:
    """The share of connections that are kept, by the geodesic distance of their two neurons.

    256 rows are read at a time, in float64, and all of them twice: the first time for the largest distance.

    Args:
        mask: (blocks*R, C) or (R, C, *kernel), bool (True = kept) or weights (non-zero = kept); a kernel is kept if any
            entry of it is.
        points: (R, ambient_dim), the points of the rows.
        manifold: a Manifold or a preset's name.
        cols: (C, ambient_dim), the points of the columns; None means that they are those of the rows.
        bins: the number of bins of equal width, from 0 to the largest distance.
        blocks: the number of gate blocks that are stacked in rows and share the points.

    Returns:
        KeptByDistance, on the CPU.

    Raises:
        ValueError, TypeError: mask or points do not fit, the preset is unknown, or bins < 1.
    """
    m = manifold_of(manifold)
    positive_int("bins", bins)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor (rows, columns), got a {type(mask).__name__}; pass "
                        "torch.as_tensor(mask).")
    if mask.layout != torch.strided:
        raise TypeError(f"mask must be dense, got {mask.layout}; pass mask.to_dense().")
    blocks = positive_int("blocks", blocks)
    if mask.dim() < 2 or not mask.numel() or mask.shape[0] % blocks:
        raise ValueError(f"mask must have shape (blocks*R, C) with blocks={blocks} and R, C at least 1, got "
                         f"{tuple(mask.shape)}; of a vector there are no connections.")
    rows = mask.shape[0] // blocks
    embedding_points(points, rows, m)
    if cols is not None:
        embedding_points(cols, mask.shape[1], m)
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
    """Writes two histograms over the distance of the two neurons to TensorBoard, for each weight that reg penalizes.

    "kept connections by distance/<weight>" is the number of kept connections. "kept share by distance/<weight>" is
    their share of all connections at that distance; a local net has its bars at the left, whatever the manifold's
    shape. A connection is kept if the weight's mask (see moduli_kernels/masks.py) keeps it or, without a mask, if it is
    not 0. The sums of a histogram are those of the middles of its bins.

    Args:
        writer: a torch.utils.tensorboard.SummaryWriter.
        reg: what mk.regularize returned. A control (shuffled, matched) has no points: pass the regularization that it
            was made from.
        step: the number of the step on TensorBoard's axis, such as the epoch.
        pruner: writes its sparsity too, as the scalar "sparsity"; None writes none.
        bins: the number of bins, as in `kept_by_distance`.

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
    """The mask of a weight or, if it has none, the weight itself, cut to the columns of the target."""
    mask = get_mask(target.module, target.name)
    if mask is None:
        return weight_of(target)
    return mask if target.columns is None else mask[:, target.columns]


def _add(writer: SummaryWriter, tag: str, edges: Tensor, heights: Tensor, step: int) -> None:
    """Writes heights (bins,) as a histogram; TensorBoard's own binning would need one number for each connection."""
    middles = (edges[1:] + edges[:-1]) / 2
    writer.add_histogram_raw(
        tag, min=float(edges[0]), max=float(edges[-1]), num=float(heights.sum()), sum=float((heights * middles).sum()),
        sum_squares=float((heights * middles**2).sum()), bucket_limits=edges[1:].tolist(),
        bucket_counts=heights.tolist(), global_step=step)
