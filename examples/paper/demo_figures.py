"""Draws the demo's pictures. matplotlib is imported on first use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moduli_kernels import plots

from ..navigation import BOX, walks
from ..training.config import Config, Result, task_class
from ..training.trainer import Run
from .demo_report import stages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = {"torus": "o", "l1_matched": "s", "none": "^", "shuffled": "D", "torus_trained": "v"}
COLOURS = dict(zip(MARKERS, plots.COLOURS))  # Okabe and Ito's, which every kind of colour vision can tell apart
NEURONS = 3  # so many neurons' connections are drawn
WALK_SEED = 1  # the same walks are drawn for all nets


def draw_all(
    folder: Path, configs: list[Config], results: list[Result], runs: list[Run], wanted: tuple[float, ...]
) -> list[Path]:
    """Writes PNG files into `folder` and returns their paths.

    Args:
        results: those of all seeds, in the order of `configs`.
        runs: the trained nets of one seed.
        wanted: the sparsities to mark.
    """
    figures = {"curves": curves(configs, results, wanted)}
    if configs[0].task == "navigation":
        figures["paths"] = paths(runs)
    else:
        figures["answers"] = answers(runs)
    figures["connections"] = connections(runs)
    figures["weights"] = weights(runs)
    figures["distance"] = distance(runs)
    written = []
    for name, figure in figures.items():
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=130)
    return written


def _figure(columns: int, width: float, height: float, rows: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _named(run: Run) -> str:
    entry = run.result.history[-1]
    error = task_class(run.config.task).with_unit(entry["error"])
    return f"{run.config.net}: error {error} at {100 * entry['sparsity']:g} %"


def curves(configs: list[Config], results: list[Result], wanted: tuple[float, ...]) -> Figure:
    """Draws error and density of W_hh against epoch, a line for each seed."""
    figure, ((top,), (bottom,)) = _figure(1, 9, 3.6, rows=2)
    seen = set()
    for config, result in zip(configs, results, strict=True):
        epochs = [entry["epoch"] for entry in result.history]
        style = {
            "color": COLOURS[config.net], "marker": MARKERS[config.net], "markersize": 4, "linewidth": 1.5,
            "label": None if config.net in seen else config.net,
        }
        seen.add(config.net)
        top.plot(epochs, [entry["error"] for entry in result.history], **style)
        bottom.plot(epochs, [100 * entry["density"] for entry in result.history], **style)
    schedule = configs[0].schedule
    bottom.plot(
        range(1, len(schedule) + 1), [100 * (1 - s) for s in schedule], color="black", linestyle=":",
        linewidth=1.2, label="all pruned matrices",
    )
    for i, (name, epoch) in enumerate(stages(schedule, wanted).items()):
        lift = 3 + 12 * (i % 2)  # neighbouring labels stand at two heights
        for ax in (top, bottom):
            ax.axvline(epoch + 1, color="0.85", linewidth=1, zorder=0)
        top.annotate(
            name.replace(", ", ",\n"), (epoch + 1, 1), xycoords=("data", "axes fraction"), xytext=(0, lift),
            textcoords="offset points", ha="center", va="bottom", fontsize="small", color="0.35",
        )
    navigation = configs[0].task == "navigation"
    top.set(ylabel="error on test walks (cm)" if navigation else "RMSE on test problems", ylim=(0, None))
    top.set_title("Error while pruning (grey: sparsity reached)", pad=42)
    for (name, value), dashes in zip(results[0].references.items(), ((6, 3), (2, 2), (1, 3))):
        top.axhline(value, color="black", linewidth=1, dashes=dashes, label=name)
    bottom.set(ylabel="weights kept (%)", xlabel="epoch", ylim=(0, 104), title="Density of W_hh")
    for ax in (top, bottom):
        ax.set_xlim(0.5, len(schedule) + 0.5)
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def paths(runs: list[Run], count: int = 6) -> Figure:
    """Draws where walkers went (black) and where each net said they were (one colour for each walk)."""
    figure, axes = _figure(len(runs), 4.6, 5.2)
    for run, ax in zip(runs, axes[0]):
        generator = torch.Generator(run.config.device).manual_seed(WALK_SEED)
        walk = walks(count, run.task.steps, generator=generator)
        decoded = 100 * run.task.decoded(walk).cpu().numpy()
        true = 100 * torch.cat((walk.start[None], walk.positions)).cpu().numpy()
        landmarks = 100 * run.task.landmarks.cpu().numpy()
        ax.scatter(*landmarks.T, s=8, marker="+", color="0.7", linewidths=0.7, label="landmark")
        for i, colour in zip(range(count), plots.COLOURS):
            ax.plot(*decoded[:, i].T, ".-", color=colour, linewidth=1, markersize=5, label="decoded path")
            ax.plot(*true[:, i].T, color="black", linewidth=1.8, label="true path")
            start = {"color": colour, "markeredgecolor": "black", "linestyle": "none"}
            ax.plot(*true[0, i], "o", markersize=7, label="start", **start)
        half = BOX * 50
        limits = (-half - 8, half + 8)
        ax.set(xlim=limits, ylim=limits, aspect="equal", xlabel="x (cm)", ylabel="y (cm)")
        walls = [[-half, half, half, -half, -half], [-half, -half, half, half, -half]]
        ax.plot(*walls, color="0.4", linewidth=1)
        ax.set_title(_named(run), fontsize="medium")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles[:4], labels[:4], loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{count} test walks of {runs[0].task.steps} steps, each decoded path in its own colour")
    return figure


def answers(runs: list[Run], count: int = 500) -> Figure:
    """Draws answers against true sums."""
    figure, axes = _figure(len(runs), 4.2, 4.4)
    for run, ax in zip(runs, axes[0]):
        inputs, target = run.task.test.inputs[:, :count], run.task.test.target[:count].cpu().numpy()
        with torch.no_grad():
            answer = run.task.model(inputs).cpu().numpy()
        ax.plot([0, 2], [0, 2], color="black", linewidth=1, label="right answer")
        colour = COLOURS[run.config.net]
        ax.scatter(target, answer, s=7, color=colour, alpha=0.6, linewidths=0, label="a test problem")
        ax.set(xlim=(0, 2), ylim=(-0.2, 2.2), xlabel="true sum", ylabel="the net's answer")
        ax.set_title(_named(run), fontsize="medium")
        ax.legend(frameon=False, loc="upper left", fontsize="small")
    return figure


def _geometry(run: Run):
    """Returns (the first W_hh, its mask, points, manifold, inhibitor). Controls are drawn at the torus net's points."""
    _, regularizer = next(iter(run.geometry.items()))
    weight, mask = run.task.recurrent()[0]
    return weight, mask, regularizer.rows.points.detach(), regularizer.manifold, regularizer.inhibitor


