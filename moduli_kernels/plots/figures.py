"""Pictures of what a penalty and pruning made of a weight matrix (matplotlib, imported on first use).

Every function draws on `ax`, or on the one axes of a new `matplotlib.figure.Figure` where ax is None, and returns the
axes: `plot_...(...).figure.savefig("picture.png")`. Neither a display nor pyplot is needed; ImportError says where
matplotlib is missing. Weights are recurrent matrices (n, n), `weight[j, k]` from neuron k into neuron j; of stacked
gate blocks pass one. Distances and coordinates are in the units of the manifold's radius or period.
"""
from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .. import checks
from ..geometry.manifolds import Euclidean, Manifold, manifold as manifold_of
from ..geometry.ordering import fundamental, manifold_order
from ..histograms import kept_by_distance
from .charts import chart, slice_chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart with every common kind of colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
MAX_CELLS = 256  # a heat map is averaged down to about this many cells a side
MIN_PAIRS = 50  # a bin of distances with fewer pairs of neurons is left out
_TILE = 256  # rows looked at together: nothing n x n is made


def plot_connections(mask: Tensor, points: Tensor, manifold: Manifold | str,
                     neurons: Sequence[int] | None = None, ax: Axes | None = None) -> Axes:
    """The kept connections into a few neurons, each along the shortest geodesic to its source (paper, Fig. 1c).
    Flat tori and the Klein bottle are drawn in the rectangle, links cut where they cross its border; circles as a ring;
    the 2-sphere on an equal-area map; of anything else the first two coordinates (of a product its first factor).

    Args:
        mask: (n, n), bool, True = kept, or weights, non-zero = kept.
        points: (n, ambient_dim), of the neurons.
        manifold: a Manifold or a preset's name.
        neurons: indices from 0 to n - 1; None takes four spread over the picture.
        ax: to draw on, None = new ones.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what to do.
    """
    m = manifold_of(manifold)
    n = _check("mask", mask, points, m)
    picture, x = _placed(points, m)
    place = picture.place(x)
    chosen = _spread_out(place) if neurons is None else _neurons(neurons, n)
    ax = _axes(ax)
    from matplotlib.collections import LineCollection

    picture.frame(ax)
    ax.scatter(*place.T, s=4, color="0.75", linewidths=0, zorder=1)
    total = 0
    for j, colour in zip(chosen, itertools.cycle(COLOURS)):
        sources = mask[j].detach().cpu().ne(0).nonzero()[:, 0].numpy()
        total += len(sources)
        lines = picture.links(np.broadcast_to(x[j], (len(sources), x.shape[1])), x[sources])
        ax.add_collection(LineCollection(lines, colors=colour, linewidths=0.8, alpha=0.6, zorder=2), autolim=False)
        ax.scatter(*place[sources].T, s=10, color=colour, linewidths=0, zorder=3)
        ax.scatter(*place[j], s=130, marker="*", color=colour, edgecolors="black", linewidths=0.8, zorder=4,
                   label=f"neuron {j}: {len(sources)}")
    if chosen:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, title="kept connections into")
    ax.set_title(f"{total} kept connections into {len(chosen)} neuron{'s' * (len(chosen) != 1)}\n{picture.label}")
    return ax


def plot_weight_heatmap(weight: Tensor, points: Tensor, manifold: Manifold | str, ax: Axes | None = None) -> Axes:
    """|W| as an image, rows and columns in manifold order; of a bool mask, the fraction kept. Above 256 neurons, cells
    of neighbouring rows and columns are averaged to 256 x 256. The colours end at the image's 99.5th percentile.

    Args:
        weight: (n, n), real or bool.
        points: (n, ambient_dim), of the neurons.
        manifold: a Manifold or a preset's name.
        ax: to draw on, None = new ones.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what to do.
    """
    m = manifold_of(manifold)
    n = _check("weight", weight, points, m)
    image = _block_means(weight.detach(), manifold_order(points, m).cpu())
    kept = weight.dtype == torch.bool
    largest = float(np.nanmax(image))
    top = float(np.nanquantile(image, 0.995)) or largest or 1.0
    cells = "" if len(image) == n else f", means of {n / len(image):.3g} x {n / len(image):.3g} entries"
    ax = _axes(ax)
    drawn = ax.imshow(image, cmap="viridis", vmin=0, vmax=top, extent=(0, n, n, 0), interpolation="nearest")
    ax.figure.colorbar(drawn, ax=ax, extend="max" if largest > top else "neither",
                       label=("fraction kept" if kept else "|w|") + cells)
    ax.set(xlabel="from neuron, place in manifold order", ylabel="into neuron, place in manifold order")
    ax.set_title(f"{'Kept connections' if kept else 'Absolute weights'} in manifold order\n{_name(m)}")
    return ax


