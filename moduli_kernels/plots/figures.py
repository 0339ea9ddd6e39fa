"""Pictures of what a penalty and pruning made of a weight matrix.

Every function draws on `ax`, or on the only axes of a new `matplotlib.figure.Figure` where ax is None, and returns the
axes: `plot_...(...).figure.savefig("picture.png")`. Neither a display nor pyplot is needed. Matplotlib is imported by
the first picture, and an ImportError says so if it is missing. Weights are recurrent matrices (n, n), `weight[j, k]`
from neuron k into neuron j; if gate blocks are stacked, pass one of them. Distances and coordinates are in the unit of
the manifold's radius or period.
"""
from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..geometry.base import Manifold
from ..geometry.checks import embedding_points
from ..geometry.flat import Euclidean
from ..geometry.ordering import manifold_order
from ..geometry.presets import manifold as manifold_of
from ..histograms import kept_by_distance
from .charts import chart, section

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The colours of Okabe and Ito, which people with every common kind of colour vision can distinguish
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
MAX_CELLS = 256  # a heat map is averaged down to at most this many cells a side
MIN_PAIRS = 50  # a bin of distances with fewer pairs of neurons is left out
_TILE = 256  # as many rows are read at a time, so that nothing of size n x n is made


def plot_connections(mask: Tensor, points: Tensor, manifold: Manifold | str,
                     neurons: Sequence[int] | None = None, ax: Axes | None = None) -> Axes:
    """The kept connections into a few neurons, each along the shortest geodesic to its source (paper, Fig. 1c).

    Flat tori and the Klein bottle are drawn in their rectangle, with links cut where they cross the border; circles are
    drawn as a ring, and the 2-sphere on an equal-area map. Any other manifold shows its first two coordinates, and a
    product its first factor.

    Args:
        mask: (n, n), bool (True = kept) or weights (non-zero = kept).
        points: (n, ambient_dim), the points of the neurons.
        manifold: a Manifold or a preset's name.
        neurons: indices from 0 to n - 1; None takes four that are spread over the picture.
        ax: the axes to draw on; None makes new ones.

    Returns:
        The axes.

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
    """|W| as an image, with rows and columns in manifold order; a bool mask shows the fraction kept.

    Above 256 neurons, neighbouring rows and columns are averaged into 256 x 256 cells. The colours end at the image's
    99.5th percentile.

    Args:
        weight: (n, n), real or bool.
        points: (n, ambient_dim), the points of the neurons.
        manifold: a Manifold or a preset's name.
        ax: the axes to draw on; None makes new ones.

    Returns:
        The axes.

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
    """The fraction of connections that are kept, against the geodesic distance of their two neurons.

    The inhibitor f is drawn over it, on an axis of its own: connections that cost little should be kept. 256 rows are
    read at a time.

    Args:
        mask: (n, n), bool (True = kept) or weights (non-zero = kept).
        points: (n, ambient_dim), the points of the neurons.
        manifold: a Manifold or a preset's name.
        inhibitor: f, which turns distances into costs.
        ax: the axes to draw on; None makes new ones.
        bins: the number of bins of equal width, from 0 to the largest distance. The line is broken at bins of fewer
            than 50 pairs.

    Returns:
        The axes of the fraction.

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
    d = torch.linspace(0, largest, 400, dtype=torch.float64, device="cpu")
    cost = ax.twinx()
    cost.plot(d.numpy(), inhibitor(d).detach().cpu().numpy(), "--", color=COLOURS[1], label="inhibitor f")
    cost.set_ylabel("inhibitor f(distance): cost of |w|", color=COLOURS[1])
    handles = ax.get_legend_handles_labels()[0] + cost.get_legend_handles_labels()[0]
    cost.legend(handles=handles, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize="small")
    ax.set_title(f"Connections kept against distance\n{_name(m)}", pad=24)
    return ax


def plot_inhibitor(inhibitor: Callable[[Tensor], Tensor], manifold: Manifold | str, ax: Axes | None = None) -> Axes:
    """f(distance from a reference point), drawn over the manifold as an image (paper, Fig. 6); a star marks the point.

    A manifold of more than two dimensions shows a section through the point: the first two coordinates, a great
    2-sphere, or the first factor of a product. A user's own Manifold subclass shows 2000 sampled points.

    Args:
        inhibitor: f, which turns distances into costs.
        manifold: a Manifold or a preset's name.
        ax: the axes to draw on; None makes new ones.

    Returns:
        The axes.

    Raises:
        TypeError, ValueError: inhibitor cannot be called, or an unknown preset.
    """
    picture = section(manifold_of(manifold))
    _inhibitor(inhibitor)
    ax = _axes(ax)
    picture.frame(ax)
    mesh = picture.mesh(160)
    if mesh is None:
        x = picture.part.sample(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
        reference = x[:1]
    else:
        x, reference = mesh.points, mesh.reference
    distance = picture.part.distance(torch.from_numpy(reference), torch.from_numpy(x))[0]
    cost = inhibitor(distance).detach().cpu().numpy()
    if mesh is None:
        drawn = ax.scatter(*picture.place(x).T, c=cost, s=8, cmap="viridis", linewidths=0)
    else:
        cells = cost.reshape(np.subtract(mesh.x.shape, 1))
        drawn = ax.pcolormesh(mesh.x, mesh.y, cells, cmap="viridis", rasterized=True)
    ax.scatter(*picture.place(reference).T, s=130, marker="*", color="white", edgecolors="black", zorder=4)
    ax.figure.colorbar(drawn, ax=ax, shrink=picture.shrink, label="f(distance from the star): cost of |w|")
    ax.set_title(f"Inhibitor {getattr(inhibitor, '__name__', type(inhibitor).__name__)}\n{picture.label}")
    return ax


def plot_neuron_weights(weight: Tensor, points: Tensor, manifold: Manifold | str, neuron: int,
                        ax: Axes | None = None) -> Axes:
    """The weights into one neuron, each drawn at the neuron that it comes from (paper, Fig. 7).

    Neurons lie as in `plot_connections`. Zeros are small grey dots, and a star marks the neuron itself.

    Args:
        weight: (n, n), real or bool.
        points: (n, ambient_dim), the points of the neurons.
        manifold: a Manifold or a preset's name.
        neuron: its index, from 0 to n - 1.
        ax: the axes to draw on; None makes new ones.

    Returns:
        The axes.

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
    by_size = np.argsort(np.abs(w[there]), kind="stable")  # large weights are drawn last, on top of the others
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
    """The picture of a manifold, and the coordinates (n, c) of the factor that it draws."""
    picture = chart(m)
    return picture, m.fundamental(points.detach().to("cpu", torch.float64))[:, picture.columns].numpy()


