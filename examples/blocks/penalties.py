"""What each family adds to the loss, and the order of the neurons in which it is cut.

All penalties are means over the n x n entries of W_hh, scaled alike, so that one grid of strengths serves all:

    manifold      strength * mean of (f(d_ij) / m) |w_ij|, where m is the mean of f(d_ij)
    l1_matched    strength * mean of |w_ij|
    shuffled      strength * mean of (c_ij / m) |w_ij|, where c is f(d), permuted at random over all entries
    group_lasso   strength * sum over blocks of sqrt(entries of the block) * (L2 norm of the block), divided by n^2

The root makes a block of equal weights as dear as under l1_matched (Yuan & Lin 2006 have it as well). f is the
experiments' difference of Gaussians.

The neurons' points are drawn uniformly on the task's manifold. Blocks are those of the manifold order of these points,
also for families whose penalty does not know the points: to them the order is a random one. "learned_order" has an
order of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.linalg import eigh
from torch import Tensor, nn

import moduli_kernels as mk
from moduli_kernels.pruning.blocks import BlockGrid

from ..training.nets import INHIBITORS
from ..training.trainer import POINTS_SEED
from .plan import PENALTY_OF, SIDE, Trial

DIMENSIONS = 4  # coordinates of a learned order's neurons; a flat torus needs 4, a circle 2
Penalty = Callable[[Tensor], Tensor]


class Geometry:
    """The points of a net's neurons; equal for all families with one seed.

    Attributes:
        regularizer: the manifold's penalty, of mean coefficient 1 and strength 1.
        order: the manifold order of the points, (n,) int64.
        generator: draws what families need beside the points.
    """

    def __init__(self, trial: Trial, hidden: int) -> None:
        self.generator = torch.Generator().manual_seed(POINTS_SEED + trial.seed)
        self.regularizer = mk.ModuliRegularizer(hidden, manifold=trial.protocol.manifold, inhibitor=INHIBITORS["dog"](),
                                                generator=self.generator)
        self.regularizer.strength = 1 / float(self.regularizer.coefficients().double().mean())
        self.points = self.regularizer.rows.points
        self.order = mk.manifold_order(self.points, self.regularizer.manifold)


class GroupLasso(nn.Module):
    """sum over blocks of sqrt(entries of the block) * (L2 norm of the block), divided by the number of entries.

    Args:
        order: (n,) int64, the order of the neurons in which blocks are neighbours; n must be a multiple of the side.
        side: of the blocks.
    """

    def __init__(self, order: Tensor, side: int) -> None:
        super().__init__()
        if len(order) % side:
            raise ValueError(f"side must divide the {len(order)} neurons, got {side}; take another size of the net.")
        self.order, self.side = order, side

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the penalty of a weight (n, n), 0-d."""
        ordered = weight.index_select(0, self.order).index_select(1, self.order)
        blocks = ordered.unflatten(0, (-1, self.side)).unflatten(2, (-1, self.side))
        return self.side * torch.linalg.vector_norm(blocks, dim=(1, 3)).sum() / weight.numel()


def penalty(trial: Trial, geometry: Geometry) -> Penalty | None:
    """Returns the penalty of the trial's family, without its strength; None where there is none."""
    family = PENALTY_OF.get(trial.family, trial.family)
    if trial.strength == 0 or family == "none":
        return None
    return {
        "manifold": lambda: geometry.regularizer, "l1_matched": lambda: geometry.regularizer.matched(),
        "shuffled": lambda: geometry.regularizer.shuffled(geometry.generator),
        "group_lasso": lambda: GroupLasso(geometry.order, SIDE),
    }[family]()


def learned_order(weight: Tensor) -> Tensor:
    """Orders neurons by a trained weight (n, n) alone, so that those with large weights between them are neighbours.

    The neurons get the leading eigenvectors of the normalized adjacency of |W| + |W|^T as coordinates (a diffusion map;
    the first one is the Fiedler vector), which are cut in halves as `mk.manifold_order` does. A reverse Cuthill-McKee
    order would need a pattern of zeros, which a dense net does not have, and would not look at the sizes of weights.

    Returns:
        (n,), int64, a permutation.
    """
    linked = weight.detach().abs().double()
    linked = linked + linked.T
    root = linked.sum(0).clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    n = len(linked)
    values, vectors = eigh((linked / root[:, None] / root).numpy(), subset_by_index=(n - 1 - DIMENSIONS, n - 2))
    coordinates = torch.from_numpy((vectors * values)[:, ::-1].copy()) / root[:, None]
    return mk.manifold_order(coordinates, mk.Euclidean(DIMENSIONS))


def grid(order: Tensor) -> BlockGrid:
    """Returns the blocks of a recurrent weight in this order."""
    return BlockGrid(order, order, SIDE, SIDE)


def filled(mask: Tensor, order: Tensor) -> float:
    """Returns the share of blocks in this order that hold a kept weight."""
    return float((grid(order).sums(mask) > 0).double().mean())


def start_mask(trial: Trial, geometry: Geometry) -> Tensor:
    """Returns the mask (n, n) of a net that is sparse from the start: blocks in manifold order."""
    mask = mk.geometric_mask(geometry.points, manifold=geometry.regularizer.manifold, density=trial.density, block=SIDE)
    if trial.family == "geometric":
        return mask
    blocks = grid(geometry.order).sums(mask) > 0
    drawn = torch.randperm(blocks.numel(), generator=geometry.generator)
    return grid(geometry.order).spread(blocks.flatten()[drawn].view_as(blocks))
