"""Computes the persistent homology of the neurons' points: components, loops and voids at every scale (Figure 8).

Two points are joined when they are closer than r. As r grows, features appear (birth) and are filled (death). Trained
points are compared with as many fresh points, drawn as the run drew its own at its start. ripser is imported on first
use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import moduli_kernels as mk
from moduli_kernels import plots

from ..training.config import Config, task_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 300  # from a larger net, so many neurons are picked at random
MOST_POINTS_H2 = 128  # up to so many points, voids are computed too
DRAWS = 20  # sets of fresh points
DRAW_SEED = 5
NAMES = ("components", "loops", "voids")


def _ripser() -> Callable:
    try:
        from ripser import ripser
    except ImportError:
        raise ImportError(
            "persistence diagrams need ripser, which is not installed; run pip install 'moduli-kernels[tda]' or "
            "pip install ripser"
        ) from None
    return ripser


def diagrams(points: Tensor, manifold: mk.Manifold | str, dimensions: int = 1) -> list[np.ndarray]:
    """Returns the persistence diagrams H0 ... H<dimensions> by the manifold's own distance.

    Each is an array (features, 2) of births and deaths, in manifold units. The one component that never dies is left
    out.

    Args:
        points: (n, ambient_dim).
    """
    x = points.detach().to("cpu", torch.float64)
    distances = mk.manifold(manifold).distance(x, x).numpy()
    np.fill_diagonal(distances, 0.0)
    found = _ripser()(np.maximum(distances, distances.T), maxdim=dimensions, distance_matrix=True)["dgms"]
    return [each[np.isfinite(each[:, 1])].astype(np.float64) for each in found]


def misread(points: Tensor) -> Tensor:
    """Returns the rows that the authors' code would have saved for these points, both (n, c).

    Their distances read an (n, c) array E through view(c, n, 1): coordinate k of neuron j is the (k n + j)-th number
    of E, so the points used are E.view(c, n).T. Of given points P that makes E = P.T.reshape(n, c), whose rows hold c
    neighbours' values of one coordinate. With a single column, rows and points are the same.
    """
    return points.T.reshape(points.shape)


def longest(diagram: np.ndarray) -> float:
    """Returns the longest life, in manifold units; 0 for an empty diagram."""
    return float(np.ptp(diagram, axis=1).max()) if len(diagram) else 0.0


def largest_ratio(diagram: np.ndarray) -> float:
    """Returns the largest death / birth, which does not depend on scale; 1 for an empty diagram and for components."""
    born = diagram[diagram[:, 0] > 0]
    return float((born[:, 1] / born[:, 0]).max()) if len(born) else 1.0


def median_life(diagram: np.ndarray) -> float:
    """Returns the median life, in manifold units; 0 for an empty diagram. The components' lives are the gaps that are
    closed one after another."""
    return float(np.median(np.ptp(diagram, axis=1))) if len(diagram) else 0.0


def fresh_points(config: Config, manifold: mk.Manifold, n: int, generator: torch.Generator) -> Tensor:
    """Draws points (n, ambient_dim), float64, from the distribution that the run's own points started from."""
    if config.net == "r3_trained" and config.r3 == "code":
        spread = task_class(config.task).R3_SPREAD
        return spread * torch.randn(n, manifold.ambient_dim, generator=generator, dtype=torch.float64)
    return manifold.sample(n, generator=generator, dtype=torch.float64)


@dataclass
class Compared:
    """The diagrams of one set of points, and those of each draw."""

    what: str  # says in words which points these are
    own: list[np.ndarray]  # H0, H1, ...
    drawn: list[list[np.ndarray]]  # the same for each draw

    def numbers(self) -> dict[str, Any]:
        """Returns numbers for a JSON record. p is the share of draws, counting the own points as one, that reach as far
        as the own points."""
        found: dict[str, Any] = {}
        for k, own in enumerate(self.own):
            entry: dict[str, Any] = {"features": len(own)}
            scales = ("median", median_life) if k == 0 else ("largest_death_over_birth", largest_ratio)
            for name, of in (("longest", longest), scales):
                drawn = [of(draw[k]) for draw in self.drawn]
                reach = 1 + sum(value >= of(own) for value in drawn)
                entry[name] = {"own": of(own), "drawn": drawn, "p": reach / (1 + len(drawn))}
            found[f"H{k}"] = entry
        return found