def plot_kept_against_distance(mask: Tensor, points: Tensor, manifold: Manifold | str,
                               inhibitor: Callable[[Tensor], Tensor], ax: Axes | None = None, bins: int = 30) -> Axes:
    """The fraction of connections kept against the geodesic distance of their two neurons, and over it, on an axis of
    its own, the inhibitor f: what costs little should be kept. Looks at 256 rows at a time.

    Args:
        mask: (n, n), bool, True = kept, or weights, non-zero = kept.
        points: (n, ambient_dim), of the neurons.
        manifold: a Manifold or a preset's name.
        inhibitor: distances -> costs.
        ax: to draw on, None = new ones.
        bins: how many of equal width from 0 to the largest distance; the line is broken at those of under 50 pairs.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what to do.
    """
    m = manifold_of(manifold)
    n = _check("mask", mask, points, m)
    _inhibitor(inhibitor)
    edges, share, pairs = (counted.numpy() for counted in kept_by_distance(mask, points, m, bins=bins))
    largest, middle = float(edges[-1]), (edges[:-1] + edges[1:]) / 2
    fraction = np.where(pairs >= MIN_PAIRS, share, np.nan)
    density = int(mask.detach().ne(0).sum()) / n**2
    ax = _axes(ax)
    ax.plot(middle, fraction, "o-", color=COLOURS[0], markersize=4, label="kept")
    ax.axhline(density, color=COLOURS[0], linestyle=":", label=f"kept overall: {100 * density:.2g} %")
    ax.set(xlabel="geodesic distance of the two neurons (manifold units)", xlim=(0, largest),
           ylim=(0, 1.08 * np.nanmax([density, *fraction]) or 1))
    ax.set_ylabel("fraction of connections kept", color=COLOURS[0])
    d = torch.linspace(0, largest, 400, dtype=torch.float64)
    cost = ax.twinx()
    cost.plot(d.numpy(), inhibitor(d).detach().cpu().numpy(), "--", color=COLOURS[1], label="inhibitor f")
    cost.set_ylabel("inhibitor f(distance): cost of |w|", color=COLOURS[1])
    handles = ax.get_legend_handles_labels()[0] + cost.get_legend_handles_labels()[0]
    cost.legend(handles=handles, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize="small")
    ax.set_title(f"Connections kept against distance\n{_name(m)}", pad=24)
    return ax


