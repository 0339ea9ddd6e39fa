"""Pictures of the documentation that are drawn while the site is built: docs/build.py calls `png`.

Each function in PICTURES makes one figure. None needs a trained run, data or network, and all together take seconds.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure
from torch import Tensor

import moduli_kernels as mk
from examples.paper import figures as paper_figures
from moduli_kernels import plots

DPI = 110
NEURONS = 400  # rows and columns of the matrix that is pruned in the pictures
CUT = 0.95
SHRINK = 1.5  # how much the proximal step takes from a weight of mean cost, in units of the mean |w|
COLLAPSING = 160  # neurons whose points are trained
STEPS = 400
RECORDS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def _figure(columns: int, width: float, height: float, rows: int = 1):
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def inhibitors() -> Figure:
    """Draws the paper's figure 6."""
    return paper_figures.inhibitors([], False)[0]["inhibitors"]


def curves() -> Figure:
    """Draws f over d for four inhibitors, each on its own scale."""
    shown = {
        "DifferenceOfGaussians()": mk.DifferenceOfGaussians(),
        "Diffusion()": mk.Diffusion(),
        "Sinusoid()": mk.Sinusoid(),
        "RickerWavelet()": mk.RickerWavelet(),
    }
    d = torch.linspace(0, 7, 500, dtype=torch.float64)
    figure, axes = _figure(len(shown), 3.2, 2.8)
    for ax, (name, f) in zip(axes.flat, shown.items()):
        ax.plot(d, f(d), color=plots.COLOURS[0 if f.trainable else 1])
        ax.set(xlabel="distance d", ylabel="cost f(d) of |w|", ylim=(0, None))
        ax.set_title(name + ("" if f.trainable else "\nmonotone: not for trained points"), fontsize="medium")
    return figure


@cache
def _cut_matrix(geometric: bool) -> tuple[Tensor, Tensor]:
    """A random weight (n, n) pruned to CUT, after a proximal step if `geometric`; and points (n, 2) on the torus."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(NEURONS, NEURONS, bias=False)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
    points = mk.ManifoldEmbedding(NEURONS, "torus", generator=generator).points
    if geometric:
        mean = mk.DifferenceOfGaussians()(mk.manifold("torus").distance(points, points)).mean()
        step = SHRINK * layer.weight.detach().abs().mean() / mean
        mk.proximal_step_(layer.weight, points, manifold="torus", step=float(step), reduction="sum")
    mk.MagnitudePruner([(layer, "weight")]).step_to(CUT)
    return layer.weight.detach(), points


def kept() -> Figure:
    """Draws what pruning keeps of a random matrix, without and with the penalty: on the torus, and against distance."""
    figure, axes = _figure(2, 6.6, 4.6, rows=2)
    rows = {"Pruned by magnitude alone": False, "Shrunk by the penalty, then pruned": True}
    for row, (words, geometric) in zip(axes, rows.items()):
        weight, points = _cut_matrix(geometric)
        plots.plot_connections(weight, points, "torus", ax=row[0])
        plots.plot_kept_against_distance(weight, points, "torus", mk.DifferenceOfGaussians(), ax=row[1])
        row[0].set_title(f"{words}\n{row[0].get_title()}", fontsize="medium")
    return figure


def order() -> Figure:
    """Draws the same kept weights in the order of the neurons' indices, and in manifold order."""
    weight, points = _cut_matrix(True)
    figure, axes = _figure(2, 5.6, 4.6)
    # The manifold order of points on a line, placed in the order of the indices, is the order of the indices.
    line = torch.arange(NEURONS, dtype=torch.float64)[:, None]
    plots.plot_weight_heatmap(weight != 0, line, mk.Euclidean(1), ax=axes[0, 0])
    axes[0, 0].set(xlabel="from neuron", ylabel="into neuron", title="Kept connections, neurons as they are numbered")
    plots.plot_weight_heatmap(weight != 0, points, "torus", ax=axes[0, 1])
    axes[0, 1].set_title("The same in manifold order of the neurons' points")
    return figure


def collapse() -> Figure:
    """Draws points trained with fixed weights, under an f that rises everywhere and under one that does not."""
    weight = torch.rand(COLLAPSING, COLLAPSING, generator=torch.Generator().manual_seed(0))
    torus = mk.manifold("torus")
    pairs = ~torch.eye(COLLAPSING, dtype=torch.bool)
    start = torus.sample(COLLAPSING, generator=torch.Generator().manual_seed(1))
    figure, axes = _figure(3, 4.2, 4.4)
    for ax, f in zip(axes.flat, (None, mk.Diffusion(), mk.DifferenceOfGaussians())):
        points = start if f is None else _trained(start, weight, torus, f)
        distance = torus.distance(points, points)[pairs].mean()
        plots.plot_connections(pairs & False, points, torus, neurons=(), ax=ax)
        when = "At the start" if f is None else f"After {STEPS} steps with {type(f).__name__}()"
        ax.set_title(f"{when}\nmean distance of two points {distance:.2g}", fontsize="medium")
    return figure


def _trained(start: Tensor, weight: Tensor, manifold: mk.Manifold, f: mk.Inhibitor) -> Tensor:
    points = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([points], lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        mk.moduli_penalty(weight, points, manifold=manifold, inhibitor=f).backward()
        optimizer.step()
    return points.detach()


def rnn() -> Figure:
    """Draws how many times as fast as torch.nn.RNN SparseRNN is, from the newest committed record that measured it."""
    records = [(path, json.loads(path.read_text())) for path in sorted(RECORDS.glob("*/*.json"))]
    path, record = max((each for each in records if each[1].get("rnn")), key=lambda each: each[1]["started"])
    grid = [case for case in record["rnn"] if case["layers"] == 1 and case["steps"] == 20]
    figure, axes = _figure(2, 5.6, 4.0)
    for ax, training in zip(axes.flat, (True, False)):
        lines: dict[tuple[int, int], list[tuple[float, float]]] = {}
        for case in grid:
            if case["training"] == training:
                removed = 100 * (1 - (case["density"] or 1))
                dense = next(each for each in case["contestants"] if each["name"] == "torch.nn.RNN")
                lines.setdefault((case["n"], case["batch"]), []).append((removed, median(dense["ratio"])))
        for (n, batch), points in lines.items():
            ax.plot(*zip(*sorted(points)), "o-", label=f"n = {n}, batch {batch}")
        ax.axhline(1, color="grey", linestyle=":")
        ax.set(xlabel="weights removed (%)", ylabel="times as fast as torch.nn.RNN", yscale="log",
               title="forward and backward" if training else "forward")
        ax.set_yticks([1, 2, 3, 5, 10], ["1", "2", "3", "5", "10"])
        ax.minorticks_off()
    axes[0, 0].legend(fontsize="small")
    cpu = record["environment"].get("cpu", "")
    figure.suptitle(f"SparseRNN, 20 steps, float32, {record['threads']} threads, {cpu}; {path.name}", fontsize="medium")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    each.__name__: each for each in (inhibitors, curves, kept, order, collapse, rnn)
}


@cache
def png(name: str) -> bytes:
    """Returns the picture of that name as the bytes of a PNG file."""
    buffer = io.BytesIO()
    PICTURES[name]().savefig(buffer, dpi=DPI)
    return buffer.getvalue()
