"""Counts the blocks that hold what a mask keeps, in several orders of the neurons.

A kernel that skips empty blocks is as fast as the share of blocks that are not empty. That share depends on the order
of the neurons, which is the same for rows and columns of a recurrent matrix.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh
from scipy.sparse import csr_array
from scipy.sparse.csgraph import reverse_cuthill_mckee

import moduli_kernels as mk

SIDES = (16, 32, 64)
DRAWS = 5
SHARE = 90  # percent of the kept weights that `holding` asks for
OWN = ("degree", "rcm", "fiedler", "spectral2", "spectral4")


def own_orders(mask: np.ndarray) -> dict[str, np.ndarray]:
    """Finds orders of the neurons from the mask (n, n) alone and returns name -> permutation (n,).

    All but "degree" look at the pattern made symmetric. Neurons without a weight come last.

        degree       by how many weights a neuron keeps, good where few neurons hold most of them
        rcm          reverse Cuthill-McKee
        fiedler      by the first eigenvector of the normalized adjacency after the trivial one
        spectral2, 4 by bisection in the first 2 or 4 of these eigenvectors (a flat torus needs 4 dimensions)
    """
    linked = mask | mask.T
    alone = np.flatnonzero(~linked.any(0))
    some = np.flatnonzero(linked.any(0))
    graph = linked[np.ix_(some, some)].astype(float)
    # A dense solver finds all of them; a sparse one may miss some of several with the same eigenvalue.
    root = np.sqrt(graph.sum(0))
    last = len(some) - 1
    _, vectors = eigh(graph / np.outer(root, root), subset_by_index=(max(last - 4, 0), last))
    coordinates = torch.from_numpy(vectors[:, -2::-1] / root[:, None])
    orders = {"degree": np.argsort(-graph.sum(0), kind="stable"),
              "rcm": reverse_cuthill_mckee(csr_array(graph), symmetric_mode=True)}
    for name, dimensions in (("fiedler", 1), ("spectral2", 2), ("spectral4", 4)):
        orders[name] = mk.manifold_order(coordinates[:, :dimensions], mk.Euclidean(dimensions)).numpy()
    return {name: np.concatenate([some[order], alone]) for name, order in orders.items()}


def block_counts(mask: np.ndarray, side: int) -> np.ndarray:
    """Returns how many weights each block keeps, (blocks down, blocks across). The last blocks may be smaller."""
    starts = [np.arange(0, size, side) for size in mask.shape]
    return np.add.reduceat(np.add.reduceat(mask, starts[0], axis=0, dtype=np.int64), starts[1], axis=1)


def filled(counts: np.ndarray) -> float:
    """Returns the share of blocks that keep a weight."""
    return float((counts > 0).mean())


def holding(counts: np.ndarray, percent: int = SHARE) -> float:
    """Returns the smallest share of blocks that together keep so many percent of the weights."""
    held = np.sort(counts, axis=None)[::-1].cumsum()
    wanted = -(-percent * int(counts.sum()) // 100)  # rounded up
    return float((held < wanted).sum() + (wanted > 0)) / counts.size


def random_mask(n: int, kept: int, seed: int) -> np.ndarray:
    """Draws a mask (n, n) that keeps so many weights."""
    mask = np.zeros(n * n, dtype=bool)
    mask[np.random.default_rng(seed).choice(n * n, kept, replace=False)] = True
    return mask.reshape(n, n)


MEASURES: dict[str, Callable[[np.ndarray], float]] = {"filled": filled, "holding": holding}


def blocks_of(mask: np.ndarray, points: torch.Tensor) -> dict[str, Any]:
    """Returns {measure: {side: {order: share}}}.

    The orders are "manifold", those of OWN, and "random": the mean of DRAWS random masks that keep as many weights.
    """
    orders = {"manifold": mk.manifold_order(points, "torus").numpy(), **own_orders(mask)}
    ordered = {name: [mask[np.ix_(order, order)]] for name, order in orders.items()}
    ordered["random"] = [random_mask(len(mask), int(mask.sum()), seed) for seed in range(DRAWS)]
    counts = {(name, side): [block_counts(one, side) for one in masks]
              for name, masks in ordered.items() for side in SIDES}
    return {measure: {side: {name: float(np.mean([share(c) for c in counts[name, side]])) for name in ordered}
                      for side in SIDES}
            for measure, share in MEASURES.items()}
