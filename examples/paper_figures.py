"""Draws the paper's figures from our own runs: PNG files, each with a JSON file of what it shows.

    python -m examples.paper_figures [--figure 1c|6|7|8|rate_maps|all] [--run FOLDER] [--out DIR]

1c: kept connections on the manifold. 6: inhibitors on the manifolds (needs no run). 7: the weights of one neuron over
the manifold, dense and pruned. 8: persistence diagrams of trained points. rate_maps: where a navigation net's hidden
units are active.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import moduli_kernels as mk
from moduli_kernels import plots
from moduli_kernels.env_report import environment

from . import checkpoint, nets, persistence, rate_maps
from .config import Config, Result, task_class
from .report import with_unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
SHAPES = ("torus", "circle", "sphere", "klein")  # that a picture shows whole
NEURONS = 3  # whose connections are drawn
INHIBITORS = {  # of the paper's figure 6
    "$d^2$": mk.Diffusion(c=1.0, exponent=2.0),
    "$10 - 10\\,(e^{-d^2/5} - e^{-d^2})$": mk.DifferenceOfGaussians(c=10.0, sigma1=1.0, sigma2=5.0, zero_min=False),
    "$10 + 10\\,\\cos(2d)$": mk.Sinusoid(c=10.0, mu=2.0),
}
SURFACES = ("torus", "sphere", "klein")
PRUNE = "python -m examples.navigation --net torus --cut 0.9"
DPI = 130


class Missing(Exception):
    """A figure cannot be drawn: no run suits, or a package is not installed."""


@dataclass(eq=False)
class Saved:
    """A finished run as its checkpoint has it, without its task: neither data sets nor nets are made."""

    folder: Path
    config: Config
    result: Result

    def __post_init__(self) -> None:
        self.sparsity = self.config.schedule[-1]
        self.manifold = mk.manifold(nets.manifold_of(self.config.net))

    def first(self) -> tuple[Tensor, Tensor, Tensor]:
        """W_hh (n, n), its mask (True = kept) and points (n, ambient_dim) of the first recurrent weight; of gate blocks
        the first."""
        tensors, _ = checkpoint.load(self.folder)
        tail = ".rows.points"
        keys = (key for key in tensors if key.startswith("geometry.") and key.endswith(tail) and "weight_hh" in key)
        key = min(keys).removeprefix("geometry.regularizers.").removesuffix(tail)
        model = checkpoint.select("model", tensors)
        # The regularizer's key is the weight's name with its dots replaced.
        name = next(name for name in model if name.replace(".", "_") == key)
        points, weight = tensors[f"geometry.regularizers.{key}{tail}"], model[name]
        mask = model.get(f"{name}_mask", weight != 0).bool()
        n = len(points)
        return weight[:n], mask[:n], points

    def said(self) -> str:
        error = with_unit(self.config.task, self.result.history[-1]["error"])
        return f"{self.config.task}, {self.config.net}, seed {self.config.seed}: {error} at {100 * self.sparsity:g} %"

    def record(self) -> dict[str, Any]:
        return {"folder": self.folder.name, "config": self.config.described(), "end": self.result.history[-1],
                "trained_at": self.result.environment}


def saved(folder: Path) -> Saved:
    """The finished run in a folder; Missing says what is wrong with it."""
    path = folder / checkpoint.NAME
    if not path.is_file():
        raise Missing(f"run must be a folder with a {checkpoint.NAME}, got {folder}; train a net, e.g. with {PRUNE}")
    try:
        info = checkpoint.load_info(folder)
        made = Saved(folder, Config(**info["config"]), Result(**info["result"]))
    except ImportError:
        raise Missing("checkpoints need safetensors, which is not installed; run pip install safetensors") from None
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise Missing(f"run must be a checkpoint of this trainer, got {path} ({error}); train the net again") from error
    done, of = len(made.result.history), len(made.config.schedule)
    if done < of:
        raise Missing(f"run must be finished, got {folder} after {done} of {of} epochs; let it go on")
    return made


def finished_runs(root: Path) -> list[Saved]:
    """All below `root`, the newest first; what is unfinished or of another version is left out."""
    found = []
    for path in sorted(root.glob(f"*/{checkpoint.NAME}"), key=lambda p: p.stat().st_mtime_ns, reverse=True):
        try:
            found.append(saved(path.parent))
        except Missing:
            continue
    return found


def newest(found: list[Saved], suits: Callable[[Saved], bool], what: str, train: str) -> Saved:
    """The first that suits."""
    for run in filter(suits, found):
        return run
    raise Missing(f"the figure needs {what}, got none; train one, e.g. with {train}, or name its folder with --run")


def _pruned(run: Saved) -> bool:
    return run.sparsity > 0 and run.config.net not in nets.CONTROLS


# Of a figure: its pictures by name, the runs in them, numbers. `given`: draw the runs `found`; else choose from them.
Drawn = tuple[dict[str, "Figure"], list[Saved], dict[str, Any]]


def _axes(columns: int, width: float, height: float, rows: int = 1, **settings):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **settings)


def _busiest(mask: Tensor, count: int) -> list[int]:
    """The neurons that most connections into are kept of."""
    return mask.sum(dim=1).argsort(descending=True, stable=True)[:count].tolist()


def connections(found: list[Saved], given: bool) -> Drawn:
    """Figure 1c: given runs, or the newest pruned one of each manifold that a picture shows whole."""
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
        ax.set_title(f"{run.said()}\n{ax.get_title()}", fontsize="medium")
        numbers[run.folder.name] = {f"kept into neuron {j}": int(mask[j].sum()) for j in neurons}
    figure.suptitle("Kept connections into the neurons that have most of them (star), each to its source (dot)")
    return {"connections": figure}, runs, numbers


def inhibitors(found: list[Saved], given: bool) -> Drawn:
    """Figure 6: f(distance from one point), a row for each manifold."""
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
    """Figure 7: a row for each given run, or for the newest pruned one and, if there is one, its like without pruning.
    A run that has its like goes before others, and a surface before other manifolds."""
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
            said = f"{int(w[neuron].count_nonzero())} non-zero weights {word} neuron {neuron}"
            ax.set_title(f"{run.said()}\n{said} (star); {ax.get_title().splitlines()[1]}", fontsize="medium")
            numbers.setdefault(run.folder.name, []).append(said)
    figure.suptitle("Weights of one neuron at the other neurons' points")
    return {"neuron_weights": figure}, runs, numbers


def _unpruned(run: Saved, found: list[Saved]) -> list[Saved]:
    """The newest run like it without pruning, if there is one."""
    same = ("task", "net", "seed", "options")
    return [other for other in found if other.sparsity == 0
            and all(getattr(other.config, name) == getattr(run.config, name) for name in same)][:1]


def homology(found: list[Saved], given: bool) -> Drawn:
    """Figure 8: a picture for each given run, or for the newest with trained points."""
    runs = found if given else [newest(found, lambda run: run.config.net.endswith("_trained"), "a finished run with "
                                       "trained points", "python -m examples.adding --net r3_trained --cut 0.95")]
    made = {run: persistence.picture(run.config, run.first()[2], run.manifold, run.said()) for run in runs}
    return _each("persistence", made)


def maps(found: list[Saved], given: bool) -> Drawn:
    """Rate maps: a picture for each given run, or for the newest of navigation."""
    from .trainer import Run

    def suits(run: Saved) -> bool:  # landmarks are drawn on the run's device, whose random numbers are its own
        return run.config.task == "navigation" and (run.config.device == "cpu" or torch.cuda.is_available())

    runs = found if given else [newest(found, suits, "a finished run of navigation on a device that is here", PRUNE)]
    made = {}
    for run in runs:
        config = run.config
        if not suits(run):
            raise Missing(f"run must be of navigation, on a device that is here, got {config.task} on {config.device} "
                          f"in {run.folder}; name another")
        untrained = task_class(config.task)(**config.options, seed=config.seed, device=config.device)
        made[run] = rate_maps.picture(Run(config, run.folder).task, untrained, run.said())
    return _each("rate_maps", made)


def _each(name: str, made: dict[Saved, tuple[Figure, dict[str, Any]]]) -> Drawn:
    """A picture a run."""
    pictures = {f"{name}-{run.folder.name}": figure for run, (figure, _) in made.items()}
    return pictures, list(made), {run.folder.name: numbers for run, (_, numbers) in made.items()}


FIGURES: dict[str, Callable[[list[Saved], bool], Drawn]] = {
    "1c": connections, "6": inhibitors, "7": neuron_weights, "8": homology, "rate_maps": maps,
}


def draw(name: str, found: list[Saved], given: bool, out: Path) -> list[Path]:
    """Writes a figure's pictures, each with a JSON file beside it. Raises Missing."""
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
        path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        written.append(path)
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.paper_figures", description=__doc__.splitlines()[0])
    parser.add_argument("--figure", choices=(*FIGURES, "all"), default="all",
                        help="all (default): those that can be drawn")
    parser.add_argument("--run", type=Path, action="append", metavar="FOLDER",
                        help="of a run, with its checkpoint; may be given again (default: the newest that suits)")
    parser.add_argument("--runs", type=Path, default=HERE / "runs", help="where the newest is looked for")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "paper_figures", help="folder of the pictures")
    options = parser.parse_args(arguments)
    every = options.figure == "all"
    try:
        found = [saved(folder) for folder in options.run] if options.run else finished_runs(options.runs)
        for name in FIGURES if every else (options.figure,):
            try:
                for picture in draw(name, found, bool(options.run), options.out):
                    print(f"Figure {name}: {picture}")
            except Missing as missing:
                if not every:
                    raise
                print(f"Figure {name} left out: {missing}.")
    except Missing as missing:
        print(f"Failed: {missing}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