def _name(m: Manifold) -> str:
    """The name of the whole manifold, not only of the part that a chart shows."""
    return " x ".join(f.chart().label.split(", ")[0] for f in m.factors())


def _spread_out(place: np.ndarray) -> list[int]:
    """The neurons that are nearest to the middles of the four quarters of a picture, from their places (n, 2)."""
    quarters = manifold_order(torch.from_numpy(place), Euclidean(2)).tensor_split(4)
    middles = [(q.numpy(), place[q].mean(0)) for q in quarters if len(q)]
    return [int(q[((place[q] - middle) ** 2).sum(1).argmin()]) for q, middle in middles]


def _block_means(weight: Tensor, order: Tensor) -> np.ndarray:
    """Means of |weight[order][:, order]| over at most MAX_CELLS x MAX_CELLS cells, whose sides differ by at most 1."""
    n, cells = len(order), min(len(order), MAX_CELLS)
    cell = torch.arange(n, device="cpu") * cells // n
    sums = torch.zeros(cells, cells, dtype=torch.float64, device="cpu")
    for t in range(0, n, _TILE):
        rows = weight[order[t:t + _TILE].to(weight.device)].cpu().double().abs()[:, order]
        by_column = sums.new_zeros(len(rows), cells).index_add_(1, cell, rows)
        sums.index_add_(0, cell[t:t + _TILE], by_column)
    count = torch.bincount(cell, minlength=cells).double()
    return (sums / count[:, None] / count).numpy()


def _check(name: str, weight: Tensor, points: Tensor, m: Manifold) -> int:
    """Raises an error unless weight is a square matrix and points has one row for each of its n rows; returns n."""
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
    embedding_points(points, weight.shape[0], m)
    return weight.shape[0]


def _neurons(neurons: Sequence[int], n: int) -> list[int]:
    try:
        return [_neuron("neurons", j, n) for j in neurons]
    except TypeError:
        raise TypeError(f"neurons must be a sequence of integers, got {neurons!r}; pass for example [0, 7].") from None


def _neuron(name: str, j: int, n: int) -> int:
    try:
        index = operator.index(j)  # this accepts ints, NumPy's integers and 0-d tensors
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {j!r}; pass an index such as 0.") from None
    if not 0 <= index < n:
        raise ValueError(f"{name} must be from 0 to {n - 1} for {n} neurons, got {index}; pick a row of the matrix.")
    return index


def _inhibitor(f: object) -> None:
    if not callable(f):
        raise TypeError(
            f"inhibitor must be callable on distances, got {f!r}; pass for example DifferenceOfGaussians().")