def compare(config: Config, points: Tensor, manifold: mk.Manifold, *, most: int = MOST_POINTS, draws: int = DRAWS,
            seed: int = DRAW_SEED) -> list[Compared]:
    """Compares the run's points with `draws` sets of fresh points.

    Where the authors' code would have saved other rows (see `misread`), a second comparison misreads both sides.
    """
    generator = torch.Generator().manual_seed(seed)
    points = points.detach().to("cpu", torch.float64)
    n = min(len(points), most)
    pick = torch.randperm(len(points), generator=generator)[:n].sort().values
    dimensions = 2 if n <= MOST_POINTS_H2 else 1
    fresh = [fresh_points(config, manifold, len(points), generator) for _ in range(draws)]
    readings: list[tuple[str, Callable[[Tensor], Tensor]]] = [("points as the penalty used them", lambda x: x)]
    if points.shape[1] > 1:
        readings.append(("rows of the authors' reading: re-paired coordinates", misread))
    return [
        Compared(what, diagrams(read(points)[pick], manifold, dimensions),
                 [diagrams(read(x)[pick], manifold, dimensions) for x in fresh])
        for what, read in readings
    ]


def picture(config: Config, points: Tensor, manifold: mk.Manifold, what: str) -> tuple[Figure, dict[str, Any]]:
    """Draws the diagrams of one run and returns (figure, numbers).

    A row of the figure shows one set of points: components against scale, then births and deaths of loops and voids.

    Args:
        what: the title's second line.
    """
    compared = compare(config, points, manifold)
    n = min(len(points), MOST_POINTS)
    title = (f"Persistent homology of {n} points{f' of {len(points)}' if n < len(points) else ''}\n{what}\n"
             "grey: as many points from the distribution that the run's own started from")
    if len(compared) > 1:
        title += "\nlower row: the rows that the authors' code would have saved, which re-pair the coordinates"
    return _figure(title, compared), {each.what: each.numbers() for each in compared}


def _figure(title: str, compared: list[Compared]) -> Figure:
    from matplotlib.figure import Figure

    columns = len(compared[0].own)
    made = Figure(figsize=(4.9 * columns, 4.7 * len(compared) + 0.7), layout="constrained")
    axes = made.subplots(len(compared), columns, squeeze=False)
    for row, each in zip(axes, compared, strict=True):
        _components(row[0], each)
        for k in range(1, columns):
            _births_and_deaths(row[k], each, k)
    made.suptitle(title)
    return made


def _components(ax: Axes, each: Compared) -> None:
    """Draws how many components are left at each distance; the band reaches from the least to the most of the draws."""
    top = max(d[0][:, 1].max() for d in (each.own, *each.drawn)) * 1.05
    at = np.linspace(0, top, 400)

    def left(diagram: np.ndarray) -> np.ndarray:
        return 1 + len(diagram) - np.searchsorted(np.sort(diagram[:, 1]), at, side="right")

    if each.drawn:
        counts = np.stack([left(draw[0]) for draw in each.drawn])
        ax.fill_between(at, counts.min(axis=0), counts.max(axis=0), color="0.75", linewidth=0,
                        label=f"{len(counts)} draws, least to most")
    ax.plot(at, left(each.own[0]), color=plots.COLOURS[0], linewidth=1.6, label="the run's points")
    ax.set(xlabel="distance at which points are joined (manifold units)", ylabel="components left", yscale="log",
           xlim=(0, top))
    ax.set_title(f"H0: components\n{each.what}", fontsize="medium")
    ax.legend(frameon=False, fontsize="small")


def _births_and_deaths(ax: Axes, each: Compared, k: int) -> None:
    own, drawn = each.own[k], [draw[k] for draw in each.drawn]
    both = np.concatenate([own, *drawn])
    top = 1.05 * float(both.max()) if len(both) else 1.0
    ax.plot([0, top], [0, top], color="black", linewidth=0.8)
    if drawn:
        cloud = np.concatenate(drawn)
        ax.scatter(*cloud.T, s=7, color="0.72", linewidths=0, label=f"{len(drawn)} draws", rasterized=True)
        most = max(map(longest, drawn))
        ax.plot([0, top], [most, top + most], color="0.35", linewidth=1, linestyle="--",
                label=f"longest life drawn: {most:.2f}")
    ax.scatter(*own.T, s=20, color=plots.COLOURS[k], edgecolors="black", linewidths=0.4, zorder=3,
               label=f"the run's points, longest {longest(own):.2f}")
    ax.set(xlim=(0, top), ylim=(0, top), aspect="equal", xlabel="birth (manifold units)",
           ylabel="death (manifold units)")
    ax.set_title(f"H{k}: {NAMES[k]}\n{each.what}", fontsize="medium")
    ax.legend(frameon=False, fontsize="small", loc="lower right")
