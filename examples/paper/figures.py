"""Draws the paper's figures from our own runs.

Every function of FIGURES takes the runs that were found and `given`: whether the user named exactly these runs, or the
function has to choose from them. It returns (picture's name -> figure, the runs in them, numbers for a JSON record).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import moduli_kernels as mk
from moduli_kernels import plots
from moduli_kernels.env_report import environment

from ..training import files, nets
from ..training.config import task_class
from . import persistence, rate_maps
from .saved_runs import PRUNE, Missing, Saved, newest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHAPES = ("torus", "circle", "sphere", "klein")  # manifolds that a picture shows whole
NEURONS = 3  # whose connections are drawn
INHIBITORS = {  # those of the paper's figure 6
    "$d^2$": mk.Diffusion(c=1.0, exponent=2.0),
    "$10 - 10\\,(e^{-d^2/5} - e^{-d^2})$": mk.DifferenceOfGaussians(c=10.0, sigma1=1.0, sigma2=5.0, zero_min=False),
    "$10 + 10\\,\\cos(2d)$": mk.Sinusoid(c=10.0, mu=2.0),
}
SURFACES = ("torus", "sphere", "klein")
DPI = 130
Drawn = tuple[dict[str, "Figure"], list[Saved], dict[str, Any]]


def _pruned(run: Saved) -> bool:
    return run.sparsity > 0 and run.config.net not in nets.CONTROLS


def _axes(columns: int, width: float, height: float, rows: int = 1, **settings):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **settings)


def _busiest(mask: Tensor, count: int) -> list[int]:
    """Returns the neurons that kept most of the connections into them."""
    return mask.sum(dim=1).argsort(descending=True, stable=True)[:count].tolist()


def connections(found: list[Saved], given: bool) -> Drawn:
    """Draws figure 1c: the given runs, or the newest pruned one of each manifold that a picture shows whole."""
    runs = found
    if not given:
        newest(found, _pruned, "a finished pruned run", PRUNE)
        first = {}
        for run in filter(_pruned, found):
            first.setdefault(nets.manifold_of(run.config.net), run)
        runs = [first[shape] for shape in SHAPES if shape in first] or list(first.values())
    figure, axes = _axes(min(len(runs), 2), 6.8, 5.4, math.ceil(len(runs) / 2))
    for ax in axes.flat[len(runs):]:
        ax.set_visible(False)
    numbers = {}
    for run, ax in zip(runs, axes.flat):
        _, mask, points = run.first()
        neurons = _busiest(mask, NEURONS)
        plots.plot_connections(mask, points, run.manifold, neurons=neurons, ax=ax)
        ax.set_title(f"{run.in_words()}\n{ax.get_title()}", fontsize="medium")
        numbers[run.folder.name] = {f"kept into neuron {j}": int(mask[j].sum()) for j in neurons}
    figure.suptitle("Kept connections into the neurons that have most of them (star), each to its source (dot)")
    return {"connections": figure}, runs, numbers


def inhibitors(found: list[Saved], given: bool) -> Drawn:
    """Draws figure 6: f(distance from one point), a row for each manifold. It needs no run."""
    heights = [0.62 if shape == "sphere" else 1 for shape in SHAPES]
    figure, axes = _axes(len(INHIBITORS), 5.4, 4.3, len(SHAPES), height_ratios=heights)
    for row, shape in zip(axes, SHAPES):
        for ax, (formula, inhibitor) in zip(row, INHIBITORS.items()):
            plots.plot_inhibitor(inhibitor, shape, ax=ax)
            figure.axes[-1].set_ylabel("cost f(d) of |w|")  # the colour bar
            ax.set_title(f"f(d) = {formula}\n{ax.get_title().splitlines()[1]}", fontsize="medium")
    figure.suptitle("Inhibitors on the manifolds: the cost of a connection to the star at distance d (paper, Fig. 6)")
    return {"inhibitors": figure}, [], {type(f).__name__: asdict(f) for f in INHIBITORS.values()}


def neuron_weights(found: list[Saved], given: bool) -> Drawn:
    """Draws figure 7: a row for each given run, or for a pruned run and, if there is one, its like without pruning.

    Of the pruned runs, one that has its like is preferred, then one on a surface, then the newest.
    """
    runs = found
    if not given:
        pairs = [[*_unpruned(run, found), run] for run in found if _pruned(run)]
        newest(found, _pruned, "a finished pruned run", PRUNE)
        runs = max(pairs, key=lambda pair: (len(pair), nets.manifold_of(pair[-1].config.net) in SURFACES))
    figure, axes = _axes(2, 7, 5.4, len(runs))
    neuron = _busiest(runs[-1].first()[1], 1)[0]  # in every row: nets of a seed have the same fixed points
    numbers: dict[str, Any] = {}
    for run, row in zip(runs, axes):
        weight, mask, points = run.first()
        if neuron >= len(points):
            raise Missing(f"run must be of nets with as many neurons, got {len(points)} in {run.folder} and neuron "
                          f"{neuron}; draw them one by one")
        weight = torch.where(mask, weight, 0.0)
        for ax, w, word in zip(row, (weight, weight.T), ("into", "out of")):
            plots.plot_neuron_weights(w, points, run.manifold, neuron, ax=ax)
            count = f"{int(w[neuron].count_nonzero())} non-zero weights {word} neuron {neuron}"
            ax.set_title(f"{run.in_words()}\n{count} (star); {ax.get_title().splitlines()[1]}", fontsize="medium")
            numbers.setdefault(run.folder.name, []).append(count)
    figure.suptitle("Weights of one neuron at the other neurons' points")
    return {"neuron_weights": figure}, runs, numbers


def _unpruned(run: Saved, found: list[Saved]) -> list[Saved]:
    """Returns the newest run like it without pruning, or nothing."""
    same = ("task", "net", "seed", "options")
    return [other for other in found if other.sparsity == 0
            and all(getattr(other.config, name) == getattr(run.config, name) for name in same)][:1]


def homology(found: list[Saved], given: bool) -> Drawn:
    """Draws figure 8: a picture for each given run, or for the newest with trained points."""
    runs = found if given else [newest(found, lambda run: run.config.net.endswith("_trained"), "a finished run with "
                                       "trained points", "python -m examples.adding --net r3_trained --cut 0.95")]
    made = {run: persistence.picture(run.config, run.first()[2], run.manifold, run.in_words()) for run in runs}
    return _each("persistence", made)


def maps(found: list[Saved], given: bool) -> Drawn:
    """Draws rate maps: a picture for each given run, or for the newest of navigation."""
    from ..training.trainer import Run

    def suits(run: Saved) -> bool:  # a device's random numbers are its own, and landmarks were drawn on the run's
        return run.config.task == "navigation" and (run.config.device == "cpu" or torch.cuda.is_available())

    runs = found if given else [newest(found, suits, "a finished run of navigation on a device that is here", PRUNE)]
    made = {}
    for run in runs:
        config = run.config
        if not suits(run):
            raise Missing(f"run must be of navigation, on a device that is here, got {config.task} on {config.device} "
                          f"in {run.folder}; name another")
        untrained = task_class(config.task)(**config.options, seed=config.seed, device=config.device)
        made[run] = rate_maps.picture(Run(config, run.folder).task, untrained, run.in_words())
    return _each("rate_maps", made)


def _each(name: str, made: dict[Saved, tuple[Figure, dict[str, Any]]]) -> Drawn:
    """Returns a picture for each run."""
    pictures = {f"{name}-{run.folder.name}": figure for run, (figure, _) in made.items()}
    return pictures, list(made), {run.folder.name: numbers for run, (_, numbers) in made.items()}


FIGURES: dict[str, Callable[[list[Saved], bool], Drawn]] = {
    "1c": connections, "6": inhibitors, "7": neuron_weights, "8": homology, "rate_maps": maps,
}


def draw(name: str, found: list[Saved], given: bool, out: Path) -> list[Path]:
    """Writes a figure's pictures, each with a JSON file beside it, and returns their paths. Raises Missing."""
    try:
        pictures, runs, numbers = FIGURES[name](found, given)
    except (ImportError, RuntimeError, ValueError) as error:
        raise Missing(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for picture, figure in pictures.items():
        path = out / f"{picture}.png"
        figure.savefig(path, dpi=DPI)
        record = {"figure": name, "picture": path.name, "runs": [run.record() for run in runs], "numbers": numbers,
                  "drawn_at": environment()}
        files.write_text(path.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
        written.append(path)
    return written