def connections(runs: list[Run]) -> Figure:
    """Draws the kept connections into the neurons that have most of them."""
    figure, axes = _figure(len(runs), 6.2, 4.8)
    for run, ax in zip(runs, axes[0]):
        _, mask, points, manifold, _ = _geometry(run)
        busiest = mask.sum(dim=1).argsort(descending=True, stable=True)[:NEURONS].tolist()
        plots.plot_connections(mask, points, manifold, neurons=busiest, ax=ax)
        ax.set_title(f"{run.config.net}: {ax.get_title()}", fontsize="medium")
    return figure


def weights(runs: list[Run]) -> Figure:
    """Draws |W_hh| with the neurons in the order of their places on the torus."""
    figure, axes = _figure(len(runs), 5.6, 4.8)
    for run, ax in zip(runs, axes[0]):
        weight, _, points, manifold, _ = _geometry(run)
        plots.plot_weight_heatmap(weight, points, manifold, ax=ax)
        ax.set_title(f"{run.config.net}: {ax.get_title()}", fontsize="medium")
    return figure


def distance(runs: list[Run]) -> Figure:
    """Draws the share of connections that is kept, and f, against distance on the torus."""
    figure, axes = _figure(len(runs), 5.6, 4.4)
    for run, ax in zip(runs, axes[0]):
        _, mask, points, manifold, inhibitor = _geometry(run)
        plots.plot_kept_against_distance(mask, points, manifold, inhibitor, ax=ax)
        ax.set_title(f"{run.config.net}: {ax.get_title()}", fontsize="medium", pad=24)
    return figure