def plot_inhibitor(inhibitor: Callable[[Tensor], Tensor], manifold: Manifold | str, ax: Axes | None = None) -> Axes:
    """f(distance from a reference point), drawn over the manifold as an image (paper, Fig. 6); a star marks the point.
    Of more dimensions a slice through it is drawn: the first two coordinates, a great 2-sphere, the first factor of a
    product; of a Manifold subclass of one's own, 2000 sampled points.

    Args:
        inhibitor: f, distances -> costs.
        manifold: a Manifold or a preset's name.
        ax: to draw on, None = new ones.

    Raises:
        TypeError, ValueError: inhibitor cannot be called, or an unknown preset.
    """
    picture = slice_chart(manifold_of(manifold))
    _inhibitor(inhibitor)
    ax = _axes(ax)
    picture.frame(ax)
    mesh = picture.mesh(160)
    if mesh is None:
        x = picture.part.sample(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
        reference = x[:1]
    else:
        x, reference = mesh[2:]
    distance = picture.part.distance(torch.from_numpy(reference), torch.from_numpy(x))[0]
    cost = inhibitor(distance).detach().cpu().numpy()
    if mesh is None:
        drawn = ax.scatter(*picture.place(x).T, c=cost, s=8, cmap="viridis", linewidths=0)
    else:
        across, up = mesh[:2]
        cells = cost.reshape(np.subtract(across.shape, 1))
        drawn = ax.pcolormesh(across, up, cells, cmap="viridis", rasterized=True)
    ax.scatter(*picture.place(reference).T, s=130, marker="*", color="white", edgecolors="black", zorder=4)
    ax.figure.colorbar(drawn, ax=ax, shrink=picture.shrink, label="f(distance from the star): cost of |w|")
    ax.set_title(f"Inhibitor {getattr(inhibitor, '__name__', type(inhibitor).__name__)}\n{picture.label}")
    return ax


def plot_neuron_weights(weight: Tensor, points: Tensor, manifold: Manifold | str, neuron: int,
                        ax: Axes | None = None) -> Axes:
    """The weights into one neuron, each drawn at the neuron it comes from (paper, Fig. 7), as in `plot_connections`;
    zeros are small grey dots and a star marks the neuron itself.

    Args:
        weight: (n, n), real or bool.
        points: (n, ambient_dim), of the neurons.
        manifold: a Manifold or a preset's name.
        neuron: its index, from 0 to n - 1.
        ax: to draw on, None = new ones.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what to do.
    """
    m = manifold_of(manifold)
    n = _check("weight", weight, points, m)
    neuron = _neuron("neuron", neuron, n)
    picture, x = _placed(points, m)
    ax = _axes(ax)
    picture.frame(ax)
    w = weight[neuron].detach().cpu().double().numpy()
    place, there = picture.place(x), w != 0
    ax.scatter(*place[~there].T, s=3, color="0.8", linewidths=0, zorder=1)
    top = float(np.abs(w).max()) or 1.0
    by_size = np.argsort(np.abs(w[there]), kind="stable")  # the large ones on top
    drawn = ax.scatter(*place[there][by_size].T, c=w[there][by_size], cmap="PuOr", vmin=-top, vmax=top, s=28,
                       edgecolors="0.4", linewidths=0.3, zorder=2)
    ax.scatter(*place[neuron], s=150, marker="*", color="white", edgecolors="black", zorder=4)
    ax.figure.colorbar(drawn, ax=ax, shrink=picture.shrink, label="weight")
    ax.set_title(f"{there.sum()} non-zero weights into neuron {neuron} (star)\n{picture.label}")
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib, which is not installed; run pip install matplotlib.") from None
    return Figure(figsize=(6.4, 4.8), layout="constrained").subplots()


def _placed(points: Tensor, m: Manifold):
    """The chart and the coordinates (n, c) of the factor it draws."""
    picture = chart(m)
    return picture, fundamental(points, m)[:, picture.columns].numpy()


def _name(m: Manifold) -> str:
    """The whole manifold, not the part of it that a chart shows."""
    return " x ".join(chart(f).label.split(", ")[0] for f in m.factors())


def _spread_out(place: np.ndarray) -> list[int]:
    """The neurons nearest to the middles of the four quarters of a picture, from their places (n, 2) in it."""
    quarters = manifold_order(torch.from_numpy(place), Euclidean(2)).tensor_split(4)
    middles = [(q.numpy(), place[q].mean(0)) for q in quarters if len(q)]
    return [int(q[((place[q] - middle) ** 2).sum(1).argmin()]) for q, middle in middles]


def _block_means(weight: Tensor, order: Tensor) -> np.ndarray:
    """Means of |weight[order][:, order]| over at most MAX_CELLS x MAX_CELLS cells, of sides within 1 of each other."""
    n, cells = len(order), min(len(order), MAX_CELLS)
    cell = torch.arange(n) * cells // n
    sums = torch.zeros(cells, cells, dtype=torch.float64)
    for t in range(0, n, _TILE):
        rows = weight[order[t:t + _TILE].to(weight.device)].cpu().double().abs()[:, order]
        by_column = torch.zeros(len(rows), cells, dtype=torch.float64).index_add_(1, cell, rows)
        sums.index_add_(0, cell[t:t + _TILE], by_column)
    count = torch.bincount(cell, minlength=cells).double()
    return (sums / count[:, None] / count).numpy()


def _check(name: str, weight: Tensor, points: Tensor, m: Manifold) -> int:
    """A square matrix and one point for each of its n rows; n."""
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"{name} must be a tensor (n, n), got a {type(weight).__name__}; pass torch.as_tensor({name}).")
    if weight.dim() != 2 or weight.shape[0] != weight.shape[1] or not len(weight):
        raise ValueError(
            f"{name} must have shape (n, n) with n at least 1, got {tuple(weight.shape)}; of stacked gate blocks pass "
            f"one, such as {name}[:n].")
    if weight.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got {weight.layout}; pass {name}.to_dense().")
    if weight.is_complex():
        raise TypeError(f"{name} must be real or bool, got {weight.dtype}; pass {name}.abs().")
    checks.embedding_points(points, weight.shape[0], m)
    return weight.shape[0]


def _neurons(neurons: Sequence[int], n: int) -> list[int]:
    try:
        return [_neuron("neurons", j, n) for j in neurons]
    except TypeError:
        raise TypeError(f"neurons must be a sequence of integers, got {neurons!r}; pass for example [0, 7].") from None


def _neuron(name: str, j: int, n: int) -> int:
    try:
        index = operator.index(j)  # ints, NumPy's and 0-d tensors alike
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {j!r}; pass an index such as 0.") from None
    if not 0 <= index < n:
        raise ValueError(f"{name} must be from 0 to {n - 1} for {n} neurons, got {index}; pick a row of the matrix.")
    return index


def _inhibitor(f: object) -> None:
    if not callable(f):
        raise TypeError(
            f"inhibitor must be callable on distances, got {f!r}; pass for example DifferenceOfGaussians().")
